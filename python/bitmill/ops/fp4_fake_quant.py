# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation to 4-bit floats: quantised values for training, with a straight-through gradient.

fp4_fake_quant: y = fl(s v), v = fp4(z), z = fl(x / s), in float32, then of x's dtype; NaN stays NaN. Clipped values do
not learn: dx = dy where |z| <= the format's largest value, 0 elsewhere; s has no gradient.
mxfp4_fake_quant: y = x quantised to blocks and back; dx = dy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import FLOATS, check_broadcast, check_one_of, require, short_name
from ._fp4_codes import FORMATS, ROUNDINGS
from .fp4 import code_values, fp4_cast, fp4_uncast, mxfp4_dequantize, mxfp4_quantize

library.define(
    "fp4_fake_quant",
    '(Tensor x, Tensor scale, str format="e2m1", str rounding="nearest_even", SymInt seed=0, SymInt offset=0)'
    " -> (Tensor values, Tensor inside)",
)


@library.default("fp4_fake_quant")
def _fp4_fake_quant_reference(
    x: Tensor, scale: Tensor, format: str = "e2m1", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    _check_fp4_fake_quant(x, scale, format, rounding)
    z = torch.atleast_1d(x.contiguous().float() / scale)
    values = fp4_uncast(fp4_cast(z, format, "max", rounding, seed, offset), z.shape[-1], format)
    values = (torch.where(z.isnan(), z, values).view(x.shape) * scale).to(x.dtype)
    # The division rounds: amax / (amax / largest) may come out a unit in the last place above `largest`.
    return values, (z.abs() <= max(code_values(format)) * (1 + 2**-23)).view(x.shape)


def _check_fp4_fake_quant(x: Tensor, scale: Tensor, format: str, rounding: str) -> None:
    op = "fp4_fake_quant"
    check_one_of(op, "format", format, tuple(FORMATS))
    check_one_of(op, "rounding", rounding, ROUNDINGS)
    require(x.dtype in FLOATS, f"{op}: x must be float32, bfloat16 or float16, got {short_name(x.dtype)}")
    require(scale.dtype == torch.float32, f"{op}: scale must be float32, got {short_name(scale.dtype)}")
    check_broadcast(op, "scale", scale, x.shape)


@torch.library.register_fake("bitmill::fp4_fake_quant")
def _(
    x: Tensor, scale: Tensor, format: str = "e2m1", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    _check_fp4_fake_quant(x, scale, format, rounding)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)


def _setup_fp4_fake_quant(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward_fp4_fake_quant(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None, None, None


torch.library.register_autograd(
    "bitmill::fp4_fake_quant", _backward_fp4_fake_quant, setup_context=_setup_fp4_fake_quant
)


class _Mxfp4FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        return mxfp4_dequantize(*mxfp4_quantize(x, *settings), x.shape[-1]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


def fp4_fake_quant(
    x: Tensor,
    format: str,
    scale: Tensor | float,
    rounding: str = "nearest_even",
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """scale * cast(x / scale), of x's dtype and computed in float32; NaN stays NaN.

    The gradient goes straight through where |x / scale| is at most the format's largest value, and is 0 elsewhere.

    Args:
        x: float32, bfloat16 or float16 of any shape.
        format: "e2m1", "e1m2" or "e3m0".
        scale: a number, or float32 that broadcasts to x's shape; no gradient.
        rounding, seed, offset: as of `fp4_cast`.
    Raises:
        ValueError: for another dtype, unknown names, or a scale that does not broadcast.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=x.device)
    values: Tensor = torch.ops.bitmill.fp4_fake_quant.default(x, scale, format, rounding, seed, offset)[0]
    return values


def mxfp4_fake_quant(
    x: Tensor, scale_rule: str = "floor", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> Tensor:
    """x quantised to MXFP4 blocks and back, of x's dtype. The gradient goes straight through everywhere.

    The arguments are those of `mxfp4_quantize`.
    """
    return _Mxfp4FakeQuant.apply(x, scale_rule, rounding, seed, offset)
