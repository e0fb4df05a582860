# SPDX-License-Identifier: Apache-2.0
"""Quantising a language model block by block: what post-training methods share, whatever a layer becomes.

Each decoder block sees the calibration text as the quantised blocks before it pass it on. One block at a time: a
forward pass measures every linear layer's input (its Hessian, unless the method looks at something else), the layers
are swapped, a second pass makes the next block's input. What a block is called with besides the activations (masks,
position tables) does not depend on weights, so one pass of the unquantised model records it for all blocks, in which
only the first batch is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._checkpoint_file import digest
from ..convert import Filter, replace_modules, require_bare
from ._blocks_folder import BlocksFolder, digest_of
from .gptq import Hessian

Batch = Tensor | Mapping[str, Any]
QuantiseLinear = Callable[[nn.Linear, Any], tuple[nn.Module, float]]
"""A layer and what was measured of its inputs to the layer that replaces it and its relative error."""


class Measure(Protocol):
    """What a method wants to know of a layer's inputs; `gptq.Hessian` is one."""

    def add(self, x: Tensor, sequences: int | None = None) -> None:
        """Look at inputs [..., k] of a batch of so many sequences, where the block knows how many."""


NewMeasure = Callable[[int, torch.device], Measure]
"""in_features of a layer and its device to a new measure."""

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # what hosts call a block's key-value cache


class _Stop(Exception):
    """Ends a forward pass where all has been seen."""


def decoder_blocks(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks: the one outermost nn.ModuleList whose items have nn.Linear layers.

    Raises:
        ValueError: if there is none or more than one, or no list of this name.
    """
    if name is not None:
        named = dict(model.named_modules()).get(name)
        if not isinstance(named, nn.ModuleList) or not len(named):
            raise ValueError(f"decoder_blocks: blocks must name an nn.ModuleList of the model, got {name!r}")
        return name, named
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_has_linear, module)):
            found[path] = module
    if len(found) != 1:
        seen = f"the lists {', '.join(found)}" if found else "no such list"
        raise ValueError(
            f"decoder_blocks: the model must keep blocks with nn.Linear layers in one nn.ModuleList, got {seen}; name"
            " it with blocks=... (a model that has been quantised has no nn.Linear left)"
        )
    path, blocks = next(iter(found.items()))
    for name, p in blocks.named_parameters():
        owner = blocks.get_submodule(name.rpartition(".")[0])
        if p.dim() > 2 and not type(owner).__module__.startswith("torch.nn."):
            raise ValueError(
                f"decoder_blocks: the blocks must keep their weights in nn.Linear layers, got {path}.{name} of shape"
                f" {list(p.shape)}; split it into layers, as bitmill.integrations.gpt_oss.split_experts_ does"
            )
    return path, blocks


def _has_linear(module: nn.Module) -> bool:
    return any(type(m) is nn.Linear for m in module.modules())


class _Calls:
    """What every block is called with for every batch, and the activations in front of the block whose turn it is."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Batch]) -> None:
        self.hidden: list[Tensor] = []
        self.others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in blocks]
        handles = [
            block.register_forward_pre_hook(self._recorder(index, index == len(blocks) - 1), with_kwargs=True)
            for index, block in enumerate(blocks)
        ]
        try:
            with other_forwards({block: _passing_on(block.forward) for block in blocks}):
                for batch in batches:
                    try:
                        model(**batch) if isinstance(batch, Mapping) else model(batch)
                    except _Stop:
                        continue
                    raise ValueError("quantize_: a forward pass of the model must reach its last block, it did not")
        finally:
            for handle in handles:
                handle.remove()
        if not self.hidden:
            raise ValueError("quantize_: batches must hold calibration text, got none")

    def _recorder(self, index: int, last: bool) -> Callable[..., None]:
        def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise ValueError(
                    f"quantize_: a block must take the activations as its first argument, {type(block).__name__} got"
                    f" {', '.join(kwargs) or 'none'}"
                )
            if any(kwargs.get(name) is not None for name in CACHES):
                raise ValueError(
                    "quantize_: a block must be called without a key-value cache, which a second call would extend, got"
                    f" one in {type(block).__name__}; add use_cache=False to the batches"
                )
            if index == 0:
                self.hidden.append(args[0])
            call = args[1:], kwargs
            # Batches of one shape have equal masks and tables: one copy of each is enough.
            self.others[index].append(_shared(call, self.others[index][-1]) if self.others[index] else call)
            if last:
                raise _Stop

        return record

    def digest(self) -> str:
        """Of the text: the activations in front of the first block, and what else it is called with."""
        batches = [digest_of(hidden=t) for t in self.hidden]
        every = [(*args, *kwargs.values()) for args, kwargs in self.others[0]]
        masks = [digest_of(other=t) for others in every for t in others if isinstance(t, Tensor)]
        return digest({"batches": batches, "masks": masks}, {})

    def run(self, index: int, block: nn.Module) -> Iterator[Tensor]:
        """The block's outputs, batch after batch."""
        for hidden, (args, kwargs) in zip(self.hidden, self.others[index], strict=True):
            output = block(hidden, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    def advance(self, index: int, outputs: Iterable[Tensor]) -> None:
        """Replace the activations in front of a block by its outputs, one batch at a time."""
        for number, output in enumerate(outputs):
            self.hidden[number] = output
        self.others[index].clear()


def _passing_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward that computes its first call, and hands its input on in the form of that output later.

    If there is more in the output than the activations, every call is computed.
    """
    rest: tuple[None, ...] | None = None
    passes = False

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal rest, passes
        if passes:
            return hidden if rest is None else (hidden, *rest)
        output = forward(hidden, *args, **kwargs)
        rest = output[1:] if isinstance(output, tuple) else None
        passes = not any(item is not None for item in rest or ())
        return output

    return run


def _shared(new: Any, old: Any) -> Any:
    """`new`, with every tensor that equals the one at its place in `old` taken from there."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(value, old.get(key)) for key, value in new.items()}
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(_shared(a, b) for a, b in zip(new, old, strict=True))
    return new


class _Measured:
    """Measures of a block's linear layers; layers that are called with the same tensor share one."""

    def __init__(self, block: nn.Module, layers: dict[str, nn.Linear], measure: NewMeasure) -> None:
        self.new = measure
        self.measures: dict[str, Measure] = {}
        self.seen: list[tuple[Tensor, Measure]] = []  # of the batch in progress; holding the tensors keeps them apart
        self.sequences: int | None = None  # of the batch in progress, which a layer may see joined to one row of tokens
        self.handles = [layer.register_forward_pre_hook(self._adder(name)) for name, layer in layers.items()]
        self.handles.append(block.register_forward_pre_hook(self._begin, prepend=True))

    def _begin(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.clear()
        self.sequences = args[0].shape[0] if args[0].dim() > 2 else None

    def _adder(self, name: str) -> Callable[..., None]:
        def add(layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            known = next((measure for tensor, measure in self.seen if tensor is x), None)
            measure = self.measures.setdefault(name, known or self.new(layer.in_features, x.device))
            if measure is not known:
                measure.add(x, self.sequences)
                self.seen.append((x, measure))

        return add

    def remove(self) -> None:
        self.seen.clear()
        for handle in self.handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without a key-value cache; afterwards all as it was."""
    training = {name: module.training for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    if cache:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            yield
    finally:
        for name, module in model.named_modules():  # layers that were swapped take over from those they replace
            module.training = training.get(name, False)
        if cache:
            config.use_cache = cache  # type: ignore[union-attr]


@contextmanager
def other_forwards(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Modules with these forwards; afterwards with the one of their class, or that which a host has put into them."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def quantize_blocks_(
    model: nn.Module,
    batches: Iterable[Batch],
    quantise: QuantiseLinear,
    settings: Mapping[str, Any],
    blocks: str | None = None,
    filter_fn: Filter | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    measure: NewMeasure = Hessian,
    parallel: bool = False,
) -> dict[str, float]:
    """Swap the nn.Linear layers of the decoder blocks for what `quantise` makes of them, block by block, in place.

    Args:
        settings: plain data that says what `quantise` does; a folder belongs to one of them.
        model, batches, blocks, filter_fn, folder, progress: as `pb_llm.quantize_` has them.
        measure: of a layer's inputs, which `quantise` gets.
        parallel: let each block see the text as the unquantised blocks before it pass it on.
    Returns:
        The error of every layer that was swapped, by its name.
    Raises:
        ValueError: as `pb_llm.quantize_`.
    """
    prefix, found = decoder_blocks(model, blocks)
    if len({*found}) < len(found):
        raise ValueError(f"quantize_: the blocks must be different modules, {prefix} has one of them more than once")
    layers = [_layers_of(block, f"{prefix}.{index}", filter_fn) for index, block in enumerate(found)]
    if not any(layers):
        raise ValueError("quantize_: the decoder blocks must contain nn.Linear that the filter accepts, got none")
    errors: dict[str, float] = {}
    with evaluating(model):
        calls = _Calls(model, found, batches)
        names = [name for named in layers for name in named]
        kept = None if folder is None else BlocksFolder(folder, {**settings, "layers": names}, calls.digest())
        with tqdm(total=len(names), unit="layer", disable=None if progress else True) as bar:
            for index, block in enumerate(found):
                finished, last = kept is not None and kept.has(index), index == len(found) - 1
                original = "" if kept is None or finished else digest_of(**block.state_dict())
                measured = {} if finished else _measure(block, layers[index], calls, index, measure)
                outputs = list(calls.run(index, block)) if parallel and not last else None
                if kept is not None and finished:
                    done = kept.resume(index, block)
                    bar.update(len(done))
                else:
                    done = _quantize_block_(block, layers[index], measured, quantise, bar)
                    if kept is not None:
                        kept.keep(block, original, done)
                errors.update(done)
                if not last:
                    calls.advance(index, calls.run(index, block) if outputs is None else outputs)
    return errors


def _layers_of(block: nn.Module, prefix: str, filter_fn: Filter | None) -> dict[str, nn.Linear]:
    layers: dict[str, nn.Linear] = {}
    for path, module in block.named_modules():
        name = f"{prefix}.{path}"
        if type(module) is nn.Linear and (filter_fn is None or filter_fn(module, name)):
            try:
                require_bare(module)
            except ValueError as error:
                raise ValueError(f"quantize_: {name}: {error}") from None
            layers[name] = module
    return layers


def _measure(
    block: nn.Module, layers: dict[str, nn.Linear], calls: _Calls, index: int, measure: NewMeasure
) -> dict[str, Measure]:
    if not layers:
        return {}
    measured = _Measured(block, layers, measure)
    try:
        for _ in calls.run(index, block):
            pass
    finally:
        measured.remove()
    return measured.measures


def _quantize_block_(
    block: nn.Module,
    layers: dict[str, nn.Linear],
    measured: dict[str, Measure],
    quantise: QuantiseLinear,
    bar: Any,
) -> dict[str, float]:
    errors: dict[str, float] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if name not in measured:
            raise ValueError(f"quantize_: {name}: the calibration text must reach every layer, it never calls this one")
        try:
            replacements[layer], errors[name] = quantise(layer, measured[name])
        except ValueError as error:
            raise ValueError(f"quantize_: {name}: {error}") from None
        bar.update()
        bar.set_postfix(layer=name, error=f"{errors[name]:.4f}")
    replace_modules(block, replacements)
    return errors
