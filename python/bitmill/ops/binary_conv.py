# SPDX-License-Identifier: Apache-2.0
"""A 2-D convolution with 1-bit activations and weights, packing of the image included.

binary_conv2d: dot[b, o, y, x] = sum over the kernel and the group's channels of a w, exact; a = levels(x + shift), a
padded position is 0;  out = fl(fl(scale[o] * dot) + bias[o]) in float32, then one rounding to x's dtype; with row_scale
the scale is fl(scale[o] * row_scale[b, y, x]).
The weight is tiles of n rows and k = kernel height * kernel width * channels of a group columns, channel fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torch.nn.grad import conv2d_input

from . import _library as library
from ._checks import FLOATS, MAX_COLUMNS, PACK_REMEDY, check_one_of, check_tensor, require, tile_shape
from ._surrogates import SURROGATES, surrogate_slope
from .binary_matmul import unpack_signs
from .bitpack import LEVELS, binarized

OP = "binary_conv2d"

# No defaults where there is a gradient: torch drops trailing defaults before it calls the backward.
library.define(
    OP,
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? weight_nonzero, Tensor? shift, Tensor? alpha,"
    " Tensor? row_scale, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, str levels,"
    " str surrogate) -> Tensor",
)


def conv_columns(kernels: Tensor) -> Tensor:
    """Kernels [n, c, height, width] as the rows [n, height * width * c] of the packed weight."""
    return kernels.permute(0, 2, 3, 1).flatten(1)


def conv_kernels(columns: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Undo `conv_columns`."""
    n, k = columns.shape
    height, width = kernel_size
    return columns.view(n, height, width, k // (height * width)).permute(0, 3, 1, 2)


def pad_image(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Zeros around x [..., height, width]; padding is top, bottom, left, right."""
    top, bottom, left, right = padding
    return pad(x, (left, right, top, bottom)) if any(padding) else x


def conv_dot(
    level: Tensor, signs: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Whole numbers as float32 [batch, n, height, width], from levels and signs [n, c, height, width]."""
    dot = conv2d(pad_image(level, padding), signs, None, stride, 0, dilation, groups)
    return dot.round() + 0.0  # exact whatever algorithm torch chose, and no -0


def canonical_conv(dot: Tensor, scale: Tensor, rows: Tensor | None, bias: Tensor | None) -> Tensor:
    """fl(fl(scale * dot) + bias), the one definition; rows [batch, height, width] or None multiplies the scale."""
    factor = scale.view(-1, 1, 1) if rows is None else scale.view(-1, 1, 1) * rows.unsqueeze(1)
    out = factor * dot
    return out if bias is None else out + bias.view(-1, 1, 1)


def _answers_channels_last(x: Tensor, groups: int) -> bool:
    return groups == 1 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@library.default(OP)
def _binary_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_nonzero: Tensor | None,
    shift: Tensor | None,
    alpha: Tensor | None,
    row_scale: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    levels: str,
    surrogate: str,
) -> Tensor:
    height, width = _check(
        x,
        weight,
        scale,
        bias,
        weight_nonzero,
        shift,
        alpha,
        row_scale,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        levels,
        surrogate,
    )
    n = scale.shape[0]
    last = _answers_channels_last(x, groups)
    if x.shape[0] == 0:
        out = x.new_empty((x.shape[0], n, height, width), dtype=torch.float32)
    else:
        level = _levels_of(x, shift, alpha, levels)
        signs = _signs_of(weight, weight_nonzero, n, x.shape[1] // groups, kernel_size)
        out = canonical_conv(conv_dot(level, signs, stride, padding, dilation, groups), scale, row_scale, bias)
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _levels_of(x: Tensor, shift: Tensor | None, alpha: Tensor | None, levels: str) -> Tensor:
    per_channel = None if shift is None else shift.view(-1, 1, 1)
    return binarized(x, per_channel, levels, 0.5 if alpha is None else alpha / 2)


def _signs_of(weight: Tensor, nonzero: Tensor | None, n: int, c: int, kernel_size: Sequence[int]) -> Tensor:
    k = c * kernel_size[0] * kernel_size[1]
    return conv_kernels(unpack_signs(weight, nonzero, n, k), kernel_size)


def _check_counts(name: str, values: Sequence[int], count: int, smallest: int) -> None:
    require(
        len(values) == count and all(smallest <= v <= MAX_COLUMNS for v in values),
        f"{OP}: {name} must be {count} numbers between {smallest} and {MAX_COLUMNS}, got {list(values)}",
    )


def _outputs(name: str, size: int, kernel: int, stride: int, padding: Sequence[int], dilation: int) -> int:
    reach, around = dilation * (kernel - 1) + 1, sum(padding)
    require(
        size + around >= reach,
        f"{OP}: x must be at least as {name} as the kernel with its dilation ({reach}), padding included,"
        f" got {size} + {around}",
    )
    return (size + around - reach) // stride + 1


def _check(
    x,
    weight,
    scale,
    bias,
    weight_nonzero,
    shift,
    alpha,
    row_scale,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    levels,
    surrogate,
) -> tuple[int, int]:
    """Answers the height and width of the result."""
    check_one_of(OP, "levels", levels, LEVELS)
    check_one_of(OP, "surrogate", surrogate, SURROGATES)
    require(
        x.dim() == 4 and min(x.shape[1:]) >= 1,
        f"{OP}: x must have shape [batch, channels, height, width], got {list(x.shape)}",
    )
    dtype = str(x.dtype).removeprefix("torch.")
    require(x.dtype in FLOATS, f"{OP}: x must be float32, bfloat16 or float16, got {dtype}")
    for name, values, count, smallest in (
        ("kernel_size", kernel_size, 2, 1),
        ("stride", stride, 2, 1),
        ("padding", padding, 4, 0),
        ("dilation", dilation, 2, 1),
    ):
        _check_counts(name, values, count, smallest)
    channels, n = x.shape[1], scale.shape[0] if scale.dim() else 0
    require(n >= 1, f"{OP}: scale must have shape [n], n at least 1, got {list(scale.shape)}")
    require(
        groups >= 1 and channels % groups == 0 and n % groups == 0,
        f"{OP}: groups must divide the channels of x and of the output, got groups = {groups} for {channels} and {n}",
    )
    height = _outputs("high", x.shape[2], kernel_size[0], stride[0], padding[:2], dilation[0])
    width = _outputs("wide", x.shape[3], kernel_size[1], stride[1], padding[2:], dilation[1])
    k = kernel_size[0] * kernel_size[1] * (channels // groups)
    require(k <= MAX_COLUMNS, f"{OP}: a patch must have at most {MAX_COLUMNS} values, got {k}")
    check_tensor(OP, "scale", scale, torch.float32, [n], x)
    check_tensor(OP, "weight", weight, torch.int32, tile_shape(n, k), x, PACK_REMEDY)
    check_tensor(OP, "weight_nonzero", weight_nonzero, torch.int32, tile_shape(n, k), x)
    check_tensor(OP, "bias", bias, torch.float32, [n], x)
    check_tensor(OP, "shift", shift, torch.float32, [channels], x)
    check_tensor(OP, "alpha", alpha, torch.float32, [], x)
    check_tensor(OP, "row_scale", row_scale, torch.float32, [x.shape[0], height, width], x)
    return height, width


@torch.library.register_fake(f"bitmill::{OP}")
def _(x, weight, scale, *arguments):
    height, width = _check(x, weight, scale, *arguments)
    last = _answers_channels_last(x, arguments[-3])
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (x.shape[0], scale.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scale, _, weight_nonzero, shift, alpha, row_scale, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, scale, weight_nonzero, shift, alpha, row_scale)


def conv_input_gradient(
    grad: Tensor,
    shape: Sequence[int],
    kernels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of conv2d(pad_image(x), kernels) to x of this shape."""
    (batch, channels, height, width), (top, bottom, left, right) = shape, padding
    padded = (batch, channels, height + top + bottom, width + left + right)
    whole = conv2d_input(padded, kernels, grad, list(stride), 0, list(dilation), groups)
    return whole[:, :, top : top + height, left : left + width]


def _backward(ctx, grad):
    x, weight, scale, weight_nonzero, shift, alpha, row_scale = ctx.saved_tensors
    kernel_size, stride, padding, dilation, groups, levels, surrogate = ctx.settings
    need_x, _, need_scale, need_bias, _, need_shift, _, need_rows = ctx.needs_input_grad[:8]
    g = grad.float()
    g_rows = g if row_scale is None else g * row_scale.unsqueeze(1)
    signs = _signs_of(weight, weight_nonzero, scale.shape[0], x.shape[1] // groups, kernel_size)
    grad_x = grad_scale = grad_shift = grad_rows = None
    with library.without_autocast(x):
        if need_x or need_shift:
            z = x.float() if shift is None else x.float() + shift.view(-1, 1, 1)
            kernels = signs * scale.view(-1, 1, 1, 1)
            grad_level = conv_input_gradient(g_rows, x.shape, kernels, stride, padding, dilation, groups)
            grad_z = grad_level * surrogate_slope(z if alpha is None else z / alpha, surrogate)
            grad_z = grad_z if alpha is None else grad_z / alpha
            grad_x = grad_z.to(x.dtype)
            grad_shift = grad_z.sum((0, 2, 3)) if need_shift else None
        if need_scale or need_rows:
            level = _levels_of(x, shift, alpha, levels)
            dot = conv_dot(level, signs, stride, padding, dilation, groups)
            grad_scale = (g_rows * dot).sum((0, 2, 3)) if need_scale else None
            grad_rows = (g * dot * scale.view(-1, 1, 1)).sum(1) if need_rows else None
    grad_bias = g.sum((0, 2, 3)) if need_bias else None
    return grad_x, None, grad_scale, grad_bias, None, grad_shift, None, grad_rows, *(None,) * 7


torch.library.register_autograd(f"bitmill::{OP}", _backward, setup_context=_setup_context)


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    shift: Tensor | None = None,
    alpha: Tensor | None = None,
    row_scale: Tensor | None = None,
    kernel_size: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    levels: str = "sign",
    surrogate: str = "clip",
) -> Tensor:
    """A 2-D convolution with 1-bit activations and weights; the formula is in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [batch, channels, height, width]; read as it lies if contiguous or (one group)
            channels_last.
        weight, weight_nonzero: tiles of n x k bits, from `tile_pack(conv_columns(...), 1)`.
        scale: float32 [n].
        bias: float32 [n] or None.
        shift: float32 [channels] or None.
        alpha: float32 scalar tensor or None for 1: the step of the activation, as for `binary_linear`.
        row_scale: float32 [batch, height, width] of the result, or None: multiplies the scale of every position.
        kernel_size, stride, dilation: height and width.
        padding: top, bottom, left, right.
        groups: of channels, as for torch.nn.functional.conv2d.
        levels, surrogate: as for `binary_linear`.
    Returns:
        [batch, n, height, width] of x's dtype, channels_last if x is (and has one group). Gradients flow to x, scale,
        bias, shift and row_scale.
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names, or a kernel larger than the padded image.
    """
    check_one_of(OP, "surrogate", surrogate, SURROGATES)  # the compiled kernel has no use for it
    return torch.ops.bitmill.binary_conv2d.default(
        x,
        weight,
        scale,
        bias,
        weight_nonzero,
        shift,
        alpha,
        row_scale,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        levels,
        surrogate,
    )
