# SPDX-License-Identifier: Apache-2.0
"""LLM-FP4 after training: weights and activations of a transformer in 4-bit floats, from a little calibration text.

Every linear layer gets the formats and scales that keep its output best (`recipes.fpq_search`): a scale for every row
of the weight, one for its activations, and, pre-shifted, a power of two for every input channel, which lets channels of
very different magnitude share one scale. A packed layer multiplies integers with integers (`ops.fp4_fp4_linear`), where
the published code multiplies floats that were rounded. Biases, embeddings, output head and normalisations stay as they
are, and so do the products inside attention.

Source: Liu et al., LLM-FP4: 4-Bit Floating-Point Quantized Transformers, EMNLP 2023 (arXiv 2310.16836).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..config import FP4Config
from ..convert import Filter
from ..nn import FP4Linear, PackedFP4Linear
from ..nn._module import require_finite
from ..ops.fp4 import unpack_nibbles
from . import layerwise
from .fpq_search import Found, Search, search_layer

TOKENS = 32


class Inputs:
    """Inputs of a layer: the largest magnitude of every channel, float32 [k], and some tokens.

    Args:
        tokens: the most to keep of a batch, evenly spread; None for all.
    """

    def __init__(self, k: int, device: torch.device | str | None = None, tokens: int | None = TOKENS) -> None:
        self.amax = torch.zeros(k, device=device)
        self.tokens = tokens
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def add(self, x: Tensor, sequences: int | None = None) -> None:
        """Add inputs [..., k] of any float dtype."""
        rows = x.reshape(-1, self.amax.numel()).float()
        if not len(rows):
            return
        self.amax = torch.maximum(self.amax, rows.abs().amax(0))
        count = len(rows) if self.tokens is None else min(self.tokens, len(rows))
        self.kept.append(rows[torch.arange(count, device=rows.device) * len(rows) // count].clone())

    @property
    def rows(self) -> Tensor:
        """float32 [tokens, k]."""
        return torch.cat(self.kept) if self.kept else self.amax.new_zeros(0, self.amax.numel())


def pack_linear(linear: nn.Linear, found: Found, activations: str = "fp4") -> PackedFP4Linear:
    """The packed layer that takes the place of `linear`; its weight is exactly the one that was found."""
    weight, activation = found.weight, found.activation
    scale = shift = None
    if activation is not None:
        activations, scale = activation.format, activation.scale
        shift = activation.shift
        if shift is None:
            shift = torch.zeros(linear.in_features, dtype=torch.uint8, device=scale.device)
    codes = unpack_nibbles(weight.codes(linear.weight.detach().float()), linear.in_features)
    config = FP4Config(weight.format, activations=activations)
    packed = PackedFP4Linear.from_parts(codes, weight.scale, linear.bias, config, None, scale, shift)
    return packed.train(linear.training)


def quantize_(
    model: nn.Module,
    batches: Iterable[layerwise.Batch],
    search: Search | None = None,
    tokens: int | None = TOKENS,
    parallel: bool = False,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Cast and pack the nn.Linear layers of a model's blocks, in place, block by block.

    Args:
        search: what is searched, and how; the published method is Search(search="paper") with parallel=True and
            tokens=None, on 32 sequences of 1024 tokens.
        tokens: the most of a batch that the search looks at, evenly spread; None for all. The largest magnitudes are
            those of all.
        parallel: let each block see the text as the unquantised blocks pass it on, as published; else as the quantised
            ones before it do.
        model, batches, blocks, filter_fn, folder, progress: as `pb_llm.quantize_` has them. Encoders of texts and of
            images are such models too; a batch is a tensor or a dict of keyword arguments.
    Returns:
        For every layer that was swapped |X W^T - X^ W^^T| / |X W^T| on the tokens that were looked at.
    Raises:
        ValueError: as `pb_llm.quantize_`, or for activations that are not finite.
    """
    chosen = search or Search()
    if tokens is not None and tokens < 1:
        raise ValueError(f"quantize_: tokens must be None or at least 1, got {tokens}")

    def quantise(linear: nn.Linear, inputs: Inputs) -> tuple[nn.Module, float]:
        require_finite("quantize_", linear.weight)
        found = search_layer(linear.weight, inputs.rows, inputs.amax, chosen)
        return pack_linear(linear, found, chosen.activations), found.error

    def measure(k: int, device: torch.device) -> Inputs:
        return Inputs(k, device, tokens)

    settings = {**dataclasses.asdict(chosen), "method": "llm-fp4", "tokens": tokens, "parallel": parallel}
    settings |= {key: list(value) for key, value in settings.items() if isinstance(value, tuple)}
    return layerwise.quantize_blocks_(
        model, batches, quantise, settings, blocks, filter_fn, folder, progress, measure, parallel
    )


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable[layerwise.Batch]) -> list[str]:
    """Set the scales of static activations of all `FP4Linear` of a model, from what they see, without a search.

    For training: `quantize_(model, FP4Config(activations="e2m1"))` of bitmill, this, then train. They are those of
    the model in float.

    Args:
        model: with FP4Linear layers whose activations are "e2m1", "e1m2" or "e3m0".
        batches: tensors or dicts of keyword arguments.
    Returns:
        The names of the layers.
    Raises:
        ValueError: if there is no such layer, no batch, one that is never called, or inputs that are not finite.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FP4Linear) and module.config.static_activations
    }
    if not layers:
        raise ValueError("calibrate_: the model must have FP4Linear layers with static activations, got none")
    seen = {name: Inputs(layer.in_features, layer.weight.device, 1) for name, layer in layers.items()}

    def watch(name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            seen[name].add(x)
            return nn.functional.linear(x, layers[name].weight.to(x.dtype), layers[name].bias)

        return forward

    watched = {layer: watch(name) for name, layer in layers.items()}
    with layerwise.evaluating(model), layerwise.other_forwards(watched):
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    for name, layer in layers.items():
        if not seen[name].kept:
            raise ValueError(f"calibrate_: {name}: the batches must reach every layer, they never call this one")
        try:
            layer.calibrate(seen[name].amax)
        except ValueError as error:
            raise ValueError(f"calibrate_: {name}: {error}") from None
    return list(layers)
