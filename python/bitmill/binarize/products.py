# SPDX-License-Identifier: Apache-2.0
"""Products of binary values with the gradients of float products. Between forward and backward they keep the levels.

The linear product is computed from the signs themselves, so it is the exact integer and the canonical epilogue of
`bitmill.ops.binary_linear`: a training layer and its packed form agree bit for bit. Gradients use the scaled values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import binary_matmul, binary_weight_linear, bitpack
from ..ops._library import has_compiled_kernel, without_autocast
from ..ops.binary_matmul import canonical_linear, int8_levels, scaled_signs
from ..ops.bitpack import tiles_of_rows
from .functions import BinarizedWeight
from .saved import keep_levels, keep_slope, kept_levels, times_slope


class _ExactLinear(torch.autograd.Function):
    """canonical_linear of the levels and signs; gradients as F.linear(x_value, w_value, bias) has them.

    The values are the levels times `step` or `rows` and the signs times their scale, so the levels and signs are kept.
    With a surrogate, x is what the levels are the signs of, and the gradient is that of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_value: Tensor,
        bias: Tensor | None,
        level: Tensor | None,
        weight: BinarizedWeight,
        step: Tensor | None,
        rows: Tensor | None,
        group_size: int,
        surrogate: str | None,
        zero: str,
    ) -> Tensor:
        kept = keep_levels(x, zero) if level is None else (level, None)
        slope = () if surrogate is None or not ctx.needs_input_grad[0] else keep_slope(ctx, x, surrogate)
        tiles = _tiles(weight.signs)
        ctx.save_for_backward(step, rows, weight.scale.detach(), *tiles, *kept, *slope)
        ctx.x_shape, ctx.columns, ctx.group_size = x.shape, weight.signs.shape[1], group_size
        ctx.many, ctx.window = level is not None, surrogate is not None
        scale = weight.scale.detach() if step is None else step * weight.scale.detach()
        if level is not None or group_size or tiles[1] is not None or not _packed_forward(x):
            levels = kept_levels(kept[0], kept[1], x.shape) if level is None else int8_levels(level)
            return canonical_linear(levels, weight.signs, scale, rows, bias, group_size)
        n, k = weight.signs.shape
        out = binary_matmul(kept[0], tiles[0], n, k, kept[1]).float()
        out = out.mul_(scale[:, 0] if rows is None else scale[:, 0] * rows)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step, rows, scale, signs, w_nonzero, level, x_nonzero, *slope = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_w = None
        flat = grad.unsqueeze(0).flatten(0, -2)
        with without_autocast(grad):
            if need_w:
                value = level.float() if ctx.many else kept_levels(level, x_nonzero, ctx.x_shape)
                if step is not None or rows is not None:
                    value = value.mul_(rows if step is None else step)
                grad_w = flat.T @ value.unsqueeze(0).flatten(0, -2)
                del value  # before as large a gradient comes
            if need_x:
                grad_x = grad @ scaled_signs(signs, w_nonzero, scale, ctx.columns, ctx.group_size)
                if ctx.window:
                    grad_x = times_slope(ctx, grad_x if rows is None else grad_x.mul_(rows), slope, owned=True)
        return grad_x, grad_w, flat.sum(0) if need_bias else None, *[None] * 7


def _tiles(signs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Planes of a weight: signs, and nonzeros unless it is known that there is no 0."""
    plane, nonzero, present, _ = bitpack(signs)
    if signs.device.type == "cpu" and not torch.compiler.is_compiling() and (present == signs.shape[1]).all():
        return tiles_of_rows(plane), None
    return tiles_of_rows(plane), tiles_of_rows(nonzero)


def _packed_forward(level: Tensor) -> bool:
    """Whether the packed kernel answers the integers sooner than a float product: measured on the CPU only."""
    if level.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return has_compiled_kernel("binary_matmul")


def exact_linear(
    x: Tensor,
    weight: BinarizedWeight,
    bias: Tensor | None,
    step: Tensor | None = None,
    rows: Tensor | None = None,
    group_size: int | None = None,
    level: Tensor | None = None,
    surrogate: str | None = None,
    zero: str = "torch",
) -> Tensor:
    """value(x) @ weight.value.T + bias in float32, computed as integers and the canonical epilogue.

    Args:
        x: float32 [..., k]. With a surrogate: what is binarised, value(x) = `rows` sgn(x). Without: value(x) = x, which
            is `step` or `rows` times a level; only its signs and its gradient are used.
        weight: from `binarize_weight`.
        bias: float32 [n] or None.
        step: scalar tensor that multiplies the scale of every output (BiT's alpha).
        rows: float32 [..., 1] that multiplies the scale of every row (XNOR-Net's K, the scale of int8 activations).
        level: int8 [..., k], where there are more levels than -1, 0, +1; None for the signs of x.
        surrogate: the window of the gradient of sgn, as in `sign`.
        zero: what sgn(0) is, as in `sign`, where there is a surrogate.
    """
    step, rows = (None if t is None else t.detach() for t in (step, rows))
    return _ExactLinear.apply(x, weight.value, bias, level, weight, step, rows, group_size or 0, surrogate, zero)


def linear_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x [..., k], weight [n, k] and bias that F.linear has; those that nothing asks for are None."""
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    flat, flat_x = (t.unsqueeze(0).flatten(0, -2) for t in (grad, x))
    with without_autocast(grad):
        grad_x = grad @ weight if need_x else None
        grad_w = flat.T @ flat_x if need_w else None
    return grad_x, grad_w, flat.sum(0) if need_bias else None


class _WeightLinear(torch.autograd.Function):
    """`binary_weight_linear` of the packed weight; gradients as F.linear(x, w_value, bias) has them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_value: Tensor, bias: Tensor | None, weight: BinarizedWeight, group_size: int
    ) -> Tensor:
        tiles, scale = _tiles(weight.signs), weight.scale.detach()
        ctx.save_for_backward(x, scale, *tiles)
        ctx.columns, ctx.group_size = weight.signs.shape[1], group_size
        return binary_weight_linear(x, tiles[0], scale, bias, tiles[1], group_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, signs, nonzero = ctx.saved_tensors
        value = scaled_signs(signs, nonzero, scale, ctx.columns, ctx.group_size)
        return *linear_gradients(ctx, grad, x, value), None, None


def weight_linear(x: Tensor, weight: BinarizedWeight, bias: Tensor | None, group_size: int | None = None) -> Tensor:
    """x @ weight.value.T + bias in float32 for float x, summed as the packed form sums, so that both agree bit for bit.

    Weights of several planes, and devices without a compiled kernel, take the float product.
    """
    if not weight.is_plane or not _packed_forward(x):
        return torch.nn.functional.linear(x, weight.value, bias)
    return _WeightLinear.apply(x, weight.value, bias, weight, group_size or 0)


class _LevelProduct(torch.autograd.Function):
    """The product of the levels of a and b, times their steps; the levels are kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_step: Tensor | None, b_step: Tensor | None) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(a_step, b_step, *keep_levels(a), *keep_levels(b))
        ctx.shapes = a.shape, b.shape
        if a_step is None or b_step is None:
            return a @ b
        return (a_step * b_step) * (torch.sign(a) @ torch.sign(b))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a_step, b_step, *planes = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            b = kept_levels(planes[2], planes[3], ctx.shapes[1])
            grad_a = (grad @ (b if b_step is None else b_step * b).mT).sum_to_size(ctx.shapes[0])
        if ctx.needs_input_grad[1]:
            a = kept_levels(planes[0], planes[1], ctx.shapes[0])
            grad_b = ((a if a_step is None else a_step * a).mT @ grad).sum_to_size(ctx.shapes[1])
        return grad_a, grad_b, None, None


def level_product(a: Tensor, b: Tensor, a_step: Tensor | None = None, b_step: Tensor | None = None) -> Tensor:
    """a @ b and its gradients, for operands that are -1, 0 or +1 times a step: whole numbers times one constant.

    A sum of rounded multiples of a step may be 1e-8 where the exact product is 0, and the next layer takes its sign.

    Args:
        a, b: float32 [..., n, d] and [..., d, m].
        a_step, b_step: positive scalar tensors, the steps of a and b (BiT's alpha); None for both means 1.
    Between forward and backward two bits an element are kept, not 32.
    """
    a_step, b_step = (None if t is None else t.detach() for t in (a_step, b_step))
    return _LevelProduct.apply(a, b, a_step, b_step)
