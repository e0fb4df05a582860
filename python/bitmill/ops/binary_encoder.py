# SPDX-License-Identifier: Apache-2.0
"""Layers of a transformer's encoder in one op, for inference. With a layer's attention A, of which the projections are
part, and its MLP M:

    h = norm(A(x) + x),  y = last_norm(M(h) + h)            as in BERT
    h = A(norm(x)) + x,  y = M(last_norm(h)) + h            norm_first, as in ViT

One op, because between two attentions every row goes its own way: output projection, residual, normalisation, packing,
the same of the MLP, and packing and projections of the layer after it are one pass over the row. It is the composition
of `binary_self_attention`, `layer_norm`, `binary_mlp` and `layer_norm`, and equals them bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library as library
from ._block_arguments import LayerNormArguments, MlpArguments, SelfAttentionArguments
from ._checks import require
from .binary_blocks import _binary_mlp_reference, _binary_self_attention_reference

# A list has an entry for each layer (shift, threshold, weight and weight_nonzero for each of its projections), where an
# empty tensor stands for None, or nothing if all are None. No defaults: every argument is given by the wrapper.
library.define(
    "binary_encoder",
    "(Tensor x, Tensor[] shift, float[] threshold, str levels, Tensor[] weight, Tensor[] weight_nonzero,"
    " Tensor[] positive, Tensor[] negative, Tensor[] single, Tensor? mask, Tensor? lengths, int heads, str rule,"
    " float? scaling, float beta, Tensor[] alpha_q, Tensor[] alpha_k, Tensor[] alpha_a, Tensor[] context_positive,"
    " Tensor[] context_negative, str out_levels, Tensor[] out, Tensor[] out_nonzero, Tensor[] scale, Tensor[] bias,"
    " Tensor[] norm_weight, Tensor[] norm_bias, float[] norm_eps, Tensor[] mlp_shift, float[] mlp_threshold,"
    " str mlp_levels, Tensor[] up, Tensor[] up_nonzero, Tensor[] mlp_positive, Tensor[] mlp_negative,"
    " Tensor[] mlp_single, str inner_levels, Tensor[] down, Tensor[] down_nonzero, Tensor[] mlp_scale,"
    " Tensor[] mlp_bias, Tensor[] last_norm_weight, Tensor[] last_norm_bias, float[] last_norm_eps, bool norm_first)"
    " -> Tensor",
)


class EncoderLayerArguments(NamedTuple):
    """Of a layer of `binary_encoder`."""

    attention: SelfAttentionArguments
    norm: LayerNormArguments
    mlp: MlpArguments
    last_norm: LayerNormArguments

    def shared(self) -> tuple[Any, ...]:
        """What all layers of an encoder have in common, besides mask and lengths."""
        a, mlp = self.attention, self.mlp
        of_attention = (len(a.weight), a.levels, a.heads, a.rule, a.scaling, a.beta, a.out_levels)
        return (*of_attention, mlp.levels, mlp.inner_levels)

    def check(self, op: str, x: Tensor) -> None:
        """Raises ValueError."""
        self.attention.check(op, x, None)
        self.mlp.check(op, x, None, "mlp_")
        for name, scale in (("scale", self.attention.scale), ("mlp_scale", self.mlp.scale)):
            n, k = scale.shape[0], x.shape[-1]
            require(n == k, f"{op}: {name} must have as many rows as x has columns, {k}, got {n}")
        self.norm.check(op, x, "norm_")
        self.last_norm.check(op, x, "last_norm_")


_UNPREFIXED = {"up", "up_nonzero", "inner_levels", "down", "down_nonzero"}
NAMES = (  # of the arguments between x and norm_first
    *SelfAttentionArguments._fields,
    *(f"norm_{name}" for name in LayerNormArguments._fields),
    *(name if name in _UNPREFIXED else f"mlp_{name}" for name in MlpArguments._fields),
    *(f"last_norm_{name}" for name in LayerNormArguments._fields),
)
SHARED = {"levels", "mask", "lengths", "heads", "rule", "scaling", "beta", "out_levels", "mlp_levels", "inner_levels"}
PROJECTED = {"shift", "threshold", "weight", "weight_nonzero"}
OPTIONAL = {
    *("shift", "weight_nonzero", "negative", "single", "alpha_q", "alpha_k", "alpha_a", "context_negative"),
    *("out_nonzero", "bias", "mlp_shift", "up_nonzero", "mlp_negative", "mlp_single", "down_nonzero", "mlp_bias"),
}


def _listed(entries: Sequence[Any]) -> Sequence[Any]:
    some = next((entry for entry in entries if entry is not None), None)
    if some is None:
        return []
    return [some.new_empty(0) if entry is None else entry for entry in entries]


def _arguments(layers: Sequence[EncoderLayerArguments]) -> list[Any]:
    """Those of the op between x and norm_first."""
    projections = len(layers[0].attention.weight)
    of_layers = [tuple(itertools.chain(*layer)) for layer in layers]
    arguments: list[Any] = []
    for name, entries in zip(NAMES, zip(*of_layers, strict=True), strict=True):
        if name in SHARED:
            arguments.append(entries[0])
        elif name in PROJECTED:
            arguments.append(_listed([each for own in entries for each in own or (None,) * projections]))
        else:
            arguments.append(_listed(entries))
    return arguments


def _layers(arguments: Sequence[Any]) -> list[EncoderLayerArguments]:
    """The opposite of `_arguments`."""
    op, named = "binary_encoder", dict(zip(NAMES, arguments, strict=True))
    count, weights = len(named["positive"]), len(named["weight"])
    require(
        count > 0 and weights in (count, 3 * count),
        f"{op}: weight must hold one or three entries for each of the {count} layers, got {weights}",
    )
    of_layers: list[list[Any]] = [[] for _ in range(count)]
    for name, value in named.items():
        each = weights // count if name in PROJECTED else 1
        if name not in SHARED:
            or_none = " or none" if name in OPTIONAL else ""
            require(
                len(value) == each * count or (not value and bool(or_none)),
                f"{op}: {name} must hold {each * count} entries{or_none}, got {len(value)}",
            )
        for i, own in enumerate(of_layers):
            if name in SHARED:
                own.append(value)
            elif name in PROJECTED:
                own.append(value[each * i : each * (i + 1)])
            else:
                absent = not value or (name in OPTIONAL and value[i].numel() == 0)
                own.append(None if absent else value[i])
    return [_layer(iter(own)) for own in of_layers]


def _layer(entries: Iterator[Any]) -> EncoderLayerArguments:
    def part(kind: Any) -> Any:
        return kind(*itertools.islice(entries, len(kind._fields)))

    return EncoderLayerArguments(
        part(SelfAttentionArguments), part(LayerNormArguments), part(MlpArguments), part(LayerNormArguments)
    )


def _checked(x: Tensor, arguments: Sequence[Any]) -> list[EncoderLayerArguments]:
    layers = _layers(arguments)
    for i, layer in enumerate(layers):
        layer.check(f"binary_encoder: layer {i}", x)
    return layers


@library.default("binary_encoder")
def _binary_encoder_reference(x: Tensor, *arguments: Any) -> Tensor:
    *arguments_of_layers, norm_first = arguments
    size = x.shape[-1:]
    for attention, norm, mlp, last_norm in _checked(x, arguments_of_layers):
        if norm_first:
            h = _binary_self_attention_reference(torch.layer_norm(x, size, *norm), x, *attention)
            x = _binary_mlp_reference(torch.layer_norm(h, size, *last_norm), h, *mlp)
        else:
            h = torch.layer_norm(_binary_self_attention_reference(x, x, *attention), size, *norm)
            x = torch.layer_norm(_binary_mlp_reference(h, h, *mlp), size, *last_norm)
    return x


@torch.library.register_fake("bitmill::binary_encoder")
def _(x, *arguments):
    _checked(x, arguments[:-1])
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def binary_encoder(x: Tensor, layers: Sequence[EncoderLayerArguments], norm_first: bool = False) -> Tensor:
    """Layers of bits with their residuals and normalisations, one after another.

    Args:
        x: float32 [sequences, n, k]; with lengths among the arguments of the attention [rows, k].
        layers: at least one, each with
            attention: of a `binary_self_attention` with k outputs,
            norm, last_norm: weight and bias, float32 [k], and epsilon; of the attention's result and the MLP's, or of
                their inputs,
            mlp: of a `binary_mlp` with k outputs.
            Number of weights, levels, heads, rule, scaling and beta are the same in all layers, and the mask and the
            lengths are those of the first.
        norm_first: normalise the inputs, and not the sums.
    Returns:
        float32, x's shape.
    Raises:
        ValueError: as the ops that a layer is made of; without layers; for layers that differ in what must be the same.
    """
    prepared = BinaryEncoder(layers, norm_first)
    return prepared(x, layers[0].attention.mask, layers[0].attention.lengths)


class BinaryEncoder:
    """`binary_encoder` of the same layers in call after call: hundreds of tensors, listed once.

    Args:
        layers, norm_first: as for `binary_encoder`, without mask and lengths.
    Raises:
        ValueError: without layers; for layers that differ in what must be the same.
    """

    def __init__(self, layers: Sequence[EncoderLayerArguments], norm_first: bool = False) -> None:
        require(len(layers) > 0, "binary_encoder: layers must hold at least one layer, got none")
        first = layers[0].shared()
        for i, layer in enumerate(layers):
            require(
                layer.shared() == first,
                f"binary_encoder: layers must have the same number of weights, levels, heads, rule, scaling and beta,"
                f" got {first} and, at {i}, {layer.shared()}; give them to calls of their own",
            )
        arguments, at = _arguments(layers), NAMES.index("mask")
        self._before, self._after = arguments[:at], [*arguments[at + 2 :], norm_first]

    def __call__(self, x: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """The result for x, of the same shape; its mask and its lengths are those of `binary_self_attention`."""
        return torch.ops.bitmill.binary_encoder.default(x, *self._before, mask, lengths, *self._after)
