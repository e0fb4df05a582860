# SPDX-License-Identifier: Apache-2.0
"""4-bit floats as data, and the codes of float32 values in every rounding; cpp/core/fp4.h has the same."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ._philox import random_words

FORMATS = {"e2m1": (2, 1, 1), "e1m2": (1, 2, 0), "e3m0": (3, 0, 3)}  # exponent bits, mantissa bits, bias
ROUNDINGS = ("nearest_even", "stochastic", "toward_zero", "half_away")


def magnitudes(format: str) -> list[tuple[int, float]]:
    """Each magnitude as an integer number of units, the units of its binade. The next one is one unit away."""
    _, mantissa_bits, bias = FORMATS[format]
    hidden = 1 << mantissa_bits
    fields = [divmod(index, hidden) for index in range(8)]
    return [(m + hidden * (e > 0), 2.0 ** (max(e, 1) - bias - mantissa_bits)) for e, m in fields]


def _steps(format: str, rounding: str) -> list[int]:
    """Bits of the smallest float32 magnitude that is cast to index 1, 2, ... 7: fp4_steps in cpp/core/fp4.h."""
    nearest = rounding in ("nearest_even", "half_away")
    steps = []
    for integer, unit in magnitudes(format)[:7]:
        (bits,) = struct.unpack("I", struct.pack("f", (integer + (0.5 if nearest else 1)) * unit))
        steps.append(bits + (rounding == "nearest_even" and integer % 2 == 0))
    return steps


def stochastic_words(x: Tensor, rounding: str, seed: int, offset: int) -> Tensor | None:
    """The random numbers for `codes`, int64 of x's shape; None for another rounding."""
    return random_words(x, seed, offset) if rounding == "stochastic" else None


def codes(x: Tensor, format: str, rounding: str = "nearest_even", words: Tensor | None = None) -> Tensor:
    """Codes of float32 values, as int32; NaN becomes 7."""
    x = x.contiguous()
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    steps = torch.tensor(_steps(format, rounding), dtype=torch.int32, device=x.device)
    index = torch.bucketize(magnitude, steps, right=True, out_int32=True)
    if words is not None:
        values = torch.tensor([(integer * unit, 2**32 / unit) for integer, unit in magnitudes(format)], device=x.device)
        value, inverse = values[index].unbind(-1)
        above = torch.where(index < 7, magnitude.view(torch.float32) - value, 0.0)
        chance = (above * inverse).long()  # both exact, but for what lies below 2^-32 of the distance
        index = index + (chance + words >= 1 << 32).int()
    return torch.where(x.isnan(), 7, index + 8 * (bits < 0).int())
