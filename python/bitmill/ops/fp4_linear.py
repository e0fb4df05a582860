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
from ._checks import require
from ._fp4_arguments import LinearArguments, WeightArguments
from ._groups import columns_of_groups
from .bitpack import tile_unpack
from .fp4 import code_values, e8m0_uncast, table
from .int8 import _int8_quantize_reference, int8_fake_quant
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
    factors: Tensor,
    bias: Tensor | None,
    group_size: int,
    grouped_rows: bool = False,
) -> Tensor:
    """fl(fl(sum_g fl(factors[o, g] fl(dot_g))) row_scale) + bias, float32 [..., n], groups added first to last.

    Args:
        q: int8 [..., k].
        row_scale: float32 [..., 1]; with grouped_rows [..., groups], and dot_g is multiplied with it instead.
        integers: [n, k].
        factors: float32 [n, groups].
        bias: float32 [n] or None.
        group_size: columns of a group, or 0 for all.
    """
    n, k = integers.shape
    width, levels, weights = group_size or max(k, 1), q.double(), integers.double()
    out = factors.new_zeros((*q.shape[:-1], n))
    for group in range(factors.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        # float64 keeps the sums of integers exact; + 0: an integer has no -0
        dot = (levels[..., columns] @ weights[:, columns].T + 0.0).float()
        if grouped_rows:
            dot = row_scale[..., group : group + 1] * dot
        out = out + factors[:, group] * dot
    if not grouped_rows:
        out = out * row_scale
    return out if bias is None else out + bias


def integer_weight(of: WeightArguments, codebook: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Integers float64 [n, k] and factors float32 [n, groups] of a weight for products with integers.

    Raises:
        ValueError: if the codebook has no integers, or a group is too wide.
    """
    integers, unit = integers_of(codebook)
    _check_sums(integers, of.k, of.group_size)
    values = torch.tensor(integers, dtype=torch.float64, device=of.weight.device)
    return values[tile_unpack(of.weight, of.n, of.k, 4).int()], scale_values(of.scale, of.global_scale) * unit


@library.default("fp4_linear")
def _fp4_linear_reference(x: Tensor, *arguments: Any) -> Tensor:
    of = LinearArguments(*arguments)
    of.check("fp4_linear", x)
    weight = of.weight_for(x)
    if of.activations == "int8":
        codebook = code_values(of.format) if of.codebook is None else of.codebook.tolist()
        q, row_scale = _int8_quantize_reference(x)
        integers = integer_weight(weight, codebook)
        return int8_linear(q, row_scale.unsqueeze(-1), *integers, of.bias, of.group_size).to(x.dtype)
    out = x.float() @ _fp4_weight_reference(*weight).T
    return (out if of.bias is None else out + of.bias).to(x.dtype)


@library.default("fp4_weight")
def _fp4_weight_reference(*arguments: Any) -> Tensor:
    of = WeightArguments(*arguments)
    of.check("fp4_weight", of.weight)
    values = table(of.format, of.weight.device) if of.codebook is None else of.codebook
    values = values[tile_unpack(of.weight, of.n, of.k, 4).int()]
    if of.global_scale is None:
        return values * columns_of_groups(scale_values(of.scale, None), of.k, of.group_size)
    return values * columns_of_groups(e4m3_uncast(of.scale), of.k, of.group_size) * of.global_scale


@torch.library.register_fake("bitmill::fp4_linear")
def _(x, *arguments):
    of = LinearArguments(*arguments)
    of.check("fp4_linear", x)
    return x.new_empty((*x.shape[:-1], of.scale.shape[0]))


@torch.library.register_fake("bitmill::fp4_weight")
def _(*arguments):
    of = WeightArguments(*arguments)
    of.check("fp4_weight", of.weight)
    return of.weight.new_empty((of.n, of.k), dtype=torch.float32)


def _setup_fp4_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, of = inputs[0], LinearArguments(*inputs[1:])
    ctx.format, ctx.group_size, ctx.activations = of.format, of.group_size, of.activations
    ctx.save_for_backward(x, of.weight, of.scale, of.codebook, of.global_scale)


def _backward_fp4_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, codebook, global_scale = ctx.saved_tensors
    need_x, _, need_scale, need_bias = ctx.needs_input_grad[:4]
    of = WeightArguments(weight, scale, scale.shape[0], x.shape[-1], ctx.format, ctx.group_size, codebook, global_scale)
    g = grad.float()
    grad_x = grad_scale = grad_bias = None
    with library.without_autocast(x):
        if need_x:
            grad_x = (g @ fp4_weight(*of)).to(x.dtype)
        if need_scale:
            values = x.float() if ctx.activations == "float" else int8_fake_quant(x.float())
            grad_scale = scale_gradient(rows(g).T @ rows(values), of)
        if need_bias:
            grad_bias = g.sum_to_size(g.shape[-1:])
    return grad_x, None, grad_scale, grad_bias, *[None] * 5


def rows(t: Tensor) -> Tensor:
    """[m, k] of [..., k]."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def scale_gradient(grad_weight: Tensor, of: WeightArguments) -> Tensor:
    """Gradient of the dequantised weight [n, k] to that of its float scale [n, groups]."""
    products = grad_weight * fp4_weight(*of._replace(scale=torch.ones_like(of.scale)))
    if not of.group_size:
        return products.sum(1, keepdim=True)
    padded = torch.nn.functional.pad(products, (0, -of.k % of.group_size))
    return padded.unflatten(1, (of.scale.shape[1], of.group_size)).sum(2)


torch.library.register_autograd("bitmill::fp4_linear", _backward_fp4_linear, setup_context=_setup_fp4_linear)


def _setup_fp4_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    of = WeightArguments(*inputs)
    ctx.settings = (of.n, of.k, of.format, of.group_size)
    ctx.save_for_backward(of.weight, of.scale, of.codebook)


def _backward_fp4_weight(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, codebook = ctx.saved_tensors
    grad_scale = None
    if ctx.needs_input_grad[1]:
        n, k, format, group_size = ctx.settings
        grad_scale = scale_gradient(grad, WeightArguments(weight, scale, n, k, format, group_size, codebook))
    return None, grad_scale, *[None] * 6


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
