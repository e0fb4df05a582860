# SPDX-License-Identifier: Apache-2.0
"""Whole blocks of a binary transformer in one call each: float32 in and out, bits between.

binary_mlp:            down(f(up(x))) + residual. One op, because each row goes through both products while its bits are
                       in the nearest cache, and because small layers cost less than a call of an op.
binary_self_attention: out(attention(query(x), key(x), value(x))) + residual.

They are compositions of `bitpack`, `binary_matmul_bits`, `binary_attention_bits` and `binary_matmul_floats`, and equal
them bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._block_arguments import MlpArguments, SelfAttentionArguments, entry_of
from .binary_attention_bits import binary_attention_bits
from .binary_bits import BitRanges, binary_matmul_bits, binary_matmul_floats
from .bitpack import bitpack

# No defaults: every argument is given by the wrapper.
library.define(
    "binary_mlp",
    "(Tensor x, Tensor? residual, Tensor? shift, float threshold, str levels, Tensor up, Tensor? up_nonzero,"
    " Tensor positive, Tensor? negative, Tensor? single, str inner_levels, Tensor down, Tensor? down_nonzero,"
    " Tensor scale, Tensor? bias) -> Tensor",
)
library.define(
    "binary_self_attention",
    "(Tensor x, Tensor? residual, Tensor[] shift, float[] threshold, str levels, Tensor[] weight,"
    " Tensor[] weight_nonzero, Tensor positive, Tensor? negative, Tensor? single, Tensor? mask, Tensor? lengths,"
    " int heads, str rule, float? scaling, float beta, Tensor? alpha_q, Tensor? alpha_k, Tensor? alpha_a,"
    " Tensor context_positive, Tensor? context_negative, str out_levels, Tensor out, Tensor? out_nonzero,"
    " Tensor scale, Tensor? bias) -> Tensor",
)


Rows = tuple[Tensor, Tensor | None]  # packed rows: signs, and nonzero bits or None


def _pack(x: Tensor, shift: Tensor | None, threshold: float, levels: str) -> Rows:
    sign, nonzero, _, _ = bitpack(x, shift, levels, threshold)
    return sign, nonzero if levels == "sign" else None


def _to_bits(rows: Rows, weight: Tensor, nonzero: Tensor | None, ranges: BitRanges, k: int, levels: str) -> Rows:
    n = ranges.positive.shape[-1]
    sign, zeros = binary_matmul_bits(rows[0], weight, ranges, n, k, rows[1], nonzero, levels)
    return sign, None if ranges.negative is None else zeros


@library.default("binary_mlp")
def _binary_mlp_reference(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    of = MlpArguments(*arguments)
    of.check("binary_mlp", x, residual)
    rows = _pack(x, of.shift, of.threshold, of.levels)
    ranges = BitRanges(of.positive, of.negative, of.single)
    sign, nonzero = _to_bits(rows, of.up, of.up_nonzero, ranges, x.shape[-1], of.levels)
    n = of.positive.shape[-1]
    return binary_matmul_floats(
        sign, of.down, of.scale, of.bias, n, nonzero, of.down_nonzero, of.inner_levels, residual
    )


@library.default("binary_self_attention")
def _binary_self_attention_reference(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    of = SelfAttentionArguments(*arguments)
    of.check("binary_self_attention", x, residual)
    projected: list[Rows] = []
    for i, tiles in enumerate(of.weight):
        rows = _pack(x, entry_of(of.shift, i), of.threshold[i], of.levels)
        others = (None if plane is None else plane[i] for plane in (of.negative, of.single))
        ranges = BitRanges(of.positive[i], *others)
        projected.append(_to_bits(rows, tiles, entry_of(of.weight_nonzero, i), ranges, x.shape[-1], of.levels))
    if len(of.weight) == 1:
        sign, nonzero = projected[0]
        nonzeros = (None,) * 3 if nonzero is None else nonzero.chunk(3, -1)
        projected = list(zip(sign.chunk(3, -1), nonzeros, strict=True))
    (q, q_nonzero), (k, k_nonzero), (v, v_nonzero) = projected
    context, nonzero = binary_attention_bits(
        q, k, v, of.context_positive, of.context_negative, of.heads, q_nonzero, k_nonzero, v_nonzero, of.mask,
        of.lengths, of.rule, of.scaling, of.beta, of.alpha_q, of.alpha_k, of.alpha_a,
    )  # fmt: skip
    zeros = None if of.context_negative is None else nonzero
    width = of.context_positive.shape[-1]
    return binary_matmul_floats(
        context, of.out, of.scale, of.bias, width, zeros, of.out_nonzero, of.out_levels, residual
    )


@torch.library.register_fake("bitmill::binary_mlp")
def _(x, residual, *arguments):
    of = MlpArguments(*arguments)
    of.check("binary_mlp", x, residual)
    return x.new_empty((*x.shape[:-1], of.scale.shape[0]))


@torch.library.register_fake("bitmill::binary_self_attention")
def _(x, residual, *arguments):
    of = SelfAttentionArguments(*arguments)
    of.check("binary_self_attention", x, residual)
    return x.new_empty((*x.shape[:-1], of.scale.shape[0]))


def binary_mlp(
    x: Tensor,
    up: Tensor,
    ranges: BitRanges,
    down: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    up_nonzero: Tensor | None = None,
    down_nonzero: Tensor | None = None,
    shift: Tensor | None = None,
    threshold: float = 0.0,
    levels: str = "sign",
    inner_levels: str = "sign",
    residual: Tensor | None = None,
) -> Tensor:
    """Two binary layers with bits between, for inference: down(f(up(x))) + residual.

    Args:
        x: float32 [..., k].
        up, up_nonzero: tiles of the first layer's weight [h, k]; None where no weight is 0.
        ranges: what its dot products become in the second layer, from `bit_ranges`; the function f is in there.
        down, down_nonzero: tiles of the second layer's weight [n, h].
        scale, bias: float32 [n, 1] and [n] or None, of the second layer.
        shift, threshold, levels: how x becomes bits, as in `bitpack`.
        inner_levels: those of the second layer's input.
        residual: float32 [..., n] or None, added last in a rounding of its own.
    Returns:
        float32 [..., n].
    Raises:
        ValueError: for wrong shapes, dtypes or levels.
    """
    positive, negative, single = ranges
    return torch.ops.bitmill.binary_mlp.default(
        x, residual, shift, threshold, levels, up, up_nonzero, positive, negative, single, inner_levels, down,
        down_nonzero, scale, bias,
    )  # fmt: skip


def binary_self_attention(
    x: Tensor,
    weight: Sequence[Tensor],
    ranges: BitRanges,
    heads: int,
    context: BitRanges,
    out: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_nonzero: Sequence[Tensor] = (),
    out_nonzero: Tensor | None = None,
    shift: Sequence[Tensor] = (),
    threshold: Sequence[float] = (0.0, 0.0, 0.0),
    levels: str = "sign",
    out_levels: str = "sign",
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    rule: str = "bool",
    scaling: float | None = None,
    beta: float = 0.25,
    alpha_q: Tensor | None = None,
    alpha_k: Tensor | None = None,
    alpha_a: Tensor | None = None,
) -> Tensor:
    """Projections, binary attention and output projection with bits between, for inference.

    Args:
        x: float32 [sequences, n, k]; with `lengths` [rows, k], the sequences one after another.
        weight: tiles of the query's, key's and value's weight [heads * d, k], d a multiple of 32; or of one layer with
            the outputs of all three side by side.
        ranges: what their dot products become as heads, int32: positive and negative [layers, 2, columns], single
            [layers, columns, count]; negative and single may be None, for all layers.
        heads: how many.
        context: ranges of the whole numbers A sgn(v) as the output projection's input, without single ones.
        out, out_nonzero, scale, bias: the output projection, as the second layer of `binary_mlp`.
        weight_nonzero: nothing, or for each weight its tiles of nonzero bits or an empty tensor.
        shift, threshold, levels: how x becomes bits in each of the layers, as in `bitpack`; shift holds nothing, or for
            each layer its shift or an empty tensor.
        out_levels: the levels of the output projection's input.
        residual: float32 of the result's shape or None, added last in a rounding of its own.
        mask, lengths, rule, scaling, beta, alpha_q, alpha_k, alpha_a: those of `binary_attention_bits`.
    Returns:
        float32 [sequences, n, outputs] or [rows, outputs].
    Raises:
        ValueError: for wrong shapes, dtypes, numbers of layers, or names.
    """
    positive, negative, single = ranges
    return torch.ops.bitmill.binary_self_attention.default(
        x, residual, shift, threshold[: len(weight)], levels, weight, weight_nonzero, positive, negative, single, mask,
        lengths, heads, rule, scaling, beta, alpha_q, alpha_k, alpha_a, context.positive, context.negative, out_levels,
        out, out_nonzero, scale, bias,
    )  # fmt: skip
