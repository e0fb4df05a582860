# SPDX-License-Identifier: Apache-2.0
"""Double quantisation of scales: the published map, the nearest codes, and what is lost."""

from __future__ import annotations

import pytest
import torch

from bitmill import ops

# Values of a quant_map in a file that bitsandbytes 0.50 wrote, by code.
RECORDED = {
    **{0: -0.992968738079071, 1: -0.9789062738418579, 20: -0.7117187976837158, 126: -5.500000384017767e-07, 127: 0.0},
    **{
        128: 5.500000384017767e-07,
        129: 3.250000190746505e-06,
        200: 0.23359374701976776,
        254: 0.992968738079071,
        255: 1,
    },
}


def test_nested_map() -> None:
    values = ops.nested_map()
    assert values.shape == (256,) and (values.diff() > 0).all()
    assert {code: values[code].item() for code in RECORDED} == RECORDED
    formula = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / 2**i) for i in range(7) for j in range(2**i)]
    expected = torch.tensor(sorted([0.0, 1.0, *formula, *(-v for v in formula)]))
    torch.testing.assert_close(values, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(40, 77), (256,), (3, 1, 300), ()], ids=str)
def test_nested_quantize_takes_the_nearest_codes(shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape) + 0.5
    codes, group_scale, offset = ops.nested_quantize(scale)
    assert codes.shape == shape and codes.dtype == torch.uint8 and offset == scale.mean()
    values = ops.nested_dequantize(codes, group_scale, offset)
    blocks = (scale.flatten() - offset).split(256)
    assert torch.equal(group_scale, torch.stack([block.abs().max() for block in blocks]))
    for block, code, largest, value in zip(
        blocks, codes.flatten().split(256), group_scale, values.flatten().split(256), strict=True
    ):
        assert torch.equal(value, ops.nested_map()[code.int()] * largest + offset)
        distance = (block.unsqueeze(1) - ops.nested_map() * largest).abs()
        chosen = distance.gather(1, code.long().unsqueeze(1)).squeeze(1)
        assert (chosen <= distance.amin(1) * (1 + 1e-5) + 1e-7).all()


def test_nested_scales_of_a_weight() -> None:
    weight = torch.randn(256, 512) * 0.02
    packed, scale = ops.codebook4_quantize(weight, "nf4", 64)
    codes, group_scale, offset = ops.nested_quantize(scale)
    bytes = packed.nbytes + codes.nbytes + group_scale.nbytes + offset.nbytes
    assert 8 * bytes / weight.numel() == 4 + 8 / 64 + 32 / (64 * 256) + 32 / weight.numel()
    nested = ops.nested_dequantize(codes, group_scale, offset)
    errors = [
        (ops.codebook4_dequantize(packed, s, "nf4", 512, 64) - weight).norm() / weight.norm() for s in (scale, nested)
    ]
    assert errors[0] < errors[1] < 1.01 * errors[0]


def test_nested_scales_that_are_equal_or_absent() -> None:
    for scale in (torch.zeros(3, 4), torch.full((3, 4), 0.25), torch.empty(0, 4)):
        assert torch.equal(ops.nested_dequantize(*ops.nested_quantize(scale)), scale)


def test_nested_errors() -> None:
    scale = torch.rand(300)
    codes, group_scale, offset = ops.nested_quantize(scale)
    for call, arguments, message in (
        (ops.nested_quantize, (scale.half(),), "nested_quantize: scale must be float32, got float16"),
        (ops.nested_quantize, (scale / 0,), "nested_quantize: scale must be finite, got NaN or infinity"),
        (ops.nested_dequantize, (codes.int(), group_scale, offset), "codes must be uint8, got int32"),
        (ops.nested_dequantize, (codes, group_scale[:1], offset), r"group_scale must have shape \[2\], got \[1\]"),
        (ops.nested_dequantize, (codes, group_scale, offset.view(1)), r"offset must have shape \[\], got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
