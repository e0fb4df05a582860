# SPDX-License-Identifier: Apache-2.0
"""4-bit floats: casts to packed codes and back, E8M0 scales, MXFP4 blocks.

Magnitudes: e2m1 0 .5 1 1.5 2 3 4 6;  e1m2 0 .5 1 1.5 2 2.5 3 3.5;  e3m0 0 .25 .5 1 2 4 8 16. A code is the sign in bit
3 and the index of the magnitude in bits 2..0. Casts saturate. Between two magnitudes, lower and upper, `rounding` is
  nearest_even: the nearer one; a tie goes to the even integer x / s, s = 2^(exponent - mantissa bits), which in e3m0
    sends every tie but the first up (LLM-FP4's quantiser);   half_away: the nearer one, a tie to the upper;
  toward_zero: the lower one;   stochastic: the upper one with probability p = (|x| - lower) / (upper - lower), that is
    where floor(2^32 p) + r >= 2^32, r the element's random number of 32 bits.
r is word e % 4 of Philox4x32-10 with the counter words (e / 4, lower and upper half; offset, lower and upper half) and
the key (seed, lower and upper half), e the element's index in row-major order: the same for any threads and device.
Packed rows: uint8 [..., ceil(k / 2)], element 0 in the low nibble, an odd k padded with code 0.
E8M0: byte e is 2^(e - 127), 255 is NaN.  MXFP4: value = 2^(byte - 127) e2m1, one byte for 32 columns, where the byte is
  floor: floor(log2 amax) - 2 + 127 (the OCP text);  ceil: ceil(log2 amax) - 2 + 127;
  even:  floor after amax is rounded to one mantissa bit;  rceil: the smallest power of two >= fl(amax fl(1 / 6)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import FLOATS, MAX_COLUMNS, ceil_div, check_one_of, check_rows, check_tensor, require, short_name
from ._fp4_codes import FORMATS, ROUNDINGS, codes, magnitudes, stochastic_words
from ._groups import columns_of_groups

# bitsandbytes: quantiles of a normal distribution, and 0, 1/16, 8, 12, 4, 6, 2, 3 twelfths with both signs (not E2M1).
CODEBOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "bnb-fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}
NAN_POLICIES = ("max", "zero", "error")
SCALE_RULES = ("floor", "rceil", "ceil", "even")
MX_BLOCK = 32
GROUP_MULTIPLE = 8  # columns of a group: the codes of a word
_INFINITY = 0x7F800000  # as the bits of a float32 magnitude; NaN lies above

_ROUNDING = 'str rounding="nearest_even", SymInt seed=0, SymInt offset=0'
library.define("fp4_cast", f'(Tensor x, str format="e2m1", str nan="max", {_ROUNDING}) -> Tensor')
library.define("fp4_uncast", '(Tensor packed, int k, str format="e2m1") -> Tensor')
library.define("e8m0_cast", '(Tensor x, str rounding="down") -> Tensor')
library.define("e8m0_uncast", "(Tensor codes) -> Tensor")
library.define("mxfp4_quantize", f'(Tensor x, str scale_rule="floor", {_ROUNDING}) -> (Tensor packed, Tensor scale)')
library.define("mxfp4_dequantize", "(Tensor packed, Tensor scale, int k) -> Tensor")


def code_values(format: str) -> tuple[float, ...]:
    """The values of codes 0 ... 15 of "e2m1", "e1m2" or "e3m0", or of bitsandbytes' tables "nf4" or "bnb-fp4"."""
    check_one_of("code_values", "format", format, (*FORMATS, *CODEBOOKS))
    if format in CODEBOOKS:
        return CODEBOOKS[format]
    values = [integer * unit for integer, unit in magnitudes(format)]
    return (*values, *(-value for value in values))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes [..., k] to packed rows uint8 [..., ceil(k / 2)]."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return (padded[..., 0::2] | (padded[..., 1::2] << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, k: int) -> Tensor:
    """Packed rows to codes: uint8 [..., ceil(k / 2)] to uint8 [..., k]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :k]


def to_blocks(x: Tensor, size: int) -> Tensor:
    """[..., k] to [..., ceil(k / size), size], filled with zeros."""
    k = x.shape[-1]
    return torch.nn.functional.pad(x, (0, -k % size)).unflatten(-1, (ceil_div(k, size), size))


def table(format: str, device: torch.device) -> Tensor:
    return torch.tensor(code_values(format), dtype=torch.float32, device=device)


def _biased_log2(magnitude: Tensor, up: bool) -> Tensor:
    """log2, rounded, plus 127, from the bits of a magnitude. Byte 0, 2^-127, is the subnormal 0x400000."""
    exponent = magnitude >> 23
    above = torch.where(exponent == 0, magnitude > 0x400000, (magnitude & 0x7FFFFF) != 0)
    return exponent + above.int() if up else exponent


def _scale_bytes(amax: Tensor, scale_rule: str) -> Tensor:
    """Bits of a block's largest magnitude to its E8M0 byte, as int32."""
    if scale_rule == "even":
        amax = torch.where(amax < _INFINITY, amax + (1 << 21), amax)
    if scale_rule == "rceil":
        sixth = torch.tensor(1 / 6, dtype=torch.float32, device=amax.device)
        byte = _biased_log2((amax.view(torch.float32) * sixth).view(torch.int32), True)
    else:
        byte = (_biased_log2(amax, scale_rule == "ceil") - 2).clamp_min(0)
    return torch.where(amax >= _INFINITY, 255, byte)


@library.default("fp4_cast")
def _fp4_cast_reference(
    x: Tensor, format: str = "e2m1", nan: str = "max", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> Tensor:
    _check_fp4_cast(x, format, nan, rounding)
    values = x.float()
    require(
        nan != "error" or not values.isnan().any(),
        'fp4_cast: x must not have a NaN with nan="error", got at least one; remove it, or pass nan="max" or "zero"',
    )
    values = values.nan_to_num(0.0, torch.inf, -torch.inf) if nan == "zero" else values
    return pack_nibbles(codes(values, format, rounding, stochastic_words(x, rounding, seed, offset)))


@library.default("fp4_uncast")
def _fp4_uncast_reference(packed: Tensor, k: int, format: str = "e2m1") -> Tensor:
    _check_fp4_uncast(packed, k, format)
    return table(format, packed.device)[unpack_nibbles(packed, k).int()]


@library.default("e8m0_cast")
def _e8m0_cast_reference(x: Tensor, rounding: str = "down") -> Tensor:
    _check_e8m0_cast(x, rounding)
    magnitude = x.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    byte = _biased_log2(magnitude, rounding == "up").clamp_max(254)
    return torch.where(magnitude > _INFINITY, 255, byte).to(torch.uint8)


@library.default("e8m0_uncast")
def _e8m0_uncast_reference(codes: Tensor) -> Tensor:
    _check_e8m0_uncast(codes)
    byte = codes.int().contiguous()
    normal = torch.where(byte == 0, 0x400000, byte << 23).view(torch.float32)
    return torch.where(byte == 255, torch.nan, normal)


@library.default("mxfp4_quantize")
def _mxfp4_quantize_reference(
    x: Tensor, scale_rule: str = "floor", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    _check_mxfp4_quantize(x, scale_rule, rounding)
    k = x.shape[-1]
    blocks = to_blocks(x.float(), MX_BLOCK).contiguous()
    words = stochastic_words(x, rounding, seed, offset)
    words = None if words is None else to_blocks(words, MX_BLOCK)
    byte = _scale_bytes((blocks.view(torch.int32) & 0x7FFFFFFF).amax(-1), scale_rule)
    inverse = ((254 - byte.clamp_max(253)) << 23).view(torch.float32)  # exact: a finite block has at most byte 253
    code = codes(blocks * inverse.unsqueeze(-1), "e2m1", rounding, words)
    code = torch.where(byte.unsqueeze(-1) == 255, 0, code)
    return pack_nibbles(code.flatten(-2)[..., :k]), byte.to(torch.uint8)


@library.default("mxfp4_dequantize")
def _mxfp4_dequantize_reference(packed: Tensor, scale: Tensor, k: int) -> Tensor:
    _check_mxfp4_dequantize(packed, scale, k)
    return _fp4_uncast_reference(packed, k) * columns_of_groups(_e8m0_uncast_reference(scale), k, MX_BLOCK)


def _check_fp4_cast(x: Tensor, format: str, nan: str, rounding: str) -> None:
    check_one_of("fp4_cast", "format", format, tuple(FORMATS))
    check_one_of("fp4_cast", "nan", nan, NAN_POLICIES)
    check_one_of("fp4_cast", "rounding", rounding, ROUNDINGS)
    check_rows("fp4_cast", x)


def check_packed(op: str, packed: Tensor, k: int) -> None:
    require(packed.dim() >= 1, f"{op}: packed must have at least one dimension, got a scalar")
    require(
        0 <= k <= MAX_COLUMNS and packed.shape[-1] == ceil_div(k, 2),
        f"{op}: packed must have ceil(k / 2) bytes in its last dimension, got k = {k} and {packed.shape[-1]} bytes",
    )
    check_tensor(op, "packed", packed, torch.uint8, packed.shape, packed)


def _check_fp4_uncast(packed: Tensor, k: int, format: str) -> None:
    check_one_of("fp4_uncast", "format", format, tuple(FORMATS))
    check_packed("fp4_uncast", packed, k)


def _check_e8m0_cast(x: Tensor, rounding: str) -> None:
    check_one_of("e8m0_cast", "rounding", rounding, ("down", "up"))
    require(x.dtype in FLOATS, f"e8m0_cast: x must be float32, bfloat16 or float16, got {short_name(x.dtype)}")


def _check_e8m0_uncast(codes: Tensor) -> None:
    check_tensor("e8m0_uncast", "codes", codes, torch.uint8, codes.shape, codes)


def _check_mxfp4_quantize(x: Tensor, scale_rule: str, rounding: str) -> None:
    check_one_of("mxfp4_quantize", "scale_rule", scale_rule, SCALE_RULES)
    check_one_of("mxfp4_quantize", "rounding", rounding, ROUNDINGS)
    check_rows("mxfp4_quantize", x)


def _check_mxfp4_dequantize(packed: Tensor, scale: Tensor, k: int) -> None:
    check_packed("mxfp4_dequantize", packed, k)
    shape = [*packed.shape[:-1], ceil_div(k, MX_BLOCK)]
    check_tensor("mxfp4_dequantize", "scale", scale, torch.uint8, shape, packed)


@torch.library.register_fake("bitmill::fp4_cast")
def _(
    x: Tensor, format: str = "e2m1", nan: str = "max", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> Tensor:
    _check_fp4_cast(x, format, nan, rounding)
    return x.new_empty((*x.shape[:-1], ceil_div(x.shape[-1], 2)), dtype=torch.uint8)


@torch.library.register_fake("bitmill::fp4_uncast")
def _(packed: Tensor, k: int, format: str = "e2m1") -> Tensor:
    _check_fp4_uncast(packed, k, format)
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.float32)


@torch.library.register_fake("bitmill::e8m0_cast")
def _(x: Tensor, rounding: str = "down") -> Tensor:
    _check_e8m0_cast(x, rounding)
    return x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.register_fake("bitmill::e8m0_uncast")
def _(codes: Tensor) -> Tensor:
    _check_e8m0_uncast(codes)
    return codes.new_empty(codes.shape, dtype=torch.float32)


@torch.library.register_fake("bitmill::mxfp4_quantize")
def _(
    x: Tensor, scale_rule: str = "floor", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    _check_mxfp4_quantize(x, scale_rule, rounding)
    *leading, k = x.shape
    packed = x.new_empty((*leading, ceil_div(k, 2)), dtype=torch.uint8)
    return packed, x.new_empty((*leading, ceil_div(k, MX_BLOCK)), dtype=torch.uint8)


@torch.library.register_fake("bitmill::mxfp4_dequantize")
def _(packed: Tensor, scale: Tensor, k: int) -> Tensor:
    _check_mxfp4_dequantize(packed, scale, k)
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.float32)


def fp4_cast(
    x: Tensor, format: str = "e2m1", nan: str = "max", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> Tensor:
    """Cast to FP4 codes, saturating, two a byte; the module's docstring gives values and roundings.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        format: "e2m1", "e1m2" or "e3m0".
        nan: what NaN becomes: "max" code 7 for both signs (as cuda_fp4.h), "zero" code 0, "error" a ValueError, for
            which the host waits on a GPU.
        rounding: "nearest_even", "stochastic", "toward_zero" or "half_away".
        seed, offset: int64, of the random numbers for "stochastic"; another offset (of every step of a training, say)
            gives independent ones.
    Returns:
        uint8 [..., ceil(k / 2)].
    Raises:
        ValueError: for another dtype, a scalar, unknown names, or a NaN with nan="error".
    """
    return torch.ops.bitmill.fp4_cast.default(x, format, nan, rounding, seed, offset)


def fp4_uncast(packed: Tensor, k: int, format: str = "e2m1") -> Tensor:
    """Undo `fp4_cast`: the values float32 [..., k] of packed codes uint8 [..., ceil(k / 2)]."""
    return torch.ops.bitmill.fp4_uncast.default(packed, k, format)


def e8m0_cast(x: Tensor, rounding: str = "down") -> Tensor:
    """log2 |x| rounded "down" or "up", plus 127, in 0 ... 254, as uint8 of x's shape; NaN is 255, infinity 254."""
    return torch.ops.bitmill.e8m0_cast.default(x, rounding)


def e8m0_uncast(codes: Tensor) -> Tensor:
    """2^(code - 127) as float32; 255 is NaN."""
    return torch.ops.bitmill.e8m0_uncast.default(codes)


def mxfp4_quantize(
    x: Tensor, scale_rule: str = "floor", rounding: str = "nearest_even", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise to MXFP4 in blocks of 32 along the last dimension; a partial block counts as filled with zeros.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        scale_rule: "floor", "rceil", "ceil" or "even" (see the module's docstring).
        rounding, seed, offset: of the codes, as of `fp4_cast`; element indices are those of x.
    Returns:
        packed: uint8 [..., ceil(k / 2)], E2M1 codes.
        scale: uint8 [..., ceil(k / 32)], E8M0; 255 (NaN), with codes 0, for a block with a NaN or an infinity.
    Raises:
        ValueError: for another dtype, a scalar, or an unknown name.
    """
    return torch.ops.bitmill.mxfp4_quantize.default(x, scale_rule, rounding, seed, offset)


def mxfp4_dequantize(packed: Tensor, scale: Tensor, k: int) -> Tensor:
    """Undo `mxfp4_quantize`: float32 [..., k]; a block whose scale is 255 is NaN."""
    return torch.ops.bitmill.mxfp4_dequantize.default(packed, scale, k)
