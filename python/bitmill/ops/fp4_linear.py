# SPDX-License-Identifier: Apache-2.0
"""A linear layer with an FP4 weight and float or int8 activations, and the weight that it stands for.

fp4_weight: w[o, j] = scale[o, j / group_size] table[code[o, j]], float32; table is the format's (fp4.py) or a codebook.
With a global_scale the byte's value is the scale here, and the product is multiplied with global_scale.
fp4_linear: y = sum_g scale[o, g] sum_{j in g} table[code[o, j]] x[.., j] + bias, float32 accumulation.
The weight is tiles of codes, tile_pack(codes, 4); a scale is float32, E8M0 bytes, or E4M3 bytes times global_scale.
CPUs that multiply bfloat16 do so with bfloat16 activations, and take subnormal ones as 0; the products are exact.
With activations="int8" rows are rounded first, q and row_scale of int8.py, and table = unit integers, unit a power of
two: dot_g = sum_{j in g} integers[code[o, j]] q[.., j] is exact, within int32 for any codes, and in float32
  y = fl(fl(sum_g fl(fl(scale[o, g] unit) fl(dot_g))) row_scale) + bias, groups added first to last, each step rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, PACK_REMEDY, ceil_div, check_one_of, check_rows, check_tensor, require
from ._checks import tile_shape as _tile_shape
from ._groups import columns_of_groups
from .bitpack import tile_unpack
from .fp4 import CODEBOOKS, FORMATS, code_values, e8m0_uncast, short_name, table
from .int8 import ACTIVATIONS, _int8_quantize_reference, int8_fake_quant
from .nvfp4 import e4m3_uncast

library.define(
    "fp4_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str format, int group_size, Tensor? codebook,"
    " str activations, Tensor? global_scale=None) -> Tensor",
)
library.define(
    "fp4_weight",
    "(Tensor weight, Tensor scale, int n, int k, str format, int group_size, Tensor? codebook,"
    " Tensor? global_scale=None) -> Tensor",
)


def scale_values(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """Scales as float32."""
    if scale.dtype == torch.float32:
        return scale
    return e8m0_uncast(scale) if global_scale is None else e4m3_uncast(scale) * global_scale


def integers_of(codebook: Sequence[float]) -> tuple[list[int], float]:
    """16 values as integers of magnitude up to 127 and the power of two that they are multiples of."""
    fractions = [value.as_integer_ratio() for value in codebook if math.isfinite(value)]
    unit = min(((n & -n) / d for n, d in fractions if n), default=1.0)  # the lowest bit of any value
    integers = [round(n / d / unit) for n, d in fractions]
    require(
        len(fractions) == len(codebook) and max(map(abs, integers)) <= 127,
        "fp4_linear: the values of codes must be integers of magnitude up to 127 times a power of two for"
        ' activations="int8", got others; move their common factor to scale, or pass activations="float"',
    )
    return integers, unit


def _check_sums(integers: Sequence[int], k: int, group_size: int) -> None:
    most = (2**31 - 1) // (127 * max(1, *map(abs, integers)))
    width = min(group_size, k) if group_size else k
    require(
        width <= most,
        f'fp4_linear: a group must have at most {most} columns for activations="int8" and these values, got {width};'
        ' pass a smaller group_size, or activations="float"',
    )


def int8_linear(
    q: Tensor,
    row_scale: Tensor,
    integers: Tensor,
    unit: float,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """The formula of activations="int8", float32 [..., n]: q int8 [..., k], integers [n, k], scale float32 [n, groups].

    float64 keeps every sum of integers exact.
    """
    n, k = integers.shape
    width, levels, weights = group_size or max(k, 1), q.double(), integers.double()
    factors = scale * unit
    out = scale.new_zeros((*q.shape[:-1], n))
    for group in range(scale.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        dot = (levels[..., columns] @ weights[:, columns].T + 0.0).float()  # + 0: an integer has no -0
        out = out + factors[:, group] * dot
    out = out * row_scale.unsqueeze(-1)
    return out if bias is None else out + bias


@library.default("fp4_linear")
def _fp4_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    codebook: Tensor | None,
    activations: str,
    global_scale: Tensor | None = None,
) -> Tensor:
    _check_fp4_linear(x, weight, scale, bias, format, group_size, codebook, activations, global_scale)
    n, k = scale.shape[0], x.shape[-1]
    if activations == "int8":
        integers, unit = integers_of(code_values(format) if codebook is None else codebook.tolist())
        _check_sums(integers, k, group_size)
        values = torch.tensor(integers, dtype=torch.float64, device=x.device)[tile_unpack(weight, n, k, 4).int()]
        factors = scale_values(scale, global_scale)
        q, row_scale = _int8_quantize_reference(x)
        return int8_linear(q, row_scale, values, unit, factors, bias, group_size).to(x.dtype)
    out = x.float() @ _fp4_weight_reference(weight, scale, n, k, format, group_size, codebook, global_scale).T
    return (out if bias is None else out + bias).to(x.dtype)


@library.default("fp4_weight")
def _fp4_weight_reference(
    weight: Tensor,
    scale: Tensor,
    n: int,
    k: int,
    format: str,
    group_size: int,
    codebook: Tensor | None,
    global_scale: Tensor | None = None,
) -> Tensor:
    _check_fp4_weight("fp4_weight", weight, scale, n, k, format, group_size, codebook, global_scale)
    values = (table(format, weight.device) if codebook is None else codebook)[tile_unpack(weight, n, k, 4).int()]
    if global_scale is None:
        return values * columns_of_groups(scale_values(scale, None), k, group_size)
    return values * columns_of_groups(e4m3_uncast(scale), k, group_size) * global_scale


def _check_fp4_weight(
    op: str,
    weight: Tensor,
    scale: Tensor,
    n: int,
    k: int,
    format: str,
    group_size: int,
    codebook: Tensor | None,
    global_scale: Tensor | None,
) -> None:
    check_one_of(op, "format", format, (*FORMATS, *CODEBOOKS))
    require(
        n >= 0 and 0 <= k <= MAX_COLUMNS,
        f"{op}: n must be at least 0 and k between 0 and 16777216, got n = {n}, k = {k}",
    )
    valid = group_size >= 0 and group_size % 8 == 0
    require(valid, f"{op}: group_size must be 0 or a positive multiple of 8, got {group_size}")
    valid = scale.dtype in (torch.float32, torch.uint8)
    require(valid, f"{op}: scale must be float32, or uint8 for E8M0, got {short_name(scale.dtype)}")
    valid = global_scale is None or scale.dtype == torch.uint8
    require(valid, f"{op}: scale must be uint8, E4M3, with a global_scale, got {short_name(scale.dtype)}")
    groups = ceil_div(k, group_size) if group_size else 1
    check_tensor(op, "scale", scale, scale.dtype, [n, groups], weight)
    check_tensor(op, "weight", weight, torch.int32, _tile_shape(n, k, 4), weight, PACK_REMEDY)
    check_tensor(op, "codebook", codebook, torch.float32, [16], weight)
    check_tensor(op, "global_scale", global_scale, torch.float32, [], weight)


def _check_fp4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    codebook: Tensor | None,
    activations: str,
    global_scale: Tensor | None,
) -> None:
    check_one_of("fp4_linear", "activations", activations, ACTIVATIONS)
    k, n = check_rows("fp4_linear", x), scale.shape[0] if scale.dim() else 0
    check_tensor("fp4_linear", "weight", weight, weight.dtype, weight.shape, x)
    _check_fp4_weight("fp4_linear", weight, scale, n, k, format, group_size, codebook, global_scale)
    check_tensor("fp4_linear", "bias", bias, torch.float32, [n], x)


@torch.library.register_fake("bitmill::fp4_linear")
def _(x, weight, scale, bias, format, group_size, codebook, activations, global_scale=None):
    _check_fp4_linear(x, weight, scale, bias, format, group_size, codebook, activations, global_scale)
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.register_fake("bitmill::fp4_weight")
def _(weight, scale, n, k, format, group_size, codebook, global_scale=None):
    _check_fp4_weight("fp4_weight", weight, scale, n, k, format, group_size, codebook, global_scale)
    return weight.new_empty((n, k), dtype=torch.float32)


def _setup_fp4_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, _, ctx.format, ctx.group_size, codebook, ctx.activations, global_scale = inputs
    ctx.save_for_backward(x, weight, scale, codebook, global_scale)


def _backward_fp4_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, codebook, global_scale = ctx.saved_tensors
    need_x, _, need_scale, need_bias = ctx.needs_input_grad[:4]
    settings = (scale.shape[0], x.shape[-1], ctx.format, ctx.group_size, codebook)
    g = grad.float()
    grad_x = grad_scale = grad_bias = None
    with library.without_autocast(x):
        if need_x:
            grad_x = (g @ fp4_weight(weight, scale, *settings, global_scale)).to(x.dtype)
        if need_scale:
            values = x.float() if ctx.activations == "float" else int8_fake_quant(x.float())
            grad_scale = _scale_gradient(_rows(g).T @ _rows(values), weight, scale, *settings)
        if need_bias:
            grad_bias = g.sum_to_size(g.shape[-1:])
    return grad_x, None, grad_scale, grad_bias, None, None, None, None, None


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def _scale_gradient(
    grad_weight: Tensor,
    weight: Tensor,
    scale: Tensor,
    n: int,
    k: int,
    format: str,
    group_size: int,
    codebook: Tensor | None,
) -> Tensor:
    """Gradient of the dequantised weight [n, k] to that of the scale [n, groups]."""
    products = grad_weight * fp4_weight(weight, torch.ones_like(scale), n, k, format, group_size, codebook)
    if not group_size:
        return products.sum(1, keepdim=True)
    padded = torch.nn.functional.pad(products, (0, -k % group_size))
    return padded.unflatten(1, (scale.shape[1], group_size)).sum(2)


torch.library.register_autograd("bitmill::fp4_linear", _backward_fp4_linear, setup_context=_setup_fp4_linear)


def _setup_fp4_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, ctx.n, ctx.k, ctx.format, ctx.group_size, codebook, _ = inputs
    ctx.save_for_backward(weight, scale, codebook)


def _backward_fp4_weight(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, codebook = ctx.saved_tensors
    grad_scale = None
    if ctx.needs_input_grad[1]:
        grad_scale = _scale_gradient(grad, weight, scale, ctx.n, ctx.k, ctx.format, ctx.group_size, codebook)
    return None, grad_scale, None, None, None, None, None, None


torch.library.register_autograd("bitmill::fp4_weight", _backward_fp4_weight, setup_context=_setup_fp4_weight)


def fp4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    format: str = "e2m1",
    group_size: int = 0,
    codebook: Tensor | None = None,
    activations: str = "float",
    global_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer with an FP4 weight; the formula is in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        weight: int32 tiles of n x k codes, from `tile_pack(codes, 4)`.
        scale: [n, groups], float32 or uint8 (E8M0, or E4M3 with a global_scale); groups = 1 for group_size 0, else
            ceil(k / group_size).
        bias: float32 [n] or None.
        format: "e2m1", "e1m2", "e3m0", "nf4" or "bnb-fp4": the values of `code_values`.
        group_size: columns that share a scale, a multiple of 8, or 0 for all.
        codebook: float32 [16], the value of each code, instead of the format's.
        activations: "float" multiplies x as it is; "int8" rounds every row to int8 first (`int8_quantize`), which is
            faster. Its gradient is the straight-through identity. The values of codes must then be integers of
            magnitude up to 127 times a power of two, and a group narrow enough for sums within int32 (1,409,085
            columns of e2m1).
        global_scale: float32 [], which the value of every E4M3 byte of `scale` is multiplied with first.
    Returns:
        [..., n] of x's dtype. Gradients flow to x, bias and a float scale.
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names.
    """
    return torch.ops.bitmill.fp4_linear.default(
        x, weight, scale, bias, format, group_size, codebook, activations, global_scale
    )


def fp4_weight(
    weight: Tensor,
    scale: Tensor,
    n: int,
    k: int,
    format: str = "e2m1",
    group_size: int = 0,
    codebook: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """The weight float32 [n, k] that `fp4_linear` multiplies with. Arguments and errors as there."""
    return torch.ops.bitmill.fp4_weight.default(weight, scale, n, k, format, group_size, codebook, global_scale)
