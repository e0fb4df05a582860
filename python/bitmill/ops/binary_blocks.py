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

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, PACK_REMEDY, check_one_of, check_tensor, require, tile_shape
from .binary_attention import check_mask, check_rule
from .binary_attention_bits import binary_attention_bits
from .binary_bits import BitRanges, binary_matmul_bits, binary_matmul_floats
from .bitpack import LEVELS, bitpack

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
def _binary_mlp_reference(
    x: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    threshold: float,
    levels: str,
    up: Tensor,
    up_nonzero: Tensor | None,
    positive: Tensor,
    negative: Tensor | None,
    single: Tensor | None,
    inner_levels: str,
    down: Tensor,
    down_nonzero: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    _check_mlp(
        x, residual, shift, levels, up, up_nonzero, positive, negative, single, inner_levels, down, down_nonzero, scale,
        bias,
    )  # fmt: skip
    rows = _pack(x, shift, threshold, levels)
    inner = _to_bits(rows, up, up_nonzero, BitRanges(positive, negative, single), x.shape[-1], levels)
    n = positive.shape[-1]
    return binary_matmul_floats(inner[0], down, scale, bias, n, inner[1], down_nonzero, inner_levels, residual)


@library.default("binary_self_attention")
def _binary_self_attention_reference(
    x: Tensor,
    residual: Tensor | None,
    shift: list[Tensor],
    threshold: list[float],
    levels: str,
    weight: list[Tensor],
    weight_nonzero: list[Tensor],
    positive: Tensor,
    negative: Tensor | None,
    single: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    heads: int,
    rule: str,
    scaling: float | None,
    beta: float,
    alpha_q: Tensor | None,
    alpha_k: Tensor | None,
    alpha_a: Tensor | None,
    context_positive: Tensor,
    context_negative: Tensor | None,
    out_levels: str,
    out: Tensor,
    out_nonzero: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    _check_self_attention(
        x, residual, shift, threshold, levels, weight, weight_nonzero, positive, negative, single, mask, lengths, heads,
        rule, scaling, beta, alpha_q, alpha_k, alpha_a, context_positive, context_negative, out_levels, out,
        out_nonzero, scale, bias,
    )  # fmt: skip
    projected: list[Rows] = []
    for i, tiles in enumerate(weight):
        rows = _pack(x, shift[i] if shift else None, threshold[i], levels)
        others = (None if plane is None else plane[i] for plane in (negative, single))
        ranges = BitRanges(positive[i], *others)
        projected.append(_to_bits(rows, tiles, _plane(weight_nonzero, i), ranges, x.shape[-1], levels))
    if len(weight) == 1:
        sign, nonzero = projected[0]
        nonzeros = (None,) * 3 if nonzero is None else nonzero.chunk(3, -1)
        projected = list(zip(sign.chunk(3, -1), nonzeros, strict=True))
    (q, q_nonzero), (k, k_nonzero), (v, v_nonzero) = projected
    context, nonzero = binary_attention_bits(
        q, k, v, context_positive, context_negative, heads, q_nonzero, k_nonzero, v_nonzero, mask, lengths, rule,
        scaling, beta, alpha_q, alpha_k, alpha_a,
    )  # fmt: skip
    zeros = None if context_negative is None else nonzero
    width = context_positive.shape[-1]
    return binary_matmul_floats(context, out, scale, bias, width, zeros, out_nonzero, out_levels, residual)


def _plane(planes: list[Tensor], index: int) -> Tensor | None:
    """One of a list whose empty tensors stand for None, as an empty list does for all."""
    return planes[index] if planes and planes[index].numel() else None


def _check_weight(op: str, name: str, weight: Tensor, nonzero: Tensor | None, n: int, k: int, x: Tensor) -> None:
    check_tensor(op, name, weight, torch.int32, tile_shape(n, k), x, PACK_REMEDY)
    check_tensor(op, f"{name}_nonzero", nonzero, torch.int32, tile_shape(n, k), x)


def _check_ranges(op: str, positive, negative, single, leading: list[int], n: int, x: Tensor, prefix: str = "") -> None:
    check_tensor(op, f"{prefix}positive", positive, torch.int32, [*leading, 2, n], x)
    check_tensor(op, f"{prefix}negative", negative, torch.int32, [*leading, 2, n], x)
    if single is not None:
        require(
            negative is not None and single.dim() == len(leading) + 2,
            f"{op}: single must have shape [{'products, ' if leading else ''}n, count] and goes with negative, got"
            f" {list(single.shape)}" + (" without negative" if negative is None else ""),
        )
        check_tensor(op, "single", single, torch.int32, [*leading, n, single.shape[-1]], x)


def _check_last(
    op: str, x, name: str, weight, nonzero, k: int, levels_name: str, levels, scale, bias, residual
) -> None:
    n = scale.shape[0] if scale.dim() else 0
    _check_weight(op, name, weight, nonzero, n, k, x)
    check_one_of(op, levels_name, levels, LEVELS)
    check_tensor(op, "scale", scale, torch.float32, [n, 1], x)
    check_tensor(op, "bias", bias, torch.float32, [n], x)
    check_tensor(op, "residual", residual, torch.float32, [*x.shape[:-1], n], x)


def _check_input(op: str, x: Tensor, levels: str) -> int:
    check_one_of(op, "levels", levels, LEVELS)
    require(x.dtype == torch.float32, f"{op}: x must be float32, got {str(x.dtype).removeprefix('torch.')}")
    require(x.dim() >= 1, f"{op}: x must have at least one dimension, got a scalar")
    require(x.shape[-1] <= MAX_COLUMNS, f"{op}: x must have at most {MAX_COLUMNS} columns, got {x.shape[-1]}")
    return x.shape[-1]


def _check_mlp(
    x, residual, shift, levels, up, up_nonzero, positive, negative, single, inner_levels, down, down_nonzero, scale,
    bias,
) -> None:  # fmt: skip
    op, inner = "binary_mlp", positive.shape[-1] if positive.dim() else 0
    k = _check_input(op, x, levels)
    check_tensor(op, "shift", shift, torch.float32, [k], x)
    _check_weight(op, "up", up, up_nonzero, inner, k, x)
    _check_ranges(op, positive, negative, single, [], inner, x)
    _check_last(op, x, "down", down, down_nonzero, inner, "inner_levels", inner_levels, scale, bias, residual)


def _check_self_attention(
    x, residual, shift, threshold, levels, weight, weight_nonzero, positive, negative, single, mask, lengths, heads,
    rule, scaling, beta, alpha_q, alpha_k, alpha_a, context_positive, context_negative, out_levels, out, out_nonzero,
    scale, bias,
) -> None:  # fmt: skip
    op, count = "binary_self_attention", len(weight)
    require(heads >= 1, f"{op}: heads must be at least 1, got {heads}")
    require(lengths is None or mask is None, f"{op}: mask and lengths exclude each other, got both")
    shape = "[sequences, n, k]" if lengths is None else "[rows, k] with lengths"
    require(x.dim() == (3 if lengths is None else 2), f"{op}: x must have shape {shape}, got {list(x.shape)}")
    k = _check_input(op, x, levels)
    require(count in (1, 3), f"{op}: weight must hold the weights of one or three layers, got {count}")
    columns, words = positive.shape[-1] if positive.dim() else 0, 32 * heads * (3 if count == 1 else 1)
    require(
        columns > 0 and columns % words == 0,
        f"{op}: positive must be of heads of whole words, a multiple of {words} columns, got {columns}",
    )
    for name, entries, needed in (
        ("shift", shift, False),
        ("threshold", threshold, True),
        ("weight_nonzero", weight_nonzero, False),
    ):
        require(
            len(entries) == count or (not entries and not needed),
            f"{op}: {name} must hold one entry for each of the {count} weights{'' if needed else ' or none'}, got"
            f" {len(entries)}",
        )
    for i, tiles in enumerate(weight):
        _check_weight(op, "weight", tiles, _plane(weight_nonzero, i), columns, k, x)
        check_tensor(op, "shift", shift[i] if shift else None, torch.float32, [k], x)
    width = columns // 3 if count == 1 else columns
    _check_ranges(op, positive, negative, single, [count], columns, x)
    _check_ranges(op, context_positive, context_negative, None, [], width, x, "context_")
    _check_last(op, x, "out", out, out_nonzero, width, "out_levels", out_levels, scale, bias, residual)
    if lengths is not None:
        require(lengths.dim() == 1, f"{op}: lengths must have shape [sequences], got {list(lengths.shape)}")
        check_tensor(op, "lengths", lengths, torch.int64, lengths.shape, x)
    check_rule(op, x, rule, scaling, beta, alpha_q=alpha_q, alpha_k=alpha_k, alpha_a=alpha_a)
    if mask is not None:
        check_mask(op, x, mask, [x.shape[0], heads, x.shape[1], x.shape[1]])


@torch.library.register_fake("bitmill::binary_mlp")
def _(x, residual, shift, threshold, levels, *layers):
    _check_mlp(x, residual, shift, levels, *layers)
    return x.new_empty((*x.shape[:-1], layers[-2].shape[0]))


@torch.library.register_fake("bitmill::binary_self_attention")
def _(x, *others):
    _check_self_attention(x, *others)
    return x.new_empty((*x.shape[:-1], others[-2].shape[0]))


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
        shift, threshold, levels: how x becomes bits in each of the layers, as in `bitpack`; shift may be empty.
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
