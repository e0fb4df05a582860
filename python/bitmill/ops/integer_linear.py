# SPDX-License-Identifier: Apache-2.0
"""Products of whole numbers of a few bits with planes of 1-bit weights, on the binary kernels.

dot_p[.., o] = sum_k code[.., k] w_p[o, k] is exact. Codes -1, 0, +1 are one ternary product. Two bits go bit by bit:
code = sum_j 2^j q_j in two's complement, each q_j in {0, 1} a row of bits for `binary_matmul`, whose products are added
as integers. More bits go through the kernel for float activations, whose sums of whole numbers below 2^24 are exact.
y = sum_p fl(fl(scale[o, p] step) dot_p) + fl(fl(scale[o, p] offset) sum_k w_p[o, k]) + bias, float32, planes first to
last: the product of the activation step * code + offset with the weight sum_p scale_p w_p.
Source: Zhou et al., DoReFa-Net, 2016, equation 3 (bit convolution of fixed-point numbers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library as library
from ._checks import check_rows, check_tensor, require, tile_shape
from .binary_matmul import binary_linear, binary_matmul, binary_weight_linear, unpack_signs
from .bitpack import bitpack

# No defaults: every argument is given by the wrapper.
library.define(
    "integer_linear",
    "(Tensor value, Tensor code, Tensor weight, Tensor scale, Tensor? bias, Tensor? weight_nonzero, Tensor step,"
    " Tensor? offset, int low, int high) -> Tensor",
)


def plane_sum(
    dots: Sequence[Tensor],
    totals: Sequence[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    offset: Tensor | None,
) -> Tensor:
    """The epilogue: y from dots, one [..., n] a plane, which it may overwrite, and sums of the weights, [n] a plane."""
    out = None
    for p, dot in enumerate(dots):
        part = dot.float().add_(0.0).mul_(scale[:, p] * step)  # an integer has no -0, but a float product may answer it
        out = part if out is None else out.add_(part)
        if offset is not None:
            out = out.add_(scale[:, p] * offset * totals[p].float())
    assert out is not None
    return out if bias is None else out.add_(bias)


def _width(low: int, high: int) -> int:
    """Bits of a code in two's complement."""
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + (low < 0)


def _bit_planes(code: Tensor, low: int, high: int) -> list[tuple[int, Tensor]]:
    """The bits of the codes as packed rows, and what each is worth."""
    whole, last = code.to(torch.int16), _width(low, high) - 1
    rows = [bitpack(((whole >> j) & 1).to(torch.bfloat16), None, "bool", 0.5)[0] for j in range(last + 1)]
    return [(-(1 << j) if low < 0 and j == last else 1 << j, row) for j, row in enumerate(rows)]


@library.default("integer_linear")
def _integer_linear_reference(
    value: Tensor,
    code: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_nonzero: Tensor | None,
    step: Tensor,
    offset: Tensor | None,
    low: int,
    high: int,
) -> Tensor:
    _check_integer_linear(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high)
    n, k = scale.shape[0], code.shape[-1]
    zeros = [None] * len(weight) if weight_nonzero is None else list(weight_nonzero)
    ternary, exact = low >= -1 and high <= 1, max(high, -low) * k < 1 << 24
    if (ternary or (exact and _width(low, high) > 2)) and len(weight) == 1 and step.dim() == 0 and offset is None:
        scale = scale * step  # the kernel's own epilogue is this one
        if ternary:
            return binary_linear(code, weight[0], scale, bias, zeros[0], surrogate="identity")
        return binary_weight_linear(code, weight[0], scale, bias, zeros[0])
    if ternary:
        sign, nonzero, _, _ = bitpack(code)
        dots = [binary_matmul(sign, plane, n, k, nonzero, z) for plane, z in zip(weight, zeros, strict=True)]
    elif exact and _width(low, high) > 2:
        ones = scale.new_ones(n, 1)
        dots = [binary_weight_linear(code, plane, ones, None, z) for plane, z in zip(weight, zeros, strict=True)]
    else:
        whole = torch.int32 if max(high, -low) * k < 1 << 31 else torch.int64
        rows, dots = _bit_planes(code, low, high), []
        for plane, z in zip(weight, zeros, strict=True):
            parts = [(worth, binary_matmul(row, plane, n, k, None, z, "bool")) for worth, row in rows]
            total = parts[0][1].to(whole)
            for worth, part in parts[1:]:
                total.add_(part.to(whole), alpha=worth)
            dots.append(total)
    totals: list[Tensor] = []
    if offset is not None:
        ones = bitpack(code.new_ones(k), None, "bool", 0.5)[0]
        totals = [binary_matmul(ones, plane, n, k, None, z, "bool") for plane, z in zip(weight, zeros, strict=True)]
    return plane_sum(dots, totals, scale, bias, step, offset)


def _check_integer_linear(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high) -> None:
    op = "integer_linear"
    k = check_rows(op, code, "code")
    check_tensor(op, "code", code, torch.float32, code.shape, code)
    check_tensor(op, "value", value, torch.float32, code.shape, code)
    require(
        -128 <= low <= 0 < high <= 255, f"{op}: low must be from -128 to 0 and high from 1 to 255, got {low} and {high}"
    )
    require(
        scale.dim() == 2 and scale.shape[1] > 0,
        f"{op}: scale must have shape [n, planes] with a plane at least, got {list(scale.shape)}",
    )
    n, planes = scale.shape
    check_tensor(op, "scale", scale, torch.float32, [n, planes], code)
    check_tensor(
        op, "weight", weight, torch.int32, [planes, *tile_shape(n, k)], code, "; stack the planes of tile_pack"
    )
    check_tensor(op, "weight_nonzero", weight_nonzero, torch.int32, weight.shape, code)
    check_tensor(op, "bias", bias, torch.float32, [n], code)
    for name, t in (("step", step), ("offset", offset)):
        shape = [] if t is None or t.dim() == 0 else [*code.shape[:-1], 1]
        check_tensor(op, name, t, torch.float32, shape, code)


@torch.library.register_fake("bitmill::integer_linear")
def _(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high):
    _check_integer_linear(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high)
    return code.new_empty((*code.shape[:-1], scale.shape[0]))


def _setup_integer_linear(ctx, inputs, output) -> None:
    value, _, weight, scale, _, weight_nonzero, *_ = inputs
    ctx.k = value.shape[-1]
    ctx.save_for_backward(weight, scale, weight_nonzero)


def _backward_integer_linear(ctx, grad):
    weight, scale, weight_nonzero = ctx.saved_tensors
    dense = scale.new_zeros((scale.shape[0], ctx.k))
    for p, plane in enumerate(weight):
        zeros = None if weight_nonzero is None else weight_nonzero[p]
        dense = dense + scale[:, p : p + 1] * unpack_signs(plane, zeros, scale.shape[0], ctx.k)
    with library.without_autocast(grad):
        grad_value = grad @ dense
    grad_bias = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[4] else None
    return grad_value, None, None, None, grad_bias, None, None, None, None, None


torch.library.register_autograd(
    "bitmill::integer_linear", _backward_integer_linear, setup_context=_setup_integer_linear
)


def integer_linear(
    value: Tensor,
    code: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    step: Tensor | None = None,
    offset: Tensor | None = None,
    low: int = 0,
    high: int = 1,
) -> Tensor:
    """A linear layer on activations of a few bits and weights of one or more planes of signs.

    Args:
        value: float32 [..., k], what the codes stand for: step * code + offset. Only its gradient is used.
        code: float32 [..., k] of whole numbers from `low` to `high`.
        weight, weight_nonzero: int32 [planes, ...], one plane of tiles of n x k bits after the other (`tile_pack`).
        scale: float32 [n, planes].
        bias: float32 [n] or None.
        step, offset: float32 scalar tensors or [..., 1]; None for 1 and 0.
        low, high: the range of the codes, within -128 ... 255.
    Returns:
        float32 [..., n]. Gradients flow to value and bias.
    Raises:
        ValueError: for wrong shapes, dtypes or ranges.
    """
    step = scale.new_ones(()) if step is None else step
    return torch.ops.bitmill.integer_linear.default(
        value, code, weight, scale, bias, weight_nonzero, step, offset, low, high
    )
