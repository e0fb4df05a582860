# SPDX-License-Identifier: Apache-2.0
"""Rounding rows to int8: every kernel bit-equal to the default kernel, the rule itself, gradient, opcheck, compile."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops.int8 import _int8_quantize_reference
from problems import HEIGHTS, LAYOUTS, UGLY, WIDTHS, assert_same_bits, on_every_machine

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def assert_rounded_alike(x: Tensor, what: str = "") -> None:
    want = _int8_quantize_reference(x)
    for machine, got in on_every_machine(lambda: ops.int8_quantize(x)):
        for name, g, w in zip(("q", "scale"), got, want, strict=True):
            assert_same_bits(g, w, f"{name} on {machine}, {what} {list(x.shape)} {x.dtype}")


@pytest.mark.parametrize("k", WIDTHS)
def test_int8_quantize_equals_default(k: int) -> None:
    for i, m in enumerate(HEIGHTS):
        assert_rounded_alike(torch.randn(m, k).to(FLOATS[i % 3]) * 10.0 ** (i - 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_quantize_takes_any_layout(layout: str) -> None:
    for problem in UGLY:
        assert_rounded_alike(LAYOUTS[layout](torch.randn(problem.m, problem.k)), problem.name)
    assert_rounded_alike(torch.randn(2, 3, 4, 33))
    assert_rounded_alike(torch.randn(37))


def test_int8_quantize_rounds_ties_to_even_and_keeps_the_largest() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, 126.5, -127.0]])
    q, scale = ops.int8_quantize(x)
    assert q.tolist() == [[127, 0, 2, 0, -2, 126, -127]]
    assert scale.tolist() == [1.0]


def test_int8_quantize_defines_rows_that_are_not_finite() -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, nan, 2.0], [1.0, inf, -2.0], [1e-40, 0.0, -1e-37], [3e38, 1.0, -3e38]])
    assert_rounded_alike(x)
    assert_rounded_alike(x.repeat(1, 20))
    q, scale = ops.int8_quantize(x)
    assert q[0].tolist() == [0, 0, 0] and scale[0] == 0
    assert scale[1].isnan() and q[1].tolist() == [0, 0, 0]
    assert scale[2] == inf and q[2].tolist() == [0, 0, 0]
    assert q[3].tolist() == [0, 0, 0]
    assert q[4].tolist() == [127, 0, -127]


def test_int8_quantize_rounds_every_16_bit_float() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        assert_rounded_alike(every[torch.isfinite(every)].view(-1, 16)[:, 0::2])
        assert_rounded_alike(every.view(-1, 1))


def test_int8_fake_quant_has_the_identity_gradient() -> None:
    x = torch.randn(3, 50, requires_grad=True)
    y = ops.int8_fake_quant(x)
    q, scale = ops.int8_quantize(x.detach())
    assert torch.equal(y, q * scale[:, None])
    weight = torch.randn(3, 50)
    (y * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)
    assert ((y - x).abs() <= scale[:, None] * 0.5001).all()


def test_int8_quantize_passes_opcheck_and_compiles() -> None:
    x = torch.randn(4, 70)
    torch.library.opcheck(torch.ops.bitmill.int8_quantize.default, (x,))
    compiled = torch.compile(ops.int8_fake_quant, fullgraph=True)
    assert torch.equal(compiled(x), ops.int8_fake_quant(x))


@pytest.mark.parametrize("x", [torch.zeros(3, 4, dtype=torch.int32), torch.zeros(())])
def test_int8_quantize_refuses_what_is_not_rows_of_floats(x: Tensor) -> None:
    for call in (ops.int8_quantize, _int8_quantize_reference):
        with pytest.raises(ValueError, match="int8_quantize: x must"):
            call(x)
