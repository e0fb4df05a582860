# SPDX-License-Identifier: Apache-2.0
"""Rows of floats to int8 with one scale a row: the activations of integer products with packed weights.

amax = max |x|,  scale = fl(amax / 127),  q = rint(fl(x * fl(127 / amax))) in [-127, 127], ties to even; x ~ scale q.
q is 0 where that product is not finite; a NaN in the row makes its scale NaN. All arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import check_rows

ACTIVATIONS = ("float", "int8")  # how a packed layer multiplies its activations

library.define("int8_quantize", "(Tensor x) -> (Tensor q, Tensor scale)")


@library.default("int8_quantize")
def _int8_quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows("int8_quantize", x)
    values = x.float()
    amax = values.abs().amax(-1) if x.shape[-1] else values.new_zeros(x.shape[:-1])
    top = torch.full_like(amax, 127.0)  # torch may divide by a number as a product with its reciprocal
    q = (values * (top / amax).unsqueeze(-1)).round()
    q = torch.where(q.isfinite(), q, 0.0)
    return q.to(torch.int8), amax / top


@torch.library.register_fake("bitmill::int8_quantize")
def _(x):
    check_rows("int8_quantize", x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def int8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row of x to int8 with a scale of its own; the rule is in the module docstring.

    Args:
        x: float32, bfloat16 or float16 [..., k].
    Returns:
        q int8 [..., k] and scale float32 [...]. No gradient; `int8_fake_quant` has a straight-through one.
    Raises:
        ValueError: for a scalar or another dtype.
    """
    return torch.ops.bitmill.int8_quantize.default(x)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        q, scale = int8_quantize(x)
        return q * scale.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def int8_fake_quant(x: Tensor) -> Tensor:
    """scale * q of `int8_quantize`, float32 [..., k] from float32 x, with the straight-through identity gradient."""
    return _FakeQuant.apply(x)
