# SPDX-License-Identifier: Apache-2.0
"""Products with a partially binarised weight (PB-LLM): most weights are a sign, a scattered set keeps more bits.

w[r, c] = salient(r, c) ? value : mu[r, g(c)] + alpha[r, g(c)] b[r, c],  b = +1 where the sign bit is 1, else -1
value   = value_scale[r] (code - value_zero[r]) of a code of 8 or 4 bits, or the float16 itself
salient_linear: y = x w^T + bias, float32 accumulation, one rounding to x's dtype.  salient_weight: w as float32 [n, k].
Arrays (cpp/core/layout.h, _salient_encoding.py): weight holds tiles of sign bits, 0 where a weight is salient; index,
value and start hold the salient weights in one of three encodings, which the shape of index tells:
  bitmap   index int32 tiles of bits, value [entries] row by row, start int32 [n + 1]
  list     index uint8 [steps, 16] gaps between columns, value [steps, 16], start int32 [ceil(n / 16) + 1]
  columns  index int32 [c], value int32 tiles of 4, 8 or 16 bits of the c columns, no start
value is uint8 or float16; of 4-bit codes two share a byte, so a bitmap has [ceil(entries / 2)] and a list [steps, 8].
With activations="int8" (int8.py) x is rounded to scale q first; with codes and one group the compiled sums are
exact integers.
The compiled product never looks at a bit twice (salient slots count as b = -1, which the entries put right):
y = sum_g (alpha_g sum_{c in g} b_c x_c + mu_g sum_{c in g} x_c) + sum_{salient c} x_c (value - (mu_g(c) - alpha_g(c))).
Below the ops: how a dense weight becomes these arrays (PB-LLM, arXiv 2310.00034).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, PACK_REMEDY, check_one_of, check_rows, check_tensor, group_count, require, tile_shape
from ._groups import columns_of_groups
from ._salient_encoding import (
    MAX_LIST_COLUMNS,
    decode,
    encoding_of,
    entries_of,
    index_shape,
    start_length,
    value_dtype,
    value_shape,
)
from .bitpack import tile_unpack
from .int8 import ACTIVATIONS, _int8_quantize_reference

DEFAULT_BITS = 8  # of a code; the dispatcher leaves out an argument that has its default

# weight, index, value, start, alpha, mu, value_scale, value_zero
Arrays = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]

library.define(
    "salient_linear",
    "(Tensor x, Tensor weight, Tensor index, Tensor value, Tensor? start, Tensor alpha, Tensor? mu,"
    " Tensor? value_scale, Tensor? value_zero, Tensor? bias, int group_size, str activations, int code_bits=8)"
    " -> Tensor",
)
library.define(
    "salient_weight",
    "(Tensor weight, Tensor index, Tensor value, Tensor? start, Tensor alpha, Tensor? mu, Tensor? value_scale,"
    " Tensor? value_zero, int k, int group_size, int code_bits=8) -> Tensor",
)


def binary_value(plus: Tensor, alpha: Tensor, mu: Tensor | None, group_size: int) -> Tensor:
    """mu + alpha b as float32 [n, k], b = +1 where `plus` [n, k]."""
    k = plus.shape[1]
    scaled = columns_of_groups(alpha, k, group_size) * torch.where(plus, 1.0, -1.0)
    return scaled if mu is None else columns_of_groups(mu, k, group_size) + scaled


def salient_value(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What 8-bit codes [n, k] stand for, with the scale and zero [n] of their row."""
    return scale.unsqueeze(1) * (codes.float() - zero.unsqueeze(1))


def _dequantize(op: str, arrays: Arrays, k: int, group_size: int, code_bits: int) -> Tensor:
    weight, index, value, start, alpha, mu, value_scale, value_zero = arrays
    n = alpha.shape[0]
    signs = tile_unpack(weight, n, k, 1).bool()
    salient, stored = decode(op, (index, value, start), n, k, code_bits if value_scale is not None else 16)
    require(not bool((signs & salient).any()), f"{op}: the packed arrays contradict each other")
    if value_scale is not None and value_zero is not None:
        stored = salient_value(stored, value_scale, value_zero)
    return torch.where(salient, stored, binary_value(signs, alpha, mu, group_size))


@library.default("salient_linear")
def _salient_linear_reference(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor | None,
    alpha: Tensor,
    mu: Tensor | None,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activations: str,
    code_bits: int = 8,
) -> Tensor:
    arrays = (weight, index, value, start, alpha, mu, value_scale, value_zero)
    _check_linear(x, arrays, bias, group_size, activations, code_bits)
    dense = _dequantize("salient_linear", arrays, x.shape[-1], group_size, code_bits)
    if activations == "int8":
        q, scale = _int8_quantize_reference(x)
        out = (q.float() @ dense.T) * scale.unsqueeze(-1)
    else:
        out = x.float() @ dense.T
    return (out if bias is None else out + bias).to(x.dtype)


@library.default("salient_weight")
def _salient_weight_reference(
    weight: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor | None,
    alpha: Tensor,
    mu: Tensor | None,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    k: int,
    group_size: int,
    code_bits: int = 8,
) -> Tensor:
    arrays = (weight, index, value, start, alpha, mu, value_scale, value_zero)
    _check_weight(arrays, k, group_size, code_bits)
    return _dequantize("salient_weight", arrays, k, group_size, code_bits)


def _check_arrays(op: str, arrays: Arrays, k: int, group_size: int, code_bits: int, like: Tensor) -> int:
    weight, index, value, start, alpha, mu, value_scale, value_zero = arrays
    groups = group_count(op, k, group_size)
    n = alpha.shape[0] if alpha.dim() else 0
    encoding = encoding_of(op, index)
    require(
        encoding != "list" or k <= MAX_LIST_COLUMNS,
        f"{op}: a list must have fewer than 65536 columns, got {k}; use a bitmap",
    )
    require(code_bits in (4, 8), f"{op}: code_bits must be 8 or 4, got {code_bits}")
    bits = code_bits if value_scale is not None else 16
    require((bits != 16) == (value_zero is not None), f"{op}: value_scale and value_zero must be given together")
    entries = entries_of(encoding, index, value, bits)
    require(
        (start is None) == (encoding == "columns"),
        f"{op}: start must be given for a bitmap or a list and only then, got index of shape {list(index.shape)}",
    )
    check_tensor(op, "weight", weight, torch.int32, tile_shape(n, k), like, PACK_REMEDY)
    check_tensor(op, "index", index, index.dtype, index_shape(encoding, n, k, entries), like, PACK_REMEDY)
    check_tensor(op, "value", value, value_dtype(encoding, bits), value_shape(encoding, n, entries, bits), like)
    check_tensor(op, "alpha", alpha, torch.float32, [n, groups], like)
    check_tensor(op, "start", start, torch.int32, [start_length(encoding, n)], like)
    check_tensor(op, "mu", mu, torch.float32, [n, groups], like)
    check_tensor(op, "value_scale", value_scale, torch.float32, [n], like)
    check_tensor(op, "value_zero", value_zero, torch.float32, [n], like)
    return n


def _check_linear(
    x: Tensor, arrays: Arrays, bias: Tensor | None, group_size: int, activations: str, code_bits: int
) -> int:
    op = "salient_linear"
    n = _check_arrays(op, arrays, check_rows(op, x), group_size, code_bits, x)
    check_tensor(op, "bias", bias, torch.float32, [n], x)
    check_one_of(op, "activations", activations, ACTIVATIONS)
    return n


def _check_weight(arrays: Arrays, k: int, group_size: int, code_bits: int) -> int:
    op = "salient_weight"
    require(0 <= k <= MAX_COLUMNS, f"{op}: k must be in [0, {MAX_COLUMNS}], got {k}")
    return _check_arrays(op, arrays, k, group_size, code_bits, arrays[0])


@torch.library.register_fake("bitmill::salient_linear")
def _(x: Tensor, *arguments: Any) -> Tensor:
    arrays, (bias, group_size, activations, *code_bits) = arguments[:8], arguments[8:]
    n = _check_linear(x, arrays, bias, group_size, activations, *(code_bits or [DEFAULT_BITS]))
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("bitmill::salient_weight")
def _(*arguments: Any) -> Tensor:
    arrays, (k, group_size, *code_bits) = arguments[:8], arguments[8:]
    n = _check_weight(arrays, k, group_size, *(code_bits or [DEFAULT_BITS]))
    return arrays[0].new_empty((n, k), dtype=torch.float32)


def _setup_salient_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, arrays, (_, ctx.group_size, _, ctx.code_bits) = inputs[0], inputs[1:9], inputs[9:]
    ctx.save_for_backward(*arrays)
    ctx.k, ctx.dtype = x.shape[-1], x.dtype


def _backward_salient_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The rounding of int8 activations has the straight-through identity gradient."""
    g = grad.float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.bitmill.salient_weight.default(*ctx.saved_tensors, ctx.k, ctx.group_size, ctx.code_bits)
        with library.without_autocast(g):
            grad_x = (g @ dense).to(ctx.dtype)
    if ctx.needs_input_grad[9]:
        grad_bias = g.sum_to_size(g.shape[-1:])
    return grad_x, None, None, None, None, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd(
    "bitmill::salient_linear", _backward_salient_linear, setup_context=_setup_salient_linear
)


def salient_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor | None,
    alpha: Tensor,
    mu: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_zero: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
    activations: str = "float",
    code_bits: int = 8,
) -> Tensor:
    """A linear layer with a partially binarised weight; formulas and arrays are in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        weight: int32 tiles of n x k sign bits, from `tile_pack(bits=1)`.
        index, value, start: the salient weights in one of the encodings.
        alpha: float32 [n, groups]; groups = 1 for group_size 0, else ceil(k / group_size).
        mu: like alpha, or None for 0.
        value_scale, value_zero: float32 [n], for codes; None for float16.
        bias: float32 [n] or None.
        group_size: columns that share alpha and mu, a multiple of 32; 0: all.
        activations: "float", or "int8" to round every row of x to int8 with a scale of its own.
        code_bits: of a code, 8 or 4.
    Returns:
        [..., n] of x's dtype. Gradients flow to x (straight through the rounding) and bias.
    Raises:
        ValueError: for wrong shapes, dtypes or devices, and for `start` or columns that contradict the other arrays.
            Bits that do are found by `salient_weight` and by a call without rows; other calls then give a wrong result,
            but read nothing outside the arrays.
    """
    return torch.ops.bitmill.salient_linear.default(
        x, weight, index, value, start, alpha, mu, value_scale, value_zero, bias, group_size, activations, code_bits
    )


def salient_weight(
    weight: Tensor,
    index: Tensor,
    value: Tensor,
    start: Tensor | None,
    alpha: Tensor,
    mu: Tensor | None,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    k: int,
    group_size: int = 0,
    code_bits: int = 8,
) -> Tensor:
    """The dense float32 weight [n, k]. Arguments as `salient_linear`; any arrays that contradict each other raise."""
    return torch.ops.bitmill.salient_weight.default(
        weight, index, value, start, alpha, mu, value_scale, value_zero, k, group_size, code_bits
    )


def salient_columns(weight: Tensor, fraction: float) -> Tensor:
    """bool [n, k]: the round(fraction k) whole columns with the largest sum of |w|; the first ones of equals."""
    n, k = weight.shape
    magnitude = weight.detach().float().abs().sum(0)
    chosen = magnitude.argsort(descending=True, stable=True)[: round(fraction * k)]
    columns = torch.zeros(k, dtype=torch.bool, device=weight.device).index_fill(0, chosen, True)
    return columns.expand(n, k).clone()


def salient_mask(weight: Tensor, fraction: float, group_size: int = 0) -> Tensor:
    """bool [n, k]: the `fraction` with the largest |w| of the whole matrix, or of each group of columns, all rows.

    PB-LLM's rule: tau is the int((1 - fraction) numel)-th smallest |w|, counted from 0, and |w| <= tau is binarised,
    ties included. 0 makes nothing salient, 1 everything.
    """
    if group_size:
        return torch.cat([salient_mask(part, fraction) for part in weight.split(group_size, 1)], 1)
    if fraction >= 1 or weight.is_meta:
        return torch.full_like(weight, fraction >= 1, dtype=torch.bool)
    magnitude = weight.detach().float().abs()
    rank = int((1 - fraction) * magnitude.numel())
    if rank >= magnitude.numel():
        return torch.zeros_like(weight, dtype=torch.bool)
    return ~(magnitude <= magnitude.flatten().kthvalue(rank + 1).values)


def salient_quantiles(weight: Tensor, fraction: float) -> Tensor:
    """bool [n, k]: the smallest and the largest weights of the whole matrix, half of the `fraction` from either end.

    The rule of PB-LLM's training code: w below the int(numel fraction / 2)-th or above the int(numel (1 - fraction /
    2))-th smallest value, both counted from 1, is salient; ties are not.
    """
    if weight.is_meta or weight.numel() == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    w = weight.detach().float()
    low, high = int(w.numel() * fraction / 2), int(w.numel() * (1 - fraction / 2))
    salient = torch.zeros_like(w, dtype=torch.bool)
    if low > 0:
        salient |= w < w.flatten().kthvalue(low).values
    if high > 0:
        salient |= w > w.flatten().kthvalue(high).values
    return salient


def binary_statistics(
    weight: Tensor, mask: Tensor, group_size: int = 0, scale: str = "unbiased", centre: bool = True
) -> tuple[Tensor, Tensor | None]:
    """alpha and mu (None without `centre`), float32 [n, groups], of the weights [n, k] that `mask` does not mark.

    "unbiased": mu is the mean of the binarised weights of the row group and alpha the mean of |w - mu| over them.
    "official": both divide by the group's width, and a salient slot counts as a weight 0, as in the published code.
    An empty group has alpha = mu = 0.
    """
    n, k = weight.shape
    width = group_size or max(k, 1)
    groups = group_count("binary_statistics", k, group_size)

    def grouped(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, groups * width - k)).reshape(n, groups, width)

    counted = grouped(~mask if scale == "unbiased" else torch.ones_like(mask))
    values = grouped(torch.where(mask, 0.0, weight.float()))
    count = counted.sum(2).clamp_min(1)
    if not centre:
        return values.abs().sum(2) / count, None
    mu = values.sum(2) / count
    return torch.where(counted, values - mu.unsqueeze(2), 0.0).abs().sum(2) / count, mu


def high_bit_scales(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Asymmetric min/max scale and zero, float32 [n], of each row; the range includes 0.

    s = (max - min) / (2^bits - 1), z = round(-min / s); a row of zeros has the range [-1, 1]. The order of the float32
    operations is that of the published code.
    """
    levels = (1 << bits) - 1
    w = weight.float()
    with_zero = torch.nn.functional.pad(w, (0, 1))
    low, high = with_zero.amin(1), with_zero.amax(1)
    scale = (high - low) / levels
    empty = scale == 0
    low, scale = torch.where(empty, -1.0, low), torch.where(empty, 2 / levels, scale)
    return scale, torch.round(-low / scale)


def high_bit_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int = 8) -> Tensor:
    """uint8 [n, k]: clamp(round(w / s) + z, 0, 2^bits - 1) with the scale and zero of each row; ties round to even."""
    codes = torch.round(weight.float() / scale.unsqueeze(1)) + zero.unsqueeze(1)
    return codes.clamp(0, (1 << bits) - 1).to(torch.uint8)


def rounded_to_float16(weight: Tensor) -> Tensor:
    """float32 weight rounded to what a float16 can hold, ties to even; magnitudes from 65520 on stay finite.

    Not weight.half().float(): torch.compile leaves such a pair of conversions out.
    """
    w = weight.float()
    power = (w.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power of two up to |w|, or 0
    step = power.clamp_min(2.0**-14) * 2.0**-10
    return torch.round(w / step) * step
