# SPDX-License-Identifier: Apache-2.0
"""NVFP4: E2M1 codes, an E4M3 scale for 16 columns, and, if wanted, one float32 scale g for the whole tensor.

A byte of E4M3 is a sign, 4 exponent bits with bias 7 and 3 mantissa bits; 127 (255) is NaN, 448 the largest value.
  scale byte = E4M3(clamp(fl(fl(amax / 6) / g), 2^-6, 448)),  s its value,  r = fl(fl(1 / g) / s)
  code = E2M1(fl(x r)), rounded as fp4.py says, saturating;  x ~ fl(e2m1 s g)
with a single rounding wherever fl is; without g, 1 stands for it. g is what values are multiplied with to decode them:
amax / 2688 (448 times 6) uses all of E4M3. Some files hold its reciprocal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import FLOATS, ceil_div, check_one_of, check_rows, check_tensor, require, short_name
from ._fp4_codes import ROUNDINGS, codes, stochastic_words
from ._groups import columns_of_groups
from .fp4 import check_packed, pack_nibbles, table, to_blocks, unpack_nibbles

NV_BLOCK = 16
E4M3_MAX, _E2M1_MAX, _SMALLEST_SCALE = 448.0, 6.0, 2.0**-6
_NAN = 127

library.define("e4m3_cast", "(Tensor x) -> Tensor")
library.define("e4m3_uncast", "(Tensor codes) -> Tensor")
library.define(
    "nvfp4_quantize",
    '(Tensor x, Tensor? global_scale=None, str rounding="nearest_even", SymInt seed=0, SymInt offset=0)'
    " -> (Tensor packed, Tensor scale)",
)
library.define("nvfp4_dequantize", "(Tensor packed, Tensor scale, int k, Tensor? global_scale=None) -> Tensor")


@library.default("e4m3_cast")
def _e4m3_cast_reference(x: Tensor) -> Tensor:
    _check_e4m3_cast(x)
    values = x.float().contiguous()
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(values.isnan(), _NAN, codes)


@library.default("e4m3_uncast")
def _e4m3_uncast_reference(codes: Tensor) -> Tensor:
    _check_e4m3_uncast(codes)
    return codes.contiguous().view(torch.float8_e4m3fn).float()


@library.default("nvfp4_quantize")
def _nvfp4_quantize_reference(
    x: Tensor, global_scale: Tensor | None = None, rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    _check_nvfp4_quantize(x, global_scale, rounding)
    k = x.shape[-1]
    blocks = to_blocks(x.float(), NV_BLOCK)
    words = stochastic_words(x, rounding, seed, offset)
    words = None if words is None else to_blocks(words, NV_BLOCK)
    amax = blocks.abs().amax(-1)
    # Full tensors: torch may divide by a number as a product with its reciprocal.
    factor = torch.ones_like(amax) if global_scale is None else global_scale.expand_as(amax)
    wanted = amax / torch.full_like(amax, _E2M1_MAX) / factor
    byte = _e4m3_cast_reference(wanted.clamp(_SMALLEST_SCALE, E4M3_MAX))
    inverse = 1 / factor / _e4m3_uncast_reference(byte)
    valid = (amax < torch.inf) & (inverse > 0) & (inverse < torch.inf)
    code = codes(blocks * inverse.unsqueeze(-1), "e2m1", rounding, words)
    code = torch.where(valid.unsqueeze(-1), code, 0)
    return pack_nibbles(code.flatten(-2)[..., :k]), torch.where(valid, byte, _NAN)


@library.default("nvfp4_dequantize")
def _nvfp4_dequantize_reference(packed: Tensor, scale: Tensor, k: int, global_scale: Tensor | None = None) -> Tensor:
    _check_nvfp4_dequantize(packed, scale, k, global_scale)
    factors = columns_of_groups(_e4m3_uncast_reference(scale), k, NV_BLOCK)
    values = table("e2m1", packed.device)[unpack_nibbles(packed, k).int()] * factors  # exact
    return values if global_scale is None else values * global_scale


def _check_e4m3_cast(x: Tensor) -> None:
    require(x.dtype in FLOATS, f"e4m3_cast: x must be float32, bfloat16 or float16, got {short_name(x.dtype)}")


def _check_e4m3_uncast(codes: Tensor) -> None:
    check_tensor("e4m3_uncast", "codes", codes, torch.uint8, codes.shape, codes)


def _check_nvfp4_quantize(x: Tensor, global_scale: Tensor | None, rounding: str) -> None:
    check_one_of("nvfp4_quantize", "rounding", rounding, ROUNDINGS)
    check_rows("nvfp4_quantize", x)
    check_tensor("nvfp4_quantize", "global_scale", global_scale, torch.float32, [], x)


def _check_nvfp4_dequantize(packed: Tensor, scale: Tensor, k: int, global_scale: Tensor | None) -> None:
    op = "nvfp4_dequantize"
    check_packed(op, packed, k)
    check_tensor(op, "scale", scale, torch.uint8, [*packed.shape[:-1], ceil_div(k, NV_BLOCK)], packed)
    check_tensor(op, "global_scale", global_scale, torch.float32, [], packed)


@torch.library.register_fake("bitmill::e4m3_cast")
def _(x: Tensor) -> Tensor:
    _check_e4m3_cast(x)
    return x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.register_fake("bitmill::e4m3_uncast")
def _(codes: Tensor) -> Tensor:
    _check_e4m3_uncast(codes)
    return codes.new_empty(codes.shape, dtype=torch.float32)


@torch.library.register_fake("bitmill::nvfp4_quantize")
def _(
    x: Tensor, global_scale: Tensor | None = None, rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    _check_nvfp4_quantize(x, global_scale, rounding)
    *leading, k = x.shape
    packed = x.new_empty((*leading, ceil_div(k, 2)), dtype=torch.uint8)
    return packed, x.new_empty((*leading, ceil_div(k, NV_BLOCK)), dtype=torch.uint8)


@torch.library.register_fake("bitmill::nvfp4_dequantize")
def _(packed: Tensor, scale: Tensor, k: int, global_scale: Tensor | None = None) -> Tensor:
    _check_nvfp4_dequantize(packed, scale, k, global_scale)
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.float32)


def e4m3_cast(x: Tensor) -> Tensor:
    """Cast to the nearest E4M3, ties to even, saturating at 448: uint8 of x's shape; NaN is 127."""
    return torch.ops.bitmill.e4m3_cast.default(x)


def e4m3_uncast(codes: Tensor) -> Tensor:
    """The values float32 of E4M3 bytes, uint8."""
    return torch.ops.bitmill.e4m3_uncast.default(codes)


def nvfp4_global_scale(x: Tensor) -> Tensor:
    """amax / 2688 of the finite values, float32 []: with it the largest block scale is E4M3's largest value.

    It is at least 2^-120, also for zeros, so that no reciprocal in the quantisation overflows.
    """
    magnitude = x.detach().float().abs()
    amax = torch.where(magnitude < torch.inf, magnitude, 0.0).amax() if x.numel() else magnitude.new_zeros(())
    return (amax / torch.full_like(amax, E4M3_MAX * _E2M1_MAX)).clamp_min(2.0**-120)


def nvfp4_quantize(
    x: Tensor, global_scale: Tensor | None = None, rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise to NVFP4 in blocks of 16 along the last dimension; a partial block counts as filled with zeros.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        global_scale: float32 [], what decoded values are multiplied with besides (not its reciprocal), such as
            `nvfp4_global_scale(x)`; None for 1, with which blocks above 2688 saturate, and ones far below 1 are 0.
        rounding, seed, offset: of the codes, as of `fp4_cast`; scales are rounded to nearest even.
    Returns:
        packed: uint8 [..., ceil(k / 2)], E2M1 codes.
        scale: uint8 [..., ceil(k / 16)], E4M3, at least 2^-6 (byte 8), also for zeros; 127 (NaN), with codes 0, for a
            block with a NaN or an infinity, and for all blocks where global_scale is not positive and finite, or so
            small that a reciprocal overflows.
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names.
    Source: torchao, nvfp4_quantize.
    """
    return torch.ops.bitmill.nvfp4_quantize.default(x, global_scale, rounding, seed, offset)


def nvfp4_dequantize(packed: Tensor, scale: Tensor, k: int, global_scale: Tensor | None = None) -> Tensor:
    """Undo `nvfp4_quantize`: float32 [..., k]; a block whose scale is 127 is NaN."""
    return torch.ops.bitmill.nvfp4_dequantize.default(packed, scale, k, global_scale)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, global_scale: Tensor | None, *rounding: Any) -> Tensor:
        packed, scale = nvfp4_quantize(x, global_scale, *rounding)
        return nvfp4_dequantize(packed, scale, x.shape[-1], global_scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


def nvfp4_fake_quant(
    x: Tensor, global_scale: Tensor | None = None, rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> Tensor:
    """x quantised to NVFP4 and back, of x's dtype. The gradient goes straight through everywhere.

    The arguments are those of `nvfp4_quantize`.
    """
    return _FakeQuant.apply(x, global_scale, rounding, seed, offset)
