# SPDX-License-Identifier: Apache-2.0
"""Products of b-bit whole numbers with planes of 1-bit weights, bit by bit on the binary kernels.

dot_p[.., o] = sum_k code[.., k] w_p[o, k] is exact: code = sum_j 2^j q_j in two's complement, each q_j in {0, 1} is a
row of bits for `binary_matmul`, and the products are added as integers; codes -1, 0, +1 are one ternary product.
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
from .binary_matmul import binary_matmul, unpack_signs
from .bitpack import bitpack

# No defaults: every argument is given by the wrapper.
library.define(
    "bit_serial_linear",
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
    """The epilogue: y from dots, one [..., n] a plane, and sums of the weights, one [n] a plane."""
    out = scale.new_zeros(())
    for p, dot in enumerate(dots):
        out = out + scale[:, p] * step * (dot.float() + 0.0)
        if offset is not None:
            out = out + scale[:, p] * offset * totals[p].float()
    return out if bias is None else out + bias


def _code_planes(code: Tensor, low: int, high: int) -> list[tuple[int, Tensor]]:
    """Bits of the codes in two's complement: (what a bit is worth, float of 0 and 1)."""
    width = max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + (low < 0)
    whole = code.to(torch.int16)
    worth = [1 << j for j in range(width)]
    if low < 0:
        worth[-1] = -worth[-1]
    return [(w, ((whole >> j) & 1).to(torch.bfloat16)) for j, w in enumerate(worth)]


@library.default("bit_serial_linear")
def _bit_serial_linear_reference(
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
    _check_bit_serial_linear(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high)
    n, k = scale.shape[0], code.shape[-1]
    rows: list[tuple[int, Tensor, Tensor | None]]
    if low >= -1 and high <= 1:
        rows = [(1, *bitpack(code)[:2])]
    else:
        rows = [(worth, bitpack(bits, None, "bool", 0.5)[0], None) for worth, bits in _code_planes(code, low, high)]
    ones = bitpack(code.new_ones(k), None, "bool", 0.5)[0]
    whole = torch.int64 if k * max(high, -low) >= 1 << 31 else torch.int32
    dots, totals = [], []
    for p, plane in enumerate(weight):
        zeros = None if weight_nonzero is None else weight_nonzero[p]
        total = torch.zeros((), dtype=whole, device=code.device)
        for worth, sign, nonzero in rows:
            levels = "bool" if nonzero is None else "sign"
            total = total + worth * binary_matmul(sign, plane, n, k, nonzero, zeros, levels)
        dots.append(total)
        totals.append(binary_matmul(ones, plane, n, k, None, zeros, "bool"))
    return plane_sum(dots, totals, scale, bias, step, offset)


def _check_bit_serial_linear(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high) -> None:
    op = "bit_serial_linear"
    k = check_rows(op, code, "code")
    check_tensor(op, "code", code, torch.float32, code.shape, code)
    check_tensor(op, "value", value, torch.float32, code.shape, code)
    require(
        -128 <= low <= 0 < high <= 255, f"{op}: low must be from -128 to 0 and high from 1 to 255, got {low} and {high}"
    )
    require(scale.dim() == 2, f"{op}: scale must have shape [n, planes], got {list(scale.shape)}")
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


@torch.library.register_fake("bitmill::bit_serial_linear")
def _(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high):
    _check_bit_serial_linear(value, code, weight, scale, bias, weight_nonzero, step, offset, low, high)
    return code.new_empty((*code.shape[:-1], scale.shape[0]))


def _setup_bit_serial_linear(ctx, inputs, output) -> None:
    value, _, weight, scale, _, weight_nonzero, *_ = inputs
    ctx.k = value.shape[-1]
    ctx.save_for_backward(weight, scale, weight_nonzero)


def _backward_bit_serial_linear(ctx, grad):
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
    "bitmill::bit_serial_linear", _backward_bit_serial_linear, setup_context=_setup_bit_serial_linear
)


def bit_serial_linear(
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
        low, high: the range of the codes; at least -128 and at most 255. Its width is the number of products.
    Returns:
        float32 [..., n]. Gradients flow to value and bias.
    Raises:
        ValueError: for wrong shapes, dtypes or ranges.
    """
    step = scale.new_ones(()) if step is None else step
    return torch.ops.bitmill.bit_serial_linear.default(
        value, code, weight, scale, bias, weight_nonzero, step, offset, low, high
    )
