# SPDX-License-Identifier: Apache-2.0
"""Chains of binary layers that stay bits: the next layer's 1-bit activations straight from the integer products.

z = fl(fl(scale[o] dot) + bias[o]) rises with dot (falls, where scale[o] < 0), so the dot products that the next layer
binarises to 1 are one range of integers an output, and those that it binarises to 0 another. `bit_ranges` finds them
through z itself, by bisection, never through its inverse; `binary_matmul_bits` compares integers with them.
Source: Bannink et al., Larq Compute Engine, MLSys 2021, section 3.2 (thresholds on the accumulator).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, ceil_div, check_one_of, check_tensor, require
from .binary_matmul import _binary_matmul_reference, _check_binary_matmul
from .bitpack import LEVELS, _pack_bits

# No defaults: every argument is given by the wrapper.
library.define(
    "binary_matmul_bits",
    "(Tensor a, Tensor weight, Tensor positive, Tensor? zero, int n, int k, Tensor? a_nonzero, Tensor? weight_nonzero,"
    " str levels) -> (Tensor sign, Tensor nonzero)",
)


@library.default("binary_matmul_bits")
def _binary_matmul_bits_reference(
    a: Tensor,
    weight: Tensor,
    positive: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    a_nonzero: Tensor | None,
    weight_nonzero: Tensor | None,
    levels: str,
) -> tuple[Tensor, Tensor]:
    _check_binary_matmul_bits(a, weight, positive, zero, n, k, a_nonzero, weight_nonzero, levels)
    dot = _binary_matmul_reference(a, weight, n, k, a_nonzero, weight_nonzero, levels)

    def inside(ranges: Tensor) -> Tensor:
        return (ranges[0] <= dot) & (dot <= ranges[1])

    sign = _pack_bits(inside(positive))
    return sign, a.new_empty(0) if zero is None else _pack_bits(~inside(zero))


def _check_binary_matmul_bits(a, weight, positive, zero, n, k, a_nonzero, weight_nonzero, levels) -> None:
    _check_binary_matmul(a, weight, n, k, a_nonzero, weight_nonzero, levels, "binary_matmul_bits")
    check_tensor("binary_matmul_bits", "positive", positive, torch.int32, [2, n], a)
    check_tensor("binary_matmul_bits", "zero", zero, torch.int32, [2, n], a)


@torch.library.register_fake("bitmill::binary_matmul_bits")
def _(a, weight, positive, zero, n, k, a_nonzero, weight_nonzero, levels):
    _check_binary_matmul_bits(a, weight, positive, zero, n, k, a_nonzero, weight_nonzero, levels)
    sign = a.new_empty((*a.shape[:-1], ceil_div(n, 32)))
    return sign, a.new_empty(0) if zero is None else torch.empty_like(sign)


def binary_matmul_bits(
    a: Tensor,
    weight: Tensor,
    positive: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    a_nonzero: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    levels: str = "sign",
) -> tuple[Tensor, Tensor]:
    """Products of packed rows with packed weights, answered as the packed rows of the next layer.

    Args:
        positive: int32 [2, n]: an output's bit is 1 where positive[0] <= dot <= positive[1]; from `bit_ranges`.
        zero: int32 [2, n] or None: its nonzero bit is 0 where zero[0] <= dot <= zero[1].
        The others are those of `binary_matmul`.
    Returns:
        sign int32 [..., ceil(n / 32)], and nonzero of the same shape, or empty without `zero`.
    Raises:
        ValueError: for wrong shapes, dtypes or levels.
    """
    return torch.ops.bitmill.binary_matmul_bits.default(
        a, weight, positive, zero, n, k, a_nonzero, weight_nonzero, levels
    )


def bit_ranges(
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    levels: str = "sign",
    shift: Tensor | None = None,
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor | None]:
    """The dot products whose results the next layer binarises to 1 and to 0.

    The next layer sees z = fl(fl(scale dot) + bias) in float32 (and fl(z + shift), if it shifts), by the rules of
    `bitpack`: "sign" z > 0 and z == 0, "plus" z >= 0, "bool" z > threshold. Between the two layers only functions may
    stand that keep the sign of z, such as ReLU before "bool" with a threshold of at least 0.

    Args:
        scale: float32 [n] or [n, 1], finite; the step of the activation multiplied into it.
        bias: float32 [n] or None, finite.
        k: columns of this layer.
        shift: float32 [n] or None, finite: what the next layer adds.
    Returns:
        positive int32 [2, n]; zero int32 [2, n] for levels "sign", else None. An empty range has its last below its
        first.
    Raises:
        ValueError: for wrong shapes or dtypes, numbers that are not finite, or k out of range.
    """
    check_one_of("bit_ranges", "levels", levels, LEVELS)
    require(0 <= k <= MAX_COLUMNS, f"bit_ranges: k must be between 0 and {MAX_COLUMNS}, got {k}")
    require(
        scale.dim() == 1 or (scale.dim() == 2 and scale.shape[1] == 1),
        f"bit_ranges: scale must have shape [n] or [n, 1], got {list(scale.shape)}",
    )
    n = scale.shape[0]
    scale = scale.detach().reshape(n)
    for name, t in (("scale", scale), ("bias", bias), ("shift", shift)):
        check_tensor("bit_ranges", name, t, torch.float32, [n], scale)
        require(t is None or bool(t.isfinite().all()), f"bit_ranges: {name} must be finite, got NaN or infinity")

    def z(dot: Tensor) -> Tensor:
        value = scale * dot
        value = value if bias is None else value + bias
        return value if shift is None else value + shift

    falling = scale < 0

    def first(is_high: Callable[[Tensor], Tensor]) -> Tensor:
        """Smallest d in [-k, k + 1] from which on is_high(z(d)), or z(-d) where z falls, holds; k + 1 for none."""
        low, high = torch.full_like(scale, -k, dtype=torch.int64), torch.full_like(scale, k + 1, dtype=torch.int64)
        while bool((low < high).any()):
            middle = torch.div(low + high, 2, rounding_mode="floor")
            here = is_high(z(torch.where(falling, -middle, middle).float()))
            low, high = torch.where(here, low, torch.minimum(middle + 1, high)), torch.where(here, middle, high)
        return low

    def as_range(start: Tensor, stop: Tensor) -> Tensor:
        """[start, stop) of d as [first, last] of the dot product."""
        last = stop - 1
        return torch.stack((torch.where(falling, -last, start), torch.where(falling, -start, last))).to(torch.int32)

    above = {"sign": lambda v: v > 0, "plus": lambda v: v >= 0, "bool": lambda v: v > threshold}[levels]
    one = first(above)
    end = torch.full_like(one, k + 1)
    if levels != "sign":
        return as_range(one, end), None
    return as_range(one, end), as_range(first(lambda v: v >= 0), one)
