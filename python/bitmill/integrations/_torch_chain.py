# SPDX-License-Identifier: Apache-2.0
"""Chains in torch's own Sequential: packed layers with batch normalisations and activation functions between them.

In eval mode a batch normalisation is a function of each output alone, as an activation function is: it becomes part of
the integer ranges of its outputs.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..chain import LayersChain, MlpChain, NotChained
from ..chained import Chained, register_chain
from ..nn import PackedBinaryLinear

NOTHING = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)  # in eval mode
BY_CHANNEL = (nn.BatchNorm1d, nn.PReLU)  # functions of an element and of its place in the second dimension
BY_ELEMENT = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Tanh, nn.Sigmoid),
)


def joins(module: nn.Module) -> bool:
    """Whether a module between two layers is a function of each output alone, in eval mode."""
    if type(module) is nn.BatchNorm1d:
        return module.running_mean is not None  # otherwise it is one of the batch
    return type(module) in (*NOTHING, *BY_CHANNEL, *BY_ELEMENT)


def in_eval_mode(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, NOTHING):
        return x
    if isinstance(module, nn.BatchNorm1d):
        mean, var = module.running_mean, module.running_var
        return nn.functional.batch_norm(x, mean, var, module.weight, module.bias, eps=module.eps)
    return module.forward(x)


def runs_of(modules: tuple[nn.Module, ...]) -> list[tuple[int, int]]:
    """Places of the first and the last of two or more packed layers with nothing but functions between them."""
    runs: list[tuple[int, int]] = []
    first: int | None = None
    for i, module in enumerate(modules):
        if isinstance(module, PackedBinaryLinear):
            if first is None:
                first = i
            elif runs and runs[-1][0] == first:
                runs[-1] = first, i
            else:
                runs.append((first, i))
        elif not joins(module):
            first = None
    return runs


def check(module: Any, outputs: int) -> None:
    """Raises NotChained if a function does not fit the outputs of a layer."""
    kind = type(module).__name__
    if type(module) in BY_CHANNEL:
        width = module.num_features if isinstance(module, nn.BatchNorm1d) else module.num_parameters
        if width != outputs and not (width == 1 and isinstance(module, nn.PReLU)):
            raise NotChained(f"a {kind} of {width} follows a layer of {outputs} outputs")
    for t in itertools.chain(module.parameters(), module.buffers()):
        if t.is_floating_point() and t.dtype != torch.float32:
            raise NotChained(f"a {kind} is {str(t.dtype).removeprefix('torch.')}, not float32")


def chain_of(modules: tuple[Any, ...]) -> nn.Module:
    """Of a run.

    Raises:
        NotChained: if it has none.
    """
    layers: list[PackedBinaryLinear] = []
    between: list[list[Any]] = []
    for module in modules:
        if isinstance(module, PackedBinaryLinear):
            if layers and layers[-1].out_features != module.in_features:
                outputs, inputs = layers[-1].out_features, module.in_features
                raise NotChained(f"a layer of {outputs} outputs is followed by one of {inputs} inputs")
            layers.append(module)
            between.append([])
            continue
        check(module, layers[-1].out_features)
        between[-1].append(module)

    def function(functions: list[Any]) -> Any:
        def f(x: Tensor) -> Tensor:
            for module in functions:
                x = in_eval_mode(module, x)
            return x

        return f

    functions = [function(those) for those in between[:-1]]
    return MlpChain(layers[0], layers[1], functions[0]) if len(layers) == 2 else LayersChain(layers, functions)


class Step(NamedTuple):
    """Modules of a Sequential that follow each other, the place of their chain or None, and whether a function in it is
    one of a channel, which is the last dimension of two alone."""

    modules: tuple[Any, ...]
    chain: int | None = None
    by_channel: bool = False

    def takes(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() >= 1 and (x.dim() == 2 or not self.by_channel)


class SequentialChain(nn.Module):
    """The chains of a Sequential, and the steps that it is made of.

    Args:
        modules: those of the Sequential, which stay the host's.
    Raises:
        NotChained: if a run of layers has no chain.
    """

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.planned, runs, end = modules, runs_of(modules), 0
        self.chains = nn.ModuleList(chain_of(modules[first : last + 1]) for first, last in runs)
        steps: list[Step] = []
        for i, (first, last) in enumerate(runs):
            inside = modules[first : last + 1]
            by_channel = any(isinstance(module, BY_CHANNEL) for module in inside)
            steps += Step(modules[end:first]), Step(inside, i, by_channel)
            end = last + 1
        self.steps = (*steps, Step(modules[end:]))


@register_chain
class ChainedSequential(Chained, nn.Sequential):
    """Keeps its chain beside its modules, whose number and order are the user's."""

    plain = nn.Sequential

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return bool(runs_of(tuple(module)))

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        return SequentialChain(tuple(module))

    @classmethod
    def keep(cls, module: Any, chain: nn.Module) -> None:
        vars(module)["chain"] = chain

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        modules = tuple(module)
        return tuple(inner for first, last in runs_of(modules) for inner in modules[first : last + 1])

    def forward(self, x: Any) -> Any:
        chain = vars(self).get("chain")
        if chain is None or not self._is(chain.planned):  # a slice, or modules were added or taken away
            return self.plain.forward(self, x)
        for step in chain.steps:
            if step.chain is not None and step.takes(x) and self.runs(x):  # which may plan again
                x = self.chain.chains[step.chain](x)
                continue
            for module in step.modules:
                x = module(x)
        return x

    def _is(self, planned: tuple[nn.Module, ...]) -> bool:
        own = self._modules.values()
        return len(own) == len(planned) and all(a is b for a, b in zip(own, planned, strict=True))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if "chain" in vars(self):
            self.chain._apply(fn)
        return super()._apply(fn, recurse)
