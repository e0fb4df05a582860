# SPDX-License-Identifier: Apache-2.0
"""The casts of the fp4 family: compiled kernels against default kernels bit for bit, and both against the definitions.
Errors, opcheck and compilation of all fp4 ops are in test_fp4_linear.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops import fp4
from problems import LAYOUTS, assert_same_bits, on_every_machine

FORMATS = ("e2m1", "e1m2", "e3m0")
RULES = ("floor", "rceil", "ceil", "even")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
VALUES = {
    "e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "e1m2": (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5),
    "e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16),
}
TIE_CODES = {"e2m1": (0, 2, 2, 4, 4, 6, 6), "e1m2": (0, 2, 2, 4, 4, 6, 6), "e3m0": (0, 2, 3, 4, 5, 6, 7)}
KERNELS = {
    "compiled": (ops.fp4_cast, ops.fp4_uncast, ops.e8m0_cast, ops.mxfp4_quantize, ops.mxfp4_dequantize),
    "default": (
        fp4._fp4_cast_reference,
        fp4._fp4_uncast_reference,
        fp4._e8m0_cast_reference,
        fp4._mxfp4_quantize_reference,
        fp4._mxfp4_dequantize_reference,
    ),
}


def bits(values: Tensor) -> Tensor:
    """Bits of floats, so that the sign of zero counts; one NaN for all."""
    return torch.where(values.isnan(), torch.nan, values).contiguous().view(torch.int32)


def codes_of(x: Tensor, format: str, cast: Callable[..., Tensor] = ops.fp4_cast) -> list[int]:
    return fp4.unpack_nibbles(cast(x, format), x.shape[-1]).tolist()


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def hard_floats() -> Tensor:
    """Both signs of +-64 ulp around every tie and value, special values, and random bits."""
    points = [v for values in VALUES.values() for v in values]
    points += [(a + b) / 2 for values in VALUES.values() for a, b in itertools.pairwise(values)]
    near = torch.tensor(points).view(torch.int32)[:, None] + torch.arange(-64, 65, dtype=torch.int32)
    special = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 1e-40, 3.4028235e38])
    positive = torch.cat([near.clamp_min(0).flatten().view(torch.float32), special])
    random = torch.randint(-(1 << 31), 1 << 31, (4096,)).to(torch.int32).view(torch.float32)
    return torch.cat([positive, -positive, random])


@pytest.mark.parametrize("format", FORMATS)
def test_code_values(format: str) -> None:
    values = ops.code_values(format)
    assert values[:8] == VALUES[format] and values[8:] == tuple(-v for v in VALUES[format])
    packed = torch.arange(16, dtype=torch.uint8) * 17
    expected = torch.tensor(values).repeat_interleave(2)
    for uncast in (ops.fp4_uncast, fp4._fp4_uncast_reference):
        assert torch.equal(bits(uncast(packed, 32, format)), bits(expected))
        assert uncast(packed, 31, format).shape == (31,)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("format", FORMATS)
def test_fp4_cast_rounds_ties(format: str, kernel: str) -> None:
    cast, values = KERNELS[kernel][0], torch.tensor(VALUES[format])
    ties = (values[:-1] + values[1:]) / 2
    codes = torch.tensor(TIE_CODES[format])
    assert codes_of(ties, format, cast) == codes.tolist()
    assert codes_of(-ties, format, cast) == (codes + 8).tolist()
    assert codes_of(ties.nextafter(torch.tensor(0.0)), format, cast) == list(range(7))
    assert codes_of(ties.nextafter(torch.tensor(9e9)), format, cast) == list(range(1, 8))
    assert codes_of(values, format, cast) == list(range(8))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("format", FORMATS)
def test_fp4_cast_special_values(format: str, kernel: str) -> None:
    cast = KERNELS[kernel][0]
    x = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0, 1e-45, -1e-45])
    assert codes_of(x, format, cast) == [7, 15, 7, 15, 0, 8, 0, 8]
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, 1 << 23], dtype=torch.int32).view(torch.float32)
    assert cast(nans, format, "max").tolist() == [0x77, 0x07]
    assert cast(nans, format, "zero").tolist() == [0x00, 0x00]
    assert cast(torch.tensor([1.0, torch.inf]), format, "error").numel() == 1
    with pytest.raises(ValueError, match=r'fp4_cast: x must not have a NaN with nan="error".*nan="max"'):
        cast(nans, format, "error")


def test_first_element_is_in_the_low_nibble() -> None:
    assert ops.fp4_cast(torch.tensor([1.0, 6.0, -0.5])).tolist() == [0x72, 0x09]


@pytest.mark.parametrize("nan", ["max", "zero"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp4_cast_equals_default(dtype: torch.dtype, format: str, nan: str) -> None:
    x = hard_floats() if dtype == torch.float32 else every_half(dtype)
    expected = fp4._fp4_cast_reference(x, format, nan)
    for machine, packed in on_every_machine(lambda: ops.fp4_cast(x, format, nan)):
        assert_same_bits(packed, expected, machine)
    finite = x[x.isfinite()]
    exact = ops.fp4_uncast(ops.fp4_cast(finite, format), finite.numel(), format)
    grid = torch.tensor(ops.code_values(format), dtype=torch.float64)
    distance = (finite.double().unsqueeze(1) - grid).abs().amin(1)
    assert torch.equal((finite.double() - exact).abs(), distance)
    finite = finite.unsqueeze(0)
    expected = fp4._fp4_cast_reference(finite, format, "error")
    for machine, packed in on_every_machine(lambda: ops.fp4_cast(finite, format, "error")):
        assert_same_bits(packed, expected, machine)


@pytest.mark.parametrize("rounding", ["down", "up"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_e8m0_equals_default_and_log2(dtype: torch.dtype, rounding: str) -> None:
    x = hard_floats() if dtype == torch.float32 else every_half(dtype)
    codes = fp4._e8m0_cast_reference(x, rounding)
    for machine, bytes in on_every_machine(lambda: ops.e8m0_cast(x, rounding)):
        assert_same_bits(bytes, codes, machine)
    number = x.isfinite() & (x != 0)
    mantissa, exponent = x[number].double().abs().frexp()
    log2 = exponent - 1 + ((mantissa != 0.5) if rounding == "up" else 0)
    assert torch.equal(codes[number].int(), (log2 + 127).clamp(0, 254).int())
    assert codes[x.isnan()].eq(255).all() and codes[x.isinf()].eq(254).all() and codes[x == 0].eq(0).all()
    every = torch.arange(256, dtype=torch.uint8)
    for machine, values in on_every_machine(lambda: ops.e8m0_uncast(every)):
        assert_same_bits(values, fp4._e8m0_uncast_reference(every), machine)
    assert torch.equal(ops.e8m0_uncast(every[:255]).double(), 2.0 ** (torch.arange(255.0, dtype=torch.float64) - 127))
    assert ops.e8m0_cast(x[0], rounding).shape == () and ops.e8m0_uncast(every[3]).shape == ()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mxfp4_equals_default(dtype: torch.dtype, rule: str) -> None:
    x = hard_floats() if dtype == torch.float32 else every_half(dtype)
    spread = torch.randn(64, 77) * 2.0 ** torch.randint(-140, 127, (64, 1))
    for values in (x, x[torch.randperm(x.numel())], x[x.isfinite()], spread.to(dtype), x[:0], x[:64].view(2, 1, 32)):
        packed, scale = fp4._mxfp4_quantize_reference(values, rule)
        dequantised = fp4._mxfp4_dequantize_reference(packed, scale, values.shape[-1])
        for machine, got in on_every_machine(lambda values=values: ops.mxfp4_quantize(values, rule)):
            assert_same_bits(got[0], packed, machine)
            assert_same_bits(got[1], scale, machine)
            assert_same_bits(ops.mxfp4_dequantize(*got, values.shape[-1]), dequantised, machine)


# Around the 16, 32 and 128 columns that kernels take together, and enough for two threads.
@pytest.mark.parametrize(("m", "k"), [(3, k) for k in (1, 15, 17, 31, 33, 127, 128, 129, 160, 257)] + [(130, 1000)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_of_any_width_and_layout_on_every_machine(m: int, k: int, dtype: torch.dtype) -> None:
    plain = (torch.randn(m, k) * 3).to(dtype)
    plain[0, k // 2], plain[-1, -1], plain[1, 0] = torch.nan, torch.inf, -0.0
    for layout in [*LAYOUTS.values(), lambda x: x]:
        x = layout(plain)

        def everything(x: Tensor = x) -> list[Tensor]:
            packed, (blocks, scale) = ops.fp4_cast(x, "e1m2", "zero"), ops.mxfp4_quantize(x, "rceil")
            return [
                packed,
                ops.fp4_uncast(packed, k, "e1m2"),
                blocks,
                scale,
                ops.mxfp4_dequantize(blocks, scale, k),
                ops.e8m0_cast(x, "up"),
                ops.e8m0_uncast(scale),
            ]

        blocks, scale = fp4._mxfp4_quantize_reference(plain, "rceil")
        packed = fp4._fp4_cast_reference(plain, "e1m2", "zero")
        expected = [
            packed,
            fp4._fp4_uncast_reference(packed, k, "e1m2"),
            blocks,
            scale,
            fp4._mxfp4_dequantize_reference(blocks, scale, k),
            fp4._e8m0_cast_reference(plain, "up"),
            fp4._e8m0_uncast_reference(scale),
        ]
        for machine, results in on_every_machine(everything):
            for got, want in zip(results, expected, strict=True):
                assert_same_bits(got, want, machine)


def test_casts_that_leave_the_caches() -> None:
    x = torch.randn(1 << 23)  # results from 4 MiB on go past the caches
    for width in (x.numel(), x.numel() - 33):
        packed = ops.fp4_cast(x[:width], "e3m0")
        assert_same_bits(packed, fp4._fp4_cast_reference(x[:width], "e3m0"))
        assert_same_bits(ops.fp4_uncast(packed, width, "e3m0"), fp4._fp4_uncast_reference(packed, width, "e3m0"))
        blocks = ops.mxfp4_quantize(x[:width])
        assert_same_bits(ops.mxfp4_dequantize(*blocks, width), fp4._mxfp4_dequantize_reference(*blocks, width))


def test_a_nan_anywhere_is_found() -> None:
    for column in range(300):
        x = torch.ones(1, 300)
        x[0, column] = torch.nan
        with pytest.raises(ValueError, match="must not have a NaN"):
            ops.fp4_cast(x, nan="error")
        assert fp4.unpack_nibbles(ops.fp4_cast(-x), 300).tolist() == [[7 if j == column else 10 for j in range(300)]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_mxfp4_scale_rules(kernel: str) -> None:
    quantize, dequantize = KERNELS[kernel][3:]
    amax = torch.tensor([4.0, 6.0, 6.5, 7.0, 3.0, 3.5, 0.0, torch.inf, torch.nan, 3.4e38])
    expected = {
        "floor": [127, 127, 127, 127, 126, 126, 0, 255, 255, 252],
        "rceil": [127, 127, 128, 128, 126, 127, 0, 255, 255, 253],
        "ceil": [127, 128, 128, 128, 127, 127, 0, 255, 255, 253],
        "even": [127, 127, 127, 128, 126, 127, 0, 255, 255, 255],
    }
    for rule, bytes in expected.items():
        packed, scale = quantize(torch.stack([amax / 8, -amax], 1), rule)
        assert scale.flatten().tolist() == bytes
        assert dequantize(packed, scale, 2)[scale.flatten() == 255].isnan().all()
    assert dequantize(*quantize(torch.tensor([7.9, 6.5]), "floor"), 2).tolist() == [6.0, 6.0]  # it saturates


@pytest.mark.parametrize("shape", [(0,), (7,), (0, 5), (3, 0), (4, 33), (2, 3, 64), (2, 1, 3, 31)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_of_any_shape_and_stride(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = torch.randn(shape).mul(4).to(dtype)
    inputs = [plain, plain.expand(2, *shape), torch.stack([plain, plain], -1)[..., 1]]
    if plain.dim() > 1:
        inputs.append(plain.transpose(0, 1).contiguous().transpose(0, 1))
    for x in inputs:
        packed = ops.fp4_cast(x, "e1m2")
        assert packed.shape == (*x.shape[:-1], -(-x.shape[-1] // 2)) and packed.is_contiguous()
        for kernel in (ops.fp4_cast, fp4._fp4_cast_reference):
            assert torch.equal(kernel(x, "e1m2"), ops.fp4_cast(x.contiguous(), "e1m2"))
        uncast = ops.fp4_uncast(packed, x.shape[-1], "e1m2")
        assert uncast.shape == x.shape and torch.equal(uncast, fp4._fp4_uncast_reference(packed, x.shape[-1], "e1m2"))
        for kernel in (ops.mxfp4_quantize, fp4._mxfp4_quantize_reference):
            got, expected = kernel(x, "even"), ops.mxfp4_quantize(x.contiguous(), "even")
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        for kernel in (ops.e8m0_cast, fp4._e8m0_cast_reference):
            assert torch.equal(kernel(x, "up"), ops.e8m0_cast(x.contiguous(), "up"))
