# SPDX-License-Identifier: Apache-2.0
"""LLM-FP4's quantiser: 4-bit floats whose exponent has a real bias b, one for whatever shares it.

The values are 2^-b times 0 .5 1 1.5 2 2.5 3 3.5 (e1m2), 0 1 2 3 4 6 8 12 (e2m1) or 0 2 4 8 16 32 64 128 (e3m0), which
is `code_values(format)` times the scale 2^(c - b), c the bias of the format itself (fp4.py). x / scale is cast as
`fp4_cast` does it, ties included. The largest value is amax for b = 2^E - 1 + log2(2 - 2^-M) - log2(amax).
Source: Liu et al., LLM-FP4, EMNLP 2023 (arXiv 2310.16836), and its published code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_broadcast, check_one_of, check_rows
from ._fp4_codes import FORMATS, ROUNDINGS
from .fp4 import NAN_POLICIES, fp4_cast, fp4_uncast


def _check_format(function: str, format: str) -> None:
    check_one_of(function, "format", format, tuple(FORMATS))


def fpq_bias(amax: Tensor, format: str = "e2m1") -> Tensor:
    """The bias, float32 of amax's shape, with which the largest value is amax; infinite for 0."""
    _check_format("fpq_bias", format)
    exponent_bits, mantissa_bits, _ = FORMATS[format]
    largest = 2**exponent_bits - 1 + math.log2(2 - 2.0**-mantissa_bits)
    return (largest - amax.double().log2()).float()


def fpq_scale(bias: Tensor, format: str = "e2m1") -> Tensor:
    """2^(c - bias), float32 of bias' shape: what `code_values(format)` are multiplied with."""
    _check_format("fpq_scale", format)
    return torch.exp2(FORMATS[format][2] - bias.double()).float()


def largest_shift(format: str) -> int:
    """How far a channel's bias may lie above the tensor's: 2^E - 1."""
    _check_format("largest_shift", format)
    return int(2 ** FORMATS[format][0]) - 1


def fpq_shift(bias: Tensor, rho: Tensor, format: str = "e2m1") -> Tensor:
    """Pre-shifted exponent biases: what is added to rho for every input channel, uint8 of bias' shape.

    round(bias) - round(rho), within 0 ... 2^E - 1, as in the published code; bias is `fpq_bias` of a channel's largest
    magnitude. fp4_activations.py multiplies with such activations as integers.
    """
    return (bias.round() - rho.round()).clamp(0, largest_shift(format)).to(torch.uint8)


def fpq_quantize(
    x: Tensor,
    bias: Tensor,
    format: str = "e2m1",
    nan: str = "max",
    rounding: str = "nearest_even",
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """Quantise, saturating.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        bias: what broadcasts to x: [n, 1] for the rows of a weight; [] for activations; [k] for activations with
            pre-shifted biases, rho + k_j of input channel j.
        format: "e2m1", "e1m2" or "e3m0".
        nan, rounding, seed, offset: as of `fp4_cast`; the published rounding is "nearest_even".
    Returns:
        packed: uint8 [..., ceil(k / 2)], rows of fp4.py. `fp4_fake_quant(x, format, fpq_scale(bias,
        format))` is the same for training, with a straight-through gradient, and keeps NaN.
    Raises:
        ValueError: for another dtype, a scalar, unknown names, a bias that does not broadcast, or a NaN with
            nan="error".
    """
    check_rows("fpq_quantize", x)
    check_one_of("fpq_quantize", "nan", nan, NAN_POLICIES)
    check_one_of("fpq_quantize", "rounding", rounding, ROUNDINGS)
    values = x.float() / _scale_of("fpq_quantize", x.shape, bias, format)
    return fp4_cast(values, format, nan, rounding, seed, offset)


def fpq_dequantize(packed: Tensor, bias: Tensor, k: int, format: str = "e2m1") -> Tensor:
    """Undo `fpq_quantize`: float32 [..., k]."""
    values = fp4_uncast(packed, k, format)
    return values * _scale_of("fpq_dequantize", values.shape, bias, format)


def _scale_of(function: str, shape: torch.Size, bias: Tensor, format: str) -> Tensor:
    _check_format(function, format)
    check_broadcast(function, "bias", bias, shape)
    return fpq_scale(bias, format)
