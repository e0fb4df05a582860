# SPDX-License-Identifier: Apache-2.0
"""Activations as 4-bit floats, and their product with FP4 weights: integers times integers.

fp4_activations: x[.., j] ~ row_scale[.., group of j] q[.., j], q int8:
  e2m1, e1m2: LLM-FP4's, with a scale and a shift of every input channel that are known before (fpq.py, rho and k_j):
    code = cast(x / (input_scale 2^-input_shift[j])), ties as in fp4.py, saturating;  most = 2^E - 1;
    q = integer(code) 2^(most - input_shift[j]),  row_scale = input_scale 2^-most / 2;  |q| <= 96 (e2m1), 14 (e1m2)
  mxfp4: blocks of 32 columns: the codes of mxfp4_quantize;  q = 2 e2m1,  row_scale = 2^(byte - 127) / 2
  nvfp4: blocks of 16 columns of y = x 2^-e, the codes of nvfp4_quantize without a global scale; 2^e is the smallest
    power of two >= fl(amax of the row / 2688), so that a row does not depend on others;
    q = 2 e2m1,  row_scale = s 2^e / 2,  s the value of the block's E4M3 byte
integer(code) is twice the value. A NaN makes the scale NaN that it falls under, and so does an infinity in a block; q
is 0 for a NaN, and in such a block.
fp4_fp4_linear: with the weight of fp4_linear.py, whose table is unit integers,
dot_g = sum_{j in g} integers[code[o, j]] q[.., j] is exact, and in float32, groups added first to last, each step
rounded,
  y = fl(fl(fl(scale[o] unit) fl(dot)) row_scale) + bias                             (e2m1, e1m2: one group)
  y = sum_g fl(fl(scale[o, g] unit) fl(row_scale[.., g] fl(dot_g))) + bias           (mxfp4, nvfp4)
Source of the first: Liu et al., LLM-FP4, EMNLP 2023 (arXiv 2310.16836), whose published code multiplies floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import ceil_div, check_one_of, require
from ._fp4_arguments import BLOCKS, ActivationArguments, FP4LinearArguments, WeightArguments
from .fp4 import FORMATS, code_values, e8m0_cast, e8m0_uncast, fp4_cast, fp4_uncast, mxfp4_quantize
from .fp4_fake_quant import fp4_fake_quant
from .fp4_linear import fp4_weight, int8_linear, integer_weight, rows, scale_gradient
from .fpq import largest_shift
from .nvfp4 import E4M3_MAX, e4m3_uncast, nvfp4_quantize

library.define(
    "fp4_activations",
    "(Tensor x, str format, Tensor? input_scale, Tensor? input_shift, str scale_rule) -> (Tensor q, Tensor row_scale)",
)
library.define(
    "fp4_fp4_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str format, int group_size, Tensor? global_scale,"
    " str activations, Tensor? input_scale, Tensor? input_shift, str scale_rule) -> Tensor",
)


def channel_scale(input_scale: Tensor, input_shift: Tensor | None) -> Tensor:
    """input_scale 2^-input_shift, float32 [k], or [] without a shift."""
    return input_scale if input_shift is None else input_scale * torch.exp2(-input_shift.float())


@library.default("fp4_activations")
def _fp4_activations_reference(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    of = ActivationArguments(*arguments)
    of.check("fp4_activations", x)
    values, k = x.float(), x.shape[-1]
    if of.input_scale is not None:
        most, shift = largest_shift(of.format), of.input_shift
        require(
            shift is None or not (shift > most).any(),
            f"fp4_activations: input_shift must be at most {most} for this format, got more",
        )
        quotient = values / channel_scale(of.input_scale, shift)
        left = most if shift is None else most - shift.int()
        nan = quotient.isnan()
        integers = 2 * fp4_uncast(fp4_cast(quotient, of.format), k, of.format)
        q = integers.masked_fill(nan, 0).to(torch.int8) << left
        row_scale = (of.input_scale * (0.5 / 2**most)).expand(*x.shape[:-1], 1)
        row_scale = row_scale.masked_fill(nan.any(-1, keepdim=True), torch.nan)
        return q.to(torch.int8), row_scale.contiguous()
    if of.format == "mxfp4":
        packed, byte = mxfp4_quantize(values, of.scale_rule)
        row_scale = e8m0_uncast(byte) * 0.5
    else:
        amax = values.abs().amax(-1, keepdim=True) if k else values.new_zeros(*x.shape[:-1], 1)
        exponent = e8m0_cast(amax / torch.full_like(amax, E4M3_MAX * 6), "up")
        inverse = e8m0_uncast(torch.where(exponent == 255, 255, 254 - exponent))
        packed, byte = nvfp4_quantize(values * inverse)
        row_scale = e4m3_uncast(byte) * e8m0_uncast(exponent) * 0.5
    return (2 * fp4_uncast(packed, k)).to(torch.int8), row_scale


@library.default("fp4_fp4_linear")
def _fp4_fp4_linear_reference(x: Tensor, *arguments: Any) -> Tensor:
    of = FP4LinearArguments(*arguments)
    of.check("fp4_fp4_linear", x)
    integers = integer_weight(of.weight_for(x), code_values(of.format))
    q, row_scale = _fp4_activations_reference(x, *of.casting)
    blocks = of.activations in BLOCKS
    return int8_linear(q, row_scale, *integers, of.bias, of.group_size, grouped_rows=blocks).to(x.dtype)


@torch.library.register_fake("bitmill::fp4_activations")
def _(x, *arguments):
    of = ActivationArguments(*arguments)
    of.check("fp4_activations", x)
    groups = ceil_div(x.shape[-1], BLOCKS[of.format]) if of.format in BLOCKS else 1
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


@torch.library.register_fake("bitmill::fp4_fp4_linear")
def _(x, *arguments):
    of = FP4LinearArguments(*arguments)
    of.check("fp4_fp4_linear", x)
    return x.new_empty((*x.shape[:-1], of.scale.shape[0]))


def _setup_fp4_fp4_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, of = inputs[0], FP4LinearArguments(*inputs[1:])
    ctx.format, ctx.group_size = of.format, of.group_size
    ctx.activations, ctx.scale_rule = of.activations, of.scale_rule
    ctx.save_for_backward(x, of.weight, of.scale, of.global_scale, of.input_scale, of.input_shift)


def _backward_fp4_fp4_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, global_scale, input_scale, input_shift = ctx.saved_tensors
    need_x, _, need_scale, need_bias = ctx.needs_input_grad[:4]
    of = WeightArguments(weight, scale, scale.shape[0], x.shape[-1], ctx.format, ctx.group_size, None, global_scale)
    g = grad.float()
    grad_x = grad_scale = grad_bias = None
    with library.without_autocast(x):
        if need_x:
            inside = _inside(x.float(), ctx.activations, input_scale, input_shift)
            grad_x = ((g @ fp4_weight(*of)) * inside).to(x.dtype)
        if need_scale:
            values = fp4_activations_fake_quant(x.float(), ctx.activations, input_scale, input_shift, ctx.scale_rule)
            grad_scale = scale_gradient(rows(g).T @ rows(values), of)
        if need_bias:
            grad_bias = g.sum_to_size(g.shape[-1:])
    return grad_x, None, grad_scale, grad_bias, *[None] * 7


torch.library.register_autograd(
    "bitmill::fp4_fp4_linear", _backward_fp4_fp4_linear, setup_context=_setup_fp4_fp4_linear
)


def _inside(x: Tensor, format: str, input_scale: Tensor | None, input_shift: Tensor | None) -> Tensor | int:
    """Where the straight-through gradient passes: blocks clip nothing that their scales were not chosen for."""
    if input_scale is None:
        return 1
    largest = max(code_values(format)) * (1 + 2**-23)  # as in fp4_fake_quant
    return (x / channel_scale(input_scale, input_shift)).abs() <= largest


class _BlockFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: str, scale_rule: str) -> Tensor:
        q, row_scale = torch.ops.bitmill.fp4_activations.default(x, format, None, None, scale_rule)
        columns = torch.arange(x.shape[-1], device=x.device) // BLOCKS[format]
        return q * row_scale.index_select(-1, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


def fp4_activations(
    x: Tensor,
    format: str = "mxfp4",
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    scale_rule: str = "floor",
) -> tuple[Tensor, Tensor]:
    """Rows as 4-bit floats, in the form in which `fp4_fp4_linear` multiplies them; formulas in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        format: "e2m1" or "e1m2" with an input_scale, "mxfp4" or "nvfp4" without.
        input_scale: float32 [], what the format's values are multiplied with: `fpq_scale(rho, format)`.
        input_shift: uint8 [k], at most 3 (e2m1) or 1 (e1m2): channel j's scale is input_scale 2^-input_shift[j]; None
            for 0. On a GPU, whose values are not checked, more counts as the most.
        scale_rule: of "mxfp4", as `mxfp4_quantize` has it.
    Returns:
        q int8 [..., k] and row_scale float32 [..., groups], 1 group or one for 32 or 16 columns. No gradient;
        `fp4_activations_fake_quant` has a straight-through one.
    Raises:
        ValueError: for wrong shapes, dtypes, names or shifts.
    """
    return torch.ops.bitmill.fp4_activations.default(x, format, input_scale, input_shift, scale_rule)


def fp4_activations_fake_quant(
    x: Tensor,
    format: str = "mxfp4",
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    scale_rule: str = "floor",
) -> Tensor:
    """row_scale * q of `fp4_activations`, float32 [..., k] from float32 x, for training; "e3m0" too.

    The gradient goes straight through, for "e2m1", "e1m2" and "e3m0" only where x does not saturate.
    """
    if format in BLOCKS:
        return _BlockFakeQuant.apply(x, format, scale_rule)
    check_one_of("fp4_activations_fake_quant", "format", format, (*FORMATS, *BLOCKS))
    if input_scale is None:
        raise ValueError(f'fp4_activations_fake_quant: input_scale must be given for format "{format}"')
    return fp4_fake_quant(x, format, channel_scale(input_scale, input_shift))


def fp4_fp4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    format: str = "e2m1",
    group_size: int = 0,
    global_scale: Tensor | None = None,
    activations: str = "e2m1",
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    scale_rule: str = "floor",
) -> Tensor:
    """A linear layer with FP4 weights and activations; the formula is in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        weight, scale, bias, format, group_size, global_scale: of `fp4_linear`; group_size is 32 for activations
            "mxfp4", 16 for "nvfp4", else 0.
        activations, input_scale, input_shift, scale_rule: of `fp4_activations`, whose format is `activations`.
    Returns:
        [..., n] of x's dtype. Gradients flow to x, straight through where it does not saturate, bias and a float scale.
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names.
    """
    return torch.ops.bitmill.fp4_fp4_linear.default(
        x, weight, scale, bias, format, group_size, global_scale, activations, input_scale, input_shift, scale_rule
    )
