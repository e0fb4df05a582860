# SPDX-License-Identifier: Apache-2.0
"""LLM-FP4's quantiser against its published formula in float64. The golden vectors have the published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill import ops

BITS = {"e2m1": (2, 1), "e1m2": (1, 2), "e3m0": (3, 0)}
each_format = pytest.mark.parametrize("format", BITS)


def published(x: Tensor, bias: Tensor, format: str) -> Tensor:
    exponent_bits, mantissa_bits = BITS[format]
    largest = (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    x = torch.minimum(torch.maximum(x, -largest), largest)
    unit = 2.0 ** ((x.abs().log2() + bias).floor().clamp_min(1) - mantissa_bits - bias)
    return unit * (x / unit).round()


@each_format
def test_fpq_is_the_published_formula(format: str) -> None:
    x = torch.randn(40, 33)
    amax = x.abs().amax(1, keepdim=True)
    for bias in (ops.fpq_bias(amax, format), torch.randn(33), torch.tensor(1.25), torch.randint(-3, 4, (40, 33))):
        packed = ops.fpq_quantize(x, bias, format)
        want = published(x.double(), bias.double(), format)
        values = ops.fpq_dequantize(packed, bias, 33, format)
        torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=0)
        fake = ops.fp4_fake_quant(x, format, ops.fpq_scale(bias, format))
        assert torch.equal(fake, values)


@each_format
def test_fpq_bias_takes_the_largest_magnitude_to_the_largest_value(format: str) -> None:
    amax = torch.rand(1000) + 0.01
    largest = max(ops.code_values(format)) * ops.fpq_scale(ops.fpq_bias(amax, format), format)
    torch.testing.assert_close(largest, amax, rtol=2e-6, atol=0)
    assert ops.fpq_bias(torch.tensor(6.0), "e2m1") == 1 and ops.fpq_scale(torch.tensor(1.0), "e2m1") == 1


def test_fpq_errors() -> None:
    x, bias = torch.randn(4, 6), torch.zeros(4, 1)
    for call, message in (
        (
            lambda: ops.fpq_quantize(x.double(), bias),
            "fpq_quantize: x must be float32, bfloat16 or float16, got float64",
        ),
        (lambda: ops.fpq_quantize(x, bias, "nf4"), "fpq_quantize: format must be"),
        (lambda: ops.fpq_bias(x, "e4m3"), "fpq_bias: format must be"),
        (lambda: ops.fpq_scale(x, "e4m3"), "fpq_scale: format must be"),
        (lambda: ops.fpq_quantize(x, bias[:, 0]), r"bias must be broadcastable to \[4, 6\], got shape \[4\]"),
        (lambda: ops.fpq_quantize(x, bias[None]), r"bias must be broadcastable to \[4, 6\], got shape \[1, 4, 1\]"),
        (
            lambda: ops.fpq_dequantize(ops.fpq_quantize(x, bias), bias[:3], 6),
            r"fpq_dequantize: bias must be broadcastable to \[4, 6\], got shape \[3, 1\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
