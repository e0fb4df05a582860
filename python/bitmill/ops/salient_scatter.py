# SPDX-License-Identifier: Apache-2.0
"""Products with a partially binarised weight (PB-LLM): most weights are a sign, a scattered set keeps more bits.

w[r, c] = salient(r, c) ? value : mu[r, g(c)] + alpha[r, g(c)] b[r, c],  b = +1 where the sign bit is 1, else -1
value   = value_scale[r] (code - value_zero[r]) of a uint8 code, or the float16 itself
salient_linear: y = x w^T + bias, float32 accumulation, one rounding to x's dtype.  salient_weight: w as float32 [n, k].
Arrays (cpp/core/layout.h): weight and mask are tiles of bits (the sign bit is 0 where the mask bit is 1); value holds
one entry a salient weight, row by row, columns ascending; start int32 [n + 1]: row r has value[start[r]:start[r + 1]].
The compiled product never looks at a bit twice (salient slots count as b = -1, which the entries put right):
y = sum_g (alpha_g sum_{c in g} b_c x_c + mu_g sum_{c in g} x_c) + sum_{salient c} x_c (value - (mu_g(c) - alpha_g(c))).
Below the ops: how a dense weight becomes these arrays (PB-LLM, arXiv 2310.00034).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, PACK_REMEDY, check_rows, check_tensor, group_count, require
from ._checks import tile_shape as _tile_shape
from ._groups import columns_of_groups
from .bitpack import tile_unpack

# weight, mask, value, start, alpha, mu, value_scale, value_zero
Arrays = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

library.define(
    "salient_linear",
    "(Tensor x, Tensor weight, Tensor mask, Tensor value, Tensor start, Tensor alpha, Tensor? mu=None,"
    " Tensor? value_scale=None, Tensor? value_zero=None, Tensor? bias=None, int group_size=0) -> Tensor",
)
library.define(
    "salient_weight",
    "(Tensor weight, Tensor mask, Tensor value, Tensor start, Tensor alpha, Tensor? mu, Tensor? value_scale,"
    " Tensor? value_zero, int k, int group_size) -> Tensor",
)


def consistent(signs: Tensor, salient: Tensor, value: Tensor, start: Tensor) -> bool:
    """Whether the arrays agree: `start` rises from 0 to the number of entries, every row has as many salient weights
    as `start` gives it entries, and no salient weight has a sign bit. signs, salient: bool [n, k]."""
    rows = start.long().diff()
    rises = bool(start[0] == 0) and bool(start[-1] == value.shape[0]) and bool((rows >= 0).all())
    return rises and bool((salient.sum(1) == rows).all()) and not bool((signs & salient).any())


def binary_value(plus: Tensor, alpha: Tensor, mu: Tensor | None, group_size: int) -> Tensor:
    """mu + alpha b as float32 [n, k], b = +1 where `plus` [n, k]."""
    k = plus.shape[1]
    scaled = columns_of_groups(alpha, k, group_size) * torch.where(plus, 1.0, -1.0)
    return scaled if mu is None else columns_of_groups(mu, k, group_size) + scaled


def salient_value(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What 8-bit codes [n, k] stand for, with the scale and zero [n] of their row."""
    return scale.unsqueeze(1) * (codes.float() - zero.unsqueeze(1))


def _dequantize(op: str, arrays: Arrays, k: int, group_size: int) -> Tensor:
    weight, mask, value, start, alpha, mu, value_scale, value_zero = arrays
    n = alpha.shape[0]
    signs, salient = tile_unpack(weight, n, k, 1).bool(), tile_unpack(mask, n, k, 1).bool()
    require(consistent(signs, salient, value, start), f"{op}: the packed arrays contradict each other")
    dense = binary_value(signs, alpha, mu, group_size)
    entries = value.float()
    if value_scale is not None and value_zero is not None:
        row = torch.repeat_interleave(start.long().diff())
        entries = value_scale[row] * (entries - value_zero[row])
    return dense.masked_scatter(salient, entries)


@library.default("salient_linear")
def _salient_linear_reference(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    value: Tensor,
    start: Tensor,
    alpha: Tensor,
    mu: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_zero: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    arrays = (weight, mask, value, start, alpha, mu, value_scale, value_zero)
    _check_linear(x, arrays, bias, group_size)
    dense = _dequantize("salient_linear", arrays, x.shape[-1], group_size)
    out = x.float() @ dense.T
    return (out if bias is None else out + bias).to(x.dtype)


@library.default("salient_weight")
def _salient_weight_reference(
    weight: Tensor,
    mask: Tensor,
    value: Tensor,
    start: Tensor,
    alpha: Tensor,
    mu: Tensor | None,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    k: int,
    group_size: int,
) -> Tensor:
    arrays = (weight, mask, value, start, alpha, mu, value_scale, value_zero)
    _check_weight(arrays, k, group_size)
    return _dequantize("salient_weight", arrays, k, group_size)


def _check_arrays(op: str, arrays: Arrays, k: int, group_size: int, like: Tensor) -> int:
    weight, mask, value, start, alpha, mu, value_scale, value_zero = arrays
    groups = group_count(op, k, group_size)
    n = alpha.shape[0] if alpha.dim() else 0
    codes, kind = value.dtype == torch.uint8, str(value.dtype).removeprefix("torch.")
    require(codes or value.dtype == torch.float16, f"{op}: value must be uint8 or float16, got {kind}")
    require(value.dim() == 1, f"{op}: value must have shape [entries], got {list(value.shape)}")
    require(
        codes == (value_scale is not None) and codes == (value_zero is not None),
        f"{op}: value_scale and value_zero must be given for uint8 value and only then, got {kind} value",
    )
    check_tensor(op, "weight", weight, torch.int32, _tile_shape(n, k), like, PACK_REMEDY)
    check_tensor(op, "mask", mask, torch.int32, _tile_shape(n, k), like, PACK_REMEDY)
    check_tensor(op, "value", value, value.dtype, value.shape, like)
    check_tensor(op, "start", start, torch.int32, [n + 1], like)
    check_tensor(op, "alpha", alpha, torch.float32, [n, groups], like)
    check_tensor(op, "mu", mu, torch.float32, [n, groups], like)
    check_tensor(op, "value_scale", value_scale, torch.float32, [n], like)
    check_tensor(op, "value_zero", value_zero, torch.float32, [n], like)
    return n


def _check_linear(x: Tensor, arrays: Arrays, bias: Tensor | None, group_size: int) -> int:
    op = "salient_linear"
    n = _check_arrays(op, arrays, check_rows(op, x), group_size, x)
    check_tensor(op, "bias", bias, torch.float32, [n], x)
    return n


def _check_weight(arrays: Arrays, k: int, group_size: int) -> int:
    op = "salient_weight"
    require(0 <= k <= MAX_COLUMNS, f"{op}: k must be in [0, {MAX_COLUMNS}], got {k}")
    return _check_arrays(op, arrays, k, group_size, arrays[0])


@torch.library.register_fake("bitmill::salient_linear")
def _(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    value: Tensor,
    start: Tensor,
    alpha: Tensor,
    mu: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_zero: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    arrays = (weight, mask, value, start, alpha, mu, value_scale, value_zero)
    return x.new_empty((*x.shape[:-1], _check_linear(x, arrays, bias, group_size)))


@torch.library.register_fake("bitmill::salient_weight")
def _(*arguments: Any) -> Tensor:
    *arrays, k, group_size = arguments
    return arrays[0].new_empty((_check_weight(tuple(arrays), k, group_size), k), dtype=torch.float32)


def _setup_salient_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *arrays, _, ctx.group_size = inputs
    ctx.save_for_backward(*arrays)
    ctx.k, ctx.dtype = x.shape[-1], x.dtype


def _backward_salient_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g = grad.float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.bitmill.salient_weight.default(*ctx.saved_tensors, ctx.k, ctx.group_size)
        grad_x = (g @ dense).to(ctx.dtype)
    if any(ctx.needs_input_grad[9:10]):  # shorter where trailing arguments are the defaults
        grad_bias = g.sum_to_size(g.shape[-1:])
    return grad_x, None, None, None, None, None, None, None, None, grad_bias, None


torch.library.register_autograd(
    "bitmill::salient_linear", _backward_salient_linear, setup_context=_setup_salient_linear
)


def salient_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    value: Tensor,
    start: Tensor,
    alpha: Tensor,
    mu: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_zero: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """A linear layer with a partially binarised weight; formulas and arrays are in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        weight, mask: int32 tiles of n x k bits, from `tile_pack(bits=1)`.
        value: uint8 or float16 [entries].
        start: int32 [n + 1].
        alpha: float32 [n, groups]; groups = 1 for group_size 0, else ceil(k / group_size).
        mu: like alpha, or None for 0.
        value_scale, value_zero: float32 [n], for uint8 values; None for float16.
        bias: float32 [n] or None.
        group_size: columns that share alpha and mu, a multiple of 32; 0: all.
    Returns:
        [..., n] of x's dtype. Gradients flow to x and bias.
    Raises:
        ValueError: for wrong shapes, dtypes or devices, and for arrays that contradict each other.
    """
    return torch.ops.bitmill.salient_linear.default(
        x, weight, mask, value, start, alpha, mu, value_scale, value_zero, bias, group_size
    )


def salient_weight(
    weight: Tensor,
    mask: Tensor,
    value: Tensor,
    start: Tensor,
    alpha: Tensor,
    mu: Tensor | None,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
    k: int,
    group_size: int = 0,
) -> Tensor:
    """The dense float32 weight [n, k]. Arguments and errors as `salient_linear`."""
    return torch.ops.bitmill.salient_weight.default(
        weight, mask, value, start, alpha, mu, value_scale, value_zero, k, group_size
    )


def salient_mask(weight: Tensor, fraction: float) -> Tensor:
    """bool [n, k]: the `fraction` of the whole matrix with the largest |w|.

    PB-LLM's rule: tau is the int((1 - fraction) numel)-th smallest |w|, counted from 0, and |w| <= tau is binarised,
    ties included. 0 makes nothing salient, 1 everything.
    """
    if fraction >= 1 or weight.is_meta:
        return torch.full_like(weight, fraction >= 1, dtype=torch.bool)
    magnitude = weight.detach().float().abs()
    rank = int((1 - fraction) * magnitude.numel())
    if rank >= magnitude.numel():
        return torch.zeros_like(weight, dtype=torch.bool)
    return ~(magnitude <= magnitude.flatten().kthvalue(rank + 1).values)


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


def high_bit_codes(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min/max codes of each row: uint8 [n, k], scale and zero float32 [n]; the range includes 0.

    s = (max - min) / (2^bits - 1), z = round(-min / s), code = clamp(round(w / s) + z); a row of zeros has the
    range [-1, 1]. The order of the float32 operations is that of the published code; ties round to even.
    """
    levels = (1 << bits) - 1
    w = weight.float()
    with_zero = torch.nn.functional.pad(w, (0, 1))
    low, high = with_zero.amin(1), with_zero.amax(1)
    scale = (high - low) / levels
    empty = scale == 0
    low, scale = torch.where(empty, -1.0, low), torch.where(empty, 2 / levels, scale)
    zero = torch.round(-low / scale)
    codes = torch.clamp(torch.round(w / scale.unsqueeze(1)) + zero.unsqueeze(1), 0, levels)
    return codes.to(torch.uint8), scale, zero


def rounded_to_float16(weight: Tensor) -> Tensor:
    """float32 weight rounded to what a float16 can hold, ties to even; magnitudes from 65520 on stay finite.

    Not weight.half().float(): torch.compile leaves such a pair of conversions out.
    """
    w = weight.float()
    power = (w.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power of two up to |w|, or 0
    step = power.clamp_min(2.0**-14) * 2.0**-10
    return torch.round(w / step) * step
