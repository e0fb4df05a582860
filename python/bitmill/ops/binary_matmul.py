# SPDX-License-Identifier: Apache-2.0
"""Products with a 1-bit weight: bits x bits to exact integers, bits x bits to floats, floats x bits to floats.

binary_matmul:        dot[.., o] = sum_k a[.., k] w[o, k], exact int32; a in {-1, 0, +1} or {0, 1}, w in {-1, 0, +1}.
binary_linear:        a = levels(x + shift), "bool" above alpha / 2;  y = fl(fl(scale * dot) + bias), two roundings in
                      float32 on every backend, then one to x's dtype; groups of columns are added first to last;
                      with row_scale the scale is fl(scale * mean |x + shift|) of the row (XNOR-Net).
binary_weight_linear: y = sum_g scale[o, g] sum_{k in g} x[.., k] w[o, k] + bias, float32 accumulation; with
                      activations="int8" (int8.py) exact integers, and y as for binary_linear with the row's scale.
Weights are tiles of bits (bitpack.py), with a second plane of nonzero bits where a weight can be 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, PACK_REMEDY, ceil_div, check_one_of, check_rows, check_tensor, group_count, require
from ._checks import tile_shape as _tile_shape
from ._groups import columns_of_groups
from ._surrogates import SURROGATES, surrogate_slope
from .bitpack import LEVELS, _unpack_bits, binarized, mean_by_halves, tile_unpack
from .int8 import ACTIVATIONS, _int8_quantize_reference, int8_fake_quant

library.define(
    "binary_matmul",
    "(Tensor a, Tensor weight, int n, int k, Tensor? a_nonzero=None, Tensor? weight_nonzero=None,"
    ' str levels="sign") -> Tensor',
)
# No defaults where there is a gradient: torch drops trailing defaults before it calls the backward.
library.define(
    "binary_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? weight_nonzero, Tensor? shift, Tensor? alpha,"
    " str levels, bool row_scale, int group_size, str surrogate) -> Tensor",
)
library.define(
    "binary_weight_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? weight_nonzero, int group_size, str activations)"
    " -> Tensor",
)


def unpack_signs(weight: Tensor, weight_nonzero: Tensor | None, n: int, k: int) -> Tensor:
    """Weight tiles to float32 [n, k] of -1, 0, +1."""
    signs = tile_unpack(weight, n, k, 1).float().mul_(2).sub_(1)
    return signs if weight_nonzero is None else signs.mul_(tile_unpack(weight_nonzero, n, k, 1))


def scaled_signs(weight: Tensor, weight_nonzero: Tensor | None, scale: Tensor, k: int, group_size: int) -> Tensor:
    """Weight tiles to float32 [n, k] of signs times the scale [n, groups] of their columns."""
    return unpack_signs(weight, weight_nonzero, scale.shape[0], k).mul_(columns_of_groups(scale, k, group_size))


def _group_dots(a: Tensor, signs: Tensor, group_size: int) -> list[Tensor]:
    """Integers as float32, one [..., n] a group of columns; exact while every partial sum is below 2^24.

    Larger sums need a in float64, and are rounded once.
    """
    k = signs.shape[1]
    width, signs = group_size or max(k, 1), signs.to(a.dtype)
    return [(a[..., i : i + width] @ signs[:, i : i + width].T).float() for i in range(0, k, width)]


def int8_levels(q: Tensor) -> Tensor:
    """int8 [..., k] in the dtype that keeps every sum of its products with signs exact."""
    return q.float() if 127 * q.shape[-1] < 1 << 24 else q.double()


def canonical_linear(
    level: Tensor, signs: Tensor, scale: Tensor, rows: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """fl(fl(scale * dot) + bias) in float32 from levels [..., k] and signs [n, k]: the one definition of the result.

    scale is [n, groups], rows [..., 1] or None multiplies it; groups are added first to last.
    """
    out = scale.new_zeros((*level.shape[:-1], signs.shape[0]))
    for group, dot in enumerate(_group_dots(level, signs, group_size)):
        dot = dot + 0.0  # an integer has no -0, but a product of floats may answer it
        factor = scale[:, group] if rows is None else scale[:, group] * rows
        out = factor * dot if group == 0 else out + factor * dot
    return out if bias is None else out + bias


@library.default("binary_matmul")
def _binary_matmul_reference(
    a: Tensor,
    weight: Tensor,
    n: int,
    k: int,
    a_nonzero: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    levels: str = "sign",
) -> Tensor:
    _check_binary_matmul(a, weight, n, k, a_nonzero, weight_nonzero, levels)
    values = _unpack_bits(a, k).float()
    if levels != "bool":
        values = values * 2 - 1
    if a_nonzero is not None:
        values = values * _unpack_bits(a_nonzero, k)
    return (values @ unpack_signs(weight, weight_nonzero, n, k).T).to(torch.int32)


@library.default("binary_linear")
def _binary_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_nonzero: Tensor | None,
    shift: Tensor | None,
    alpha: Tensor | None,
    levels: str,
    row_scale: bool,
    group_size: int,
    surrogate: str,
) -> Tensor:
    _check_binary_linear(x, weight, scale, bias, weight_nonzero, shift, alpha, levels, group_size, surrogate)
    rows = None
    if row_scale:
        rows = mean_by_halves((x.float() if shift is None else x.float() + shift).abs()).unsqueeze(-1)
    level = binarized(x, shift, levels, 0.5 if alpha is None else alpha / 2)
    signs = unpack_signs(weight, weight_nonzero, scale.shape[0], x.shape[-1])
    return canonical_linear(level, signs, scale, rows, bias, group_size).to(x.dtype)


@library.default("binary_weight_linear")
def _binary_weight_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_nonzero: Tensor | None,
    group_size: int,
    activations: str,
) -> Tensor:
    _check_binary_weight_linear(x, weight, scale, bias, weight_nonzero, group_size, activations)
    n, k = scale.shape[0], x.shape[-1]
    signs = unpack_signs(weight, weight_nonzero, n, k)
    if activations == "int8":
        q, rows = _int8_quantize_reference(x)
        return canonical_linear(int8_levels(q), signs, scale, rows.unsqueeze(-1), bias, group_size).to(x.dtype)
    out = x.new_zeros((*x.shape[:-1], n), dtype=torch.float32)
    for group, total in enumerate(_group_dots(x.float(), signs, group_size)):
        out = out + scale[:, group] * total
    return (out if bias is None else out + bias).to(x.dtype)


def _check_binary_matmul(a, weight, n, k, a_nonzero, weight_nonzero, levels, op="binary_matmul") -> None:
    check_one_of(op, "levels", levels, LEVELS)
    require(
        n >= 0 and 0 <= k <= MAX_COLUMNS,
        f"{op}: n must be at least 0 and k between 0 and 16777216, got n = {n}, k = {k}",
    )
    require(a_nonzero is None or levels == "sign", f'{op}: a_nonzero goes with levels="sign" only, got "{levels}"')
    require(a.dim() >= 1, f"{op}: a must have at least one dimension, got a scalar")
    check_tensor(op, "a", a, torch.int32, [*a.shape[:-1], ceil_div(k, 32)], a)
    check_tensor(op, "a_nonzero", a_nonzero, torch.int32, a.shape, a)
    check_tensor(op, "weight", weight, torch.int32, _tile_shape(n, k), a, PACK_REMEDY)
    check_tensor(op, "weight_nonzero", weight_nonzero, torch.int32, _tile_shape(n, k), a)


def _check_weight(op, x, weight, scale, bias, weight_nonzero, group_size) -> None:
    k = check_rows(op, x)
    groups = group_count(op, k, group_size)
    n = scale.shape[0] if scale.dim() else 0
    check_tensor(op, "scale", scale, torch.float32, [n, groups], x)
    check_tensor(op, "weight", weight, torch.int32, _tile_shape(n, k), x, PACK_REMEDY)
    check_tensor(op, "weight_nonzero", weight_nonzero, torch.int32, _tile_shape(n, k), x)
    check_tensor(op, "bias", bias, torch.float32, [n], x)


def _check_binary_linear(x, weight, scale, bias, weight_nonzero, shift, alpha, levels, group_size, surrogate) -> None:
    op = "binary_linear"
    check_one_of(op, "levels", levels, LEVELS)
    check_one_of(op, "surrogate", surrogate, SURROGATES)
    check_tensor(op, "alpha", alpha, torch.float32, [], x)
    _check_weight(op, x, weight, scale, bias, weight_nonzero, group_size)
    check_tensor(op, "shift", shift, torch.float32, [x.shape[-1]], x)


def _check_binary_weight_linear(x, weight, scale, bias, weight_nonzero, group_size, activations) -> None:
    check_one_of("binary_weight_linear", "activations", activations, ACTIVATIONS)
    _check_weight("binary_weight_linear", x, weight, scale, bias, weight_nonzero, group_size)


@torch.library.register_fake("bitmill::binary_matmul")
def _(a, weight, n, k, a_nonzero=None, weight_nonzero=None, levels="sign"):
    _check_binary_matmul(a, weight, n, k, a_nonzero, weight_nonzero, levels)
    return a.new_empty((*a.shape[:-1], n), dtype=torch.int32)


@torch.library.register_fake("bitmill::binary_linear")
def _(x, weight, scale, bias, weight_nonzero, shift, alpha, levels, row_scale, group_size, surrogate):
    _check_binary_linear(x, weight, scale, bias, weight_nonzero, shift, alpha, levels, group_size, surrogate)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.register_fake("bitmill::binary_weight_linear")
def _(x, weight, scale, bias, weight_nonzero, group_size, activations):
    _check_binary_weight_linear(x, weight, scale, bias, weight_nonzero, group_size, activations)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _setup_binary_linear(ctx, inputs, output) -> None:
    x, weight, scale, _, weight_nonzero, shift, alpha, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, scale, weight_nonzero, shift, alpha)


def _backward_binary_linear(ctx, grad):
    x, weight, scale, weight_nonzero, shift, alpha = ctx.saved_tensors
    levels, row_scale, group_size, surrogate = ctx.settings
    need_x, _, need_scale, need_bias, _, need_shift = ctx.needs_input_grad[:6]
    g = grad.float()
    z = x.float() if shift is None else x.float() + shift
    g_rows = g * z.abs().mean(-1, keepdim=True) if row_scale else g
    grad_x = grad_scale = grad_shift = None
    if need_x or need_shift:
        signs = scaled_signs(weight, weight_nonzero, scale, x.shape[-1], group_size)
        u = z if alpha is None else z / alpha
        with library.without_autocast(x):
            grad_z = (g_rows @ signs) * surrogate_slope(u, surrogate)
        if alpha is not None:
            grad_z = grad_z / alpha
        grad_x = grad_z.to(x.dtype)
        grad_shift = grad_z.sum_to_size(shift.shape) if need_shift else None
    if need_scale:
        level = binarized(x, shift, levels, 0.5 if alpha is None else alpha / 2)
        grad_scale = _scale_gradient(g_rows, level, weight, weight_nonzero, scale, group_size)
    grad_bias = g.sum_to_size(g.shape[-1:]) if need_bias else None
    return grad_x, None, grad_scale, grad_bias, None, grad_shift, None, None, None, None, None


def _scale_gradient(g, x, weight, weight_nonzero, scale, group_size) -> Tensor:
    signs = unpack_signs(weight, weight_nonzero, scale.shape[0], x.shape[-1])
    with library.without_autocast(x):
        totals = _group_dots(x, signs, group_size)
    sums = [(g * total).sum_to_size(g.shape[-1:]) for total in totals]
    return torch.stack(sums, 1) if sums else torch.zeros_like(scale)


torch.library.register_autograd("bitmill::binary_linear", _backward_binary_linear, setup_context=_setup_binary_linear)


def _setup_binary_weight_linear(ctx, inputs, output) -> None:
    x, weight, scale, _, weight_nonzero, ctx.group_size, ctx.activations = inputs
    ctx.save_for_backward(x, weight, scale, weight_nonzero)


def _backward_binary_weight_linear(ctx, grad):
    x, weight, scale, weight_nonzero = ctx.saved_tensors
    need_x, _, need_scale, need_bias = ctx.needs_input_grad[:4]
    g = grad.float()
    grad_x = grad_scale = None
    if need_x:
        signs = scaled_signs(weight, weight_nonzero, scale, x.shape[-1], ctx.group_size)
        with library.without_autocast(x):
            grad_x = (g @ signs).to(x.dtype)
    if need_scale:
        values = x.float() if ctx.activations == "float" else int8_fake_quant(x.float())
        grad_scale = _scale_gradient(g, values, weight, weight_nonzero, scale, ctx.group_size)
    grad_bias = g.sum_to_size(g.shape[-1:]) if need_bias else None
    return grad_x, None, grad_scale, grad_bias, None, None, None


torch.library.register_autograd(
    "bitmill::binary_weight_linear", _backward_binary_weight_linear, setup_context=_setup_binary_weight_linear
)


def binary_matmul(
    a: Tensor,
    weight: Tensor,
    n: int,
    k: int,
    a_nonzero: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    levels: str = "sign",
) -> Tensor:
    """Exact integer products of packed rows with packed weights.

    Args:
        a: int32 [..., ceil(k / 32)], from `bitpack`.
        weight: int32 tiles of n x k bits, from `tile_pack(bits=1)`.
        n, k: the true sizes.
        a_nonzero: like `a`; makes the activations ternary (levels "sign" only).
        weight_nonzero: tiles; makes the weights ternary.
        levels: "sign" or "plus" for {-1, +1} activations, "bool" for {0, 1}.
    Returns:
        int32 [..., n].
    Raises:
        ValueError: for wrong shapes, dtypes or levels.
    """
    return torch.ops.bitmill.binary_matmul.default(a, weight, n, k, a_nonzero, weight_nonzero, levels)


def binary_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    shift: Tensor | None = None,
    alpha: Tensor | None = None,
    levels: str = "sign",
    row_scale: bool = False,
    group_size: int = 0,
    surrogate: str = "clip",
) -> Tensor:
    """A linear layer with 1-bit activations and weights, packing of x included; the formula is in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        weight, weight_nonzero: tiles of n x k bits.
        scale: float32 [n, groups]; groups = 1 for group_size 0, else ceil(k / group_size).
        bias: float32 [n] or None.
        shift: float32 [k] or None.
        alpha: float32 scalar tensor or None for 1: the step of the activation, already multiplied into `scale`. It sets
            the threshold alpha / 2 of levels "bool" and the window of the surrogate.
        levels: as in `bitpack`.
        row_scale: multiply by mean |x + shift| of the row.
        surrogate: the backward only: the level's derivative is surrogate_slope(z / alpha) / alpha.
    Returns:
        [..., n] of x's dtype. Gradients flow to x, scale, bias and shift.
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names.
    """
    check_one_of("binary_linear", "surrogate", surrogate, SURROGATES)  # the compiled kernel has no use for it
    return torch.ops.bitmill.binary_linear.default(
        x, weight, scale, bias, weight_nonzero, shift, alpha, levels, row_scale, group_size, surrogate
    )


def binary_weight_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    group_size: int = 0,
    activations: str = "float",
) -> Tensor:
    """A linear layer with 1-bit weights and float or int8 activations.

    Args:
        activations: "float" multiplies x as it is; "int8" rounds every row to int8 first (`int8_quantize`), which is
            faster from a few rows on; its gradient is the straight-through identity.
    The other arguments, the result and the errors are those of `binary_linear`.
    """
    return torch.ops.bitmill.binary_weight_linear.default(
        x, weight, scale, bias, weight_nonzero, group_size, activations
    )
