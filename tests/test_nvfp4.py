# SPDX-License-Identifier: Apache-2.0
"""E4M3 bytes and NVFP4 blocks against their definition in float64. The golden vectors have torchao's bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops import nvfp4
from bitmill.ops.fp4 import unpack_nibbles
from problems import assert_same_bits, on_every_machine

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EVERY = torch.arange(256, dtype=torch.uint8)


def rounded(x: Tensor) -> Tensor:
    """A result of float64 rounded to float32, which for one product or quotient of float32 numbers is exact."""
    return x.float().double()


def defined(x: Tensor, g: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [m, k], scale bytes [m, k / 16] and values [m, k] of finite rows."""
    blocks = x.double().unflatten(-1, (-1, 16))
    wanted = rounded(rounded(blocks.abs().amax(-1) / 6) / g).clamp(2.0**-6, 448)
    scales = ops.e4m3_uncast(EVERY[:127]).double()
    distance = (wanted.unsqueeze(-1) - scales).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    both = nearest & (EVERY[:127] % 2 == 0) | nearest & (nearest.sum(-1, keepdim=True) == 1)
    byte = both.int().argmax(-1)
    inverse = rounded(rounded(torch.tensor(1 / g, dtype=torch.float64)) / scales[byte])
    codes = unpack_nibbles(ops.fp4_cast(rounded(blocks * inverse.unsqueeze(-1)).float()), 16)
    values = torch.tensor(ops.code_values("e2m1")).double()[codes.long()] * scales[byte].unsqueeze(-1) * g
    return codes.flatten(-2), byte.to(torch.uint8), values.flatten(-2).float()


def test_e4m3() -> None:
    field, mantissa = EVERY.int() >> 3 & 15, EVERY.int() & 7
    magnitude = torch.where(field > 0, 8 + mantissa, mantissa) * 2.0 ** (field.clamp_min(1).double() - 10)
    values = ops.e4m3_uncast(EVERY)
    numbers = (EVERY & 127) != 127
    assert torch.equal(values.double()[numbers], torch.where(EVERY > 127, -magnitude, magnitude)[numbers])
    assert values[127].isnan() and values[255].isnan()
    assert torch.equal(ops.e4m3_cast(values)[numbers], EVERY[numbers])
    x = torch.tensor([torch.inf, -torch.inf, 1e30, 464.1, torch.nan, -torch.nan, 2.0**-10, 2.0**-10 * 1.01, -0.0])
    assert ops.e4m3_cast(x).tolist() == [126, 254, 126, 126, 127, 127, 0, 1, 128]
    assert ops.e4m3_cast(x.bfloat16()[0]).shape == () and ops.e4m3_uncast(EVERY[5]).shape == ()
    assert torch.equal(ops.e4m3_uncast(EVERY[:120].view(10, 12).T), values[:120].view(10, 12).T)


@pytest.mark.parametrize("with_global", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nvfp4_is_its_definition(dtype: torch.dtype, with_global: bool) -> None:
    x = (torch.randn(200, 80) * 2.0 ** torch.randint(-12, 12, (200, 1))).to(dtype)
    x[3] = 0
    for factor in (1.0, 0.1) if with_global else (1.0,):  # with a tenth of what is needed, block scales saturate
        g = ops.nvfp4_global_scale(x) * factor if with_global else None
        codes, byte, values = defined(x, g.item() if g is not None else 1.0)
        packed, scale = ops.nvfp4_quantize(x, g)
        assert torch.equal(unpack_nibbles(packed, 80), codes) and torch.equal(scale, byte)
        assert torch.equal(ops.nvfp4_dequantize(packed, scale, 80, g), values)
        assert packed[3].eq(0).all() and scale[3].eq(8).all()
        stacked = x.view(2, 100, 80).transpose(0, 1)
        assert torch.equal(ops.nvfp4_quantize(stacked, g)[0], packed.view(2, 100, -1).transpose(0, 1))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_nvfp4_of_every_half(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for x in (every, every[torch.randperm(every.numel())]):
        x = x[: x.numel() // 64 * 64].view(-1, 64)
        for g in (None, ops.nvfp4_global_scale(x), torch.tensor(1e-3)):
            codes, byte, values = defined(x, g.item() if g is not None else 1.0)
            packed, scale = ops.nvfp4_quantize(x, g)
            assert torch.equal(unpack_nibbles(packed, 64), codes) and torch.equal(scale, byte)
            assert torch.equal(ops.nvfp4_dequantize(packed, scale, 64, g), values)


def test_nvfp4_global_scale() -> None:
    x = torch.randn(30, 64) * 1e-3
    g = ops.nvfp4_global_scale(x)
    assert g.shape == () and g == x.abs().max() / torch.tensor(2688.0) and ops.nvfp4_quantize(x, g)[1].max() == 126
    # Without one, scales this small are not what E4M3 has: most of the values are lost.
    with_g, without = (ops.nvfp4_dequantize(*ops.nvfp4_quantize(x, s), 64, s) for s in (g, None))
    assert (with_g - x).norm() < 0.12 * x.norm() < (without - x).norm()
    for nothing in (torch.zeros(3, 16), torch.full((3, 16), 1e-45), torch.empty(0, 16), torch.empty(3, 0)):
        g = ops.nvfp4_global_scale(nothing)
        assert g == 2.0**-120
        assert ops.nvfp4_dequantize(*ops.nvfp4_quantize(nothing, g), nothing.shape[1], g).eq(0).all()


def test_nvfp4_blocks_and_global_scales_that_are_not_numbers() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 40)
        x[0, 17] = value
        packed, scale = ops.nvfp4_quantize(x, ops.nvfp4_global_scale(x))
        assert (scale == 127).tolist() == [[False, True, False], [False] * 3]
        assert unpack_nibbles(packed, 40)[0, 16:32].eq(0).all()
        assert ops.nvfp4_dequantize(packed, scale, 40).isnan().sum() == 16
    for g in (0.0, -1.0, torch.nan, torch.inf, 1e-40):
        packed, scale = ops.nvfp4_quantize(torch.randn(2, 40), torch.tensor(g))
        assert scale.eq(127).all() and packed.eq(0).all()


@pytest.mark.parametrize("shape", [(0,), (7,), (0, 5), (3, 0), (2, 1, 3, 31)], ids=str)
def test_nvfp4_of_any_shape(shape: tuple[int, ...]) -> None:
    x, k = torch.randn(shape), shape[-1]
    packed, scale = ops.nvfp4_quantize(x)
    assert packed.shape == (*shape[:-1], -(-k // 2)) and scale.shape == (*shape[:-1], -(-k // 16))
    values = ops.nvfp4_dequantize(packed, scale, k)
    assert values.shape == shape
    padded = torch.nn.functional.pad(x, (0, -k % 16))
    assert torch.equal(ops.nvfp4_quantize(padded)[1], scale)
    assert torch.equal(ops.nvfp4_dequantize(*ops.nvfp4_quantize(padded), padded.shape[-1])[..., :k], values)


def test_nvfp4_fake_quant_in_a_compiled_graph() -> None:
    x = torch.randn(6, 50, dtype=torch.bfloat16).requires_grad_()
    g = torch.tensor(1e-3)

    def everything(t: Tensor) -> Tensor:
        return ops.nvfp4_fake_quant(t, g) + ops.nvfp4_fake_quant(t) * ops.e4m3_uncast(ops.e4m3_cast(t.detach()))

    out = ops.nvfp4_fake_quant(x, g)
    packed, scale = ops.nvfp4_quantize(x.detach(), g)
    assert torch.equal(out, ops.nvfp4_dequantize(packed, scale, 50, g).bfloat16())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.eq(1).all() and grad.dtype == x.dtype  # also where blocks saturate
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 3):
        assert torch.equal(compiled(x[:m]), everything(x[:m]))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", "toward_zero", "half_away"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nvfp4_kernels_equal_the_default_ones(dtype: torch.dtype, rounding: str) -> None:
    x = (torch.randn(5, 3, 77) * 2.0 ** torch.randint(-20, 20, (5, 3, 1))).to(dtype)
    x[0, 0, 3], x[1, 0, 40] = torch.nan, torch.inf
    for g in (None, torch.tensor(0.013), torch.tensor(-1.0)):
        for rows in (x, x.transpose(0, 1)):
            arguments = (rows, g, rounding, -7, 2**40 + 3)
            codes = nvfp4._nvfp4_quantize_reference(*arguments)
            want = [*codes, nvfp4._nvfp4_dequantize_reference(*codes, 77, g)]

            def both(arguments: tuple = arguments, g: Tensor | None = g) -> list[Tensor]:
                packed, scale = torch.ops.bitmill.nvfp4_quantize.default(*arguments)
                return [packed, scale, torch.ops.bitmill.nvfp4_dequantize.default(packed, scale, 77, g)]

            for machine, results in on_every_machine(both):
                for got, expected in zip(results, want, strict=True):
                    assert_same_bits(got, expected, machine)


def test_nvfp4_opcheck() -> None:
    x, g = torch.randn(3, 37), torch.tensor(0.01)
    torch.library.opcheck(torch.ops.bitmill.e4m3_cast.default, (x.T,))
    torch.library.opcheck(torch.ops.bitmill.e4m3_uncast.default, (EVERY[:120].view(10, 12).T,))
    for rows, scale_of_all in ((x, g), (x.T.half(), None), (x[0], g), (x[:0], None)):
        torch.library.opcheck(torch.ops.bitmill.nvfp4_quantize.default, (rows, scale_of_all))
        arguments = (*ops.nvfp4_quantize(rows, scale_of_all), rows.shape[-1], scale_of_all)
        torch.library.opcheck(torch.ops.bitmill.nvfp4_dequantize.default, arguments)


def test_nvfp4_errors() -> None:
    x, byte, scale = torch.randn(2, 40), torch.zeros(2, 20, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)
    g = torch.tensor(1.0)
    for call, arguments, message in (
        (ops.e4m3_cast, (x.double(),), "e4m3_cast: x must be float32, bfloat16 or float16, got float64"),
        (ops.e4m3_uncast, (x,), "e4m3_uncast: codes must be uint8, got float32"),
        (ops.nvfp4_quantize, (x.int(),), "nvfp4_quantize: x must be float32, bfloat16 or float16, got int32"),
        (ops.nvfp4_quantize, (x[0, 0],), "nvfp4_quantize: x must have at least one dimension"),
        (ops.nvfp4_quantize, (x, g.view(1)), r"global_scale must have shape \[\], got \[1\]"),
        (ops.nvfp4_quantize, (x, g.double()), "global_scale must be float32, got float64"),
        (ops.nvfp4_dequantize, (byte, scale, 42), r"packed must have ceil\(k / 2\) bytes .* k = 42 and 20"),
        (ops.nvfp4_dequantize, (byte.int(), scale, 40), "packed must be uint8, got int32"),
        (ops.nvfp4_dequantize, (byte, scale[:, :2], 40), r"scale must have shape \[2, 3\], got \[2, 2\]"),
        (ops.nvfp4_dequantize, (byte, x[:, :3], 40), "scale must be uint8, got float32"),
        (ops.nvfp4_dequantize, (byte, scale, 40, g.to("meta")), "global_scale must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
