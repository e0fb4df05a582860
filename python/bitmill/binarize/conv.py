# SPDX-License-Identifier: Apache-2.0
"""The convolution of binary values with the gradients of a float convolution.

Like the linear product (products.py) it is the exact integer and the canonical epilogue of the packed op, and keeps the
levels as bits between forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..ops._library import without_autocast
from ..ops.binary_conv import canonical_conv, conv_dot, conv_input_gradient, pad_image
from .saved import keep_levels, kept_levels


class ConvGeometry(NamedTuple):
    """How the kernel passes over the image: heights and widths; padding is top, bottom, left, right."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class _ExactConv(torch.autograd.Function):
    """canonical_conv of the levels and signs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_value: Tensor,
        w_value: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        level: Tensor,
        signs: Tensor,
        scale: Tensor,
        step: Tensor | None,
        geometry: ConvGeometry,
        carries_rows: bool,
    ) -> Tensor:
        dot, flat = conv_dot(level, signs, *geometry), level.flatten(1)
        if any(ctx.needs_input_grad):
            scaled = dot * scale.view(-1, 1, 1) if ctx.needs_input_grad[3] else None
            ctx.save_for_backward(w_value, rows, step, scaled, *keep_levels(flat))
        ctx.x_shape, ctx.flat_shape, ctx.geometry, ctx.carries_rows = level.shape, flat.shape, geometry, carries_rows
        return canonical_conv(dot, scale, rows, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w_value, rows, step, scaled, sign, nonzero = ctx.saved_tensors
        need_x, need_w, need_bias, need_rows = ctx.needs_input_grad[:4]
        stride, padding, dilation, groups = ctx.geometry
        g = grad if rows is None else grad * rows.unsqueeze(1)
        grad_x = grad_w = None
        with without_autocast(grad):
            if need_w:
                value = kept_levels(sign, nonzero, ctx.flat_shape).view(ctx.x_shape)
                value = pad_image(value if step is None else value * step, padding)
                grad_w = conv2d_weight(value, w_value.shape, g, stride, 0, dilation, groups)
            if need_x:
                grad_x = conv_input_gradient(g if ctx.carries_rows else grad, ctx.x_shape, w_value, *ctx.geometry)
        grad_bias = grad.sum((0, 2, 3)) if need_bias else None
        return grad_x, grad_w, grad_bias, (grad * scaled).sum(1) if need_rows else None, *[None] * 6


def exact_conv(
    x_value: Tensor,
    w_value: Tensor,
    bias: Tensor | None,
    level: Tensor,
    signs: Tensor,
    scale: Tensor,
    geometry: ConvGeometry,
    step: Tensor | None = None,
    rows: Tensor | None = None,
    carries_rows: bool = True,
) -> Tensor:
    """rows * conv2d(x_value, w_value) + bias in float32, computed as integers and the canonical epilogue.

    Args:
        x_value: float32 [batch, channels, height, width], `step` times `level`; only its gradient is used.
        w_value: float32 [n, channels / groups, height, width], `scale` times `signs`; only its gradient is used.
        bias: float32 [n] or None.
        level, signs: -1, 0, +1 (or 0 and 1), float32, like x_value and w_value.
        scale: float32 [n].
        step: scalar tensor or None for 1 (BiT's alpha).
        rows: float32 [batch, height, width] of the result, or None.
        carries_rows: whether the gradient of x is multiplied by rows (XNOR-Net++: yes, XNOR-Net: no).
    """
    scale = scale.detach() if step is None else step.detach() * scale.detach()
    return _ExactConv.apply(x_value, w_value, bias, rows, level, signs, scale, step, geometry, carries_rows)
