# SPDX-License-Identifier: Apache-2.0
"""Chains of binary layers that stay bits: packed rows in, and the packed rows of the next layer out.

binary_matmul_bits:   the next layer's 1-bit activations straight from the integer products. What stands between two
                      layers (scale, bias, an activation function, a shift, the sign) is one function of the dot product
                      for each output, and there are only 2 k + 1 dot products: `bit_ranges` evaluates it for all of
                      them, and keeps the ranges that become +1 and -1.
binary_matmul_floats: y = fl(fl(scale * dot) + bias), where a chain returns to floats; a residual is added to it.
Source: Bannink et al., Larq Compute Engine, MLSys 2021, section 3.2 (thresholds on the accumulator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library as library
from ._checks import ceil_div, check_one_of, check_tensor, require
from .binary_matmul import _binary_matmul_reference, _check_binary_matmul
from .bitpack import LEVELS, _pack_bits

NEVER = 2**31 - 1  # first and last of a range that no dot product reaches
MOST_EVALUATED = 1 << 16
MOST_SINGLE = 64
EVALUATED_TOGETHER = 1 << 18  # floats: planning a model takes little memory beside it

# No defaults: every argument is given by the wrapper.
library.define(
    "binary_matmul_bits",
    "(Tensor a, Tensor weight, Tensor positive, Tensor? negative, Tensor? single, int n, int k, Tensor? a_nonzero,"
    " Tensor? weight_nonzero, str levels) -> (Tensor sign, Tensor nonzero)",
)
library.define(
    "binary_matmul_floats",
    "(Tensor a, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, int k, Tensor? a_nonzero,"
    " Tensor? weight_nonzero, str levels) -> Tensor",
)


class BitRanges(NamedTuple):
    """What the dot products of each output become, for `binary_matmul_bits`: int32 [2, n], [2, n] and [n, count].

    Attributes:
        positive: firsts and lasts of those that become +1.
        negative: of those that become -1; None where nothing becomes 0.
        single: others that become -1, one by one; None where there are none.
    """

    positive: Tensor
    negative: Tensor | None
    single: Tensor | None


def _inside(dot: Tensor, ranges: Tensor) -> Tensor:
    first, last = ranges.long()
    return (dot.long() - first) & 0xFFFFFFFF <= (last - first) & 0xFFFFFFFF


def bits_in_ranges(
    dot: Tensor, positive: Tensor, negative: Tensor | None, single: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Packed rows of signs and of nonzero bits (empty without `negative`) from integers [..., n]."""
    above = _inside(dot, positive)
    if negative is None:
        return _pack_bits(above), dot.new_empty(0)
    nonzero = above | _inside(dot, negative)
    if single is not None:
        nonzero = nonzero | (dot.unsqueeze(-1) == single).any(-1)
    return _pack_bits(above), _pack_bits(nonzero)


@library.default("binary_matmul_bits")
def _binary_matmul_bits_reference(
    a: Tensor,
    weight: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    single: Tensor | None,
    n: int,
    k: int,
    a_nonzero: Tensor | None,
    weight_nonzero: Tensor | None,
    levels: str,
) -> tuple[Tensor, Tensor]:
    _check_binary_matmul_bits(a, weight, positive, negative, single, n, k, a_nonzero, weight_nonzero, levels)
    dot = _binary_matmul_reference(a, weight, n, k, a_nonzero, weight_nonzero, levels)
    return bits_in_ranges(dot, positive, negative, single)


@library.default("binary_matmul_floats")
def _binary_matmul_floats_reference(
    a: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    k: int,
    a_nonzero: Tensor | None,
    weight_nonzero: Tensor | None,
    levels: str,
) -> Tensor:
    _check_binary_matmul_floats(a, weight, scale, bias, residual, k, a_nonzero, weight_nonzero, levels)
    dot = _binary_matmul_reference(a, weight, scale.shape[0], k, a_nonzero, weight_nonzero, levels)
    out = scale[:, 0] * dot.float()
    out = out if bias is None else out + bias
    return out if residual is None else out + residual


def _check_binary_matmul_bits(a, weight, positive, negative, single, n, k, a_nonzero, weight_nonzero, levels) -> None:
    op = "binary_matmul_bits"
    _check_binary_matmul(a, weight, n, k, a_nonzero, weight_nonzero, levels, op)
    check_tensor(op, "positive", positive, torch.int32, [2, n], a)
    check_tensor(op, "negative", negative, torch.int32, [2, n], a)
    if single is not None:
        require(
            negative is not None and single.dim() == 2,
            f"{op}: single must have shape [n, count] and goes with negative, got {list(single.shape)}"
            + (" without negative" if negative is None else ""),
        )
        check_tensor(op, "single", single, torch.int32, [n, single.shape[1]], a)


def _check_binary_matmul_floats(a, weight, scale, bias, residual, k, a_nonzero, weight_nonzero, levels) -> None:
    op, n = "binary_matmul_floats", scale.shape[0] if scale.dim() else 0
    check_tensor(op, "scale", scale, torch.float32, [n, 1], a)
    _check_binary_matmul(a, weight, n, k, a_nonzero, weight_nonzero, levels, op)
    check_tensor(op, "bias", bias, torch.float32, [n], a)
    check_tensor(op, "residual", residual, torch.float32, [*a.shape[:-1], n], a)


@torch.library.register_fake("bitmill::binary_matmul_bits")
def _(a, weight, positive, negative, single, n, k, a_nonzero, weight_nonzero, levels):
    _check_binary_matmul_bits(a, weight, positive, negative, single, n, k, a_nonzero, weight_nonzero, levels)
    sign = a.new_empty((*a.shape[:-1], ceil_div(n, 32)))
    return sign, a.new_empty(0) if negative is None else torch.empty_like(sign)


@torch.library.register_fake("bitmill::binary_matmul_floats")
def _(a, weight, scale, bias, residual, k, a_nonzero, weight_nonzero, levels):
    _check_binary_matmul_floats(a, weight, scale, bias, residual, k, a_nonzero, weight_nonzero, levels)
    return scale.new_empty((*a.shape[:-1], scale.shape[0]))


def binary_matmul_bits(
    a: Tensor,
    weight: Tensor,
    ranges: BitRanges,
    n: int,
    k: int,
    a_nonzero: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    levels: str = "sign",
) -> tuple[Tensor, Tensor]:
    """Products of packed rows with packed weights, answered as the packed rows of the next layer.

    Args:
        ranges: from `bit_ranges`: (positive, negative, single). An output is +1 where its dot product lies in the range
            positive, -1 in negative or single, else 0 (with no negative always -1 instead of 0). A range whose last is
            below its first wraps: it is all but what lies between them.
        The others are those of `binary_matmul`.
    Returns:
        sign int32 [..., ceil(n / 32)], and nonzero of the same shape, or empty without a negative range.
    Raises:
        ValueError: for wrong shapes, dtypes or levels.
    """
    positive, negative, single = ranges
    return torch.ops.bitmill.binary_matmul_bits.default(
        a, weight, positive, negative, single, n, k, a_nonzero, weight_nonzero, levels
    )


def binary_matmul_floats(
    a: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    a_nonzero: Tensor | None = None,
    weight_nonzero: Tensor | None = None,
    levels: str = "sign",
    residual: Tensor | None = None,
) -> Tensor:
    """Products of packed rows with packed weights as floats: what `binary_linear` answers for rows that are packed.

    Args:
        scale: float32 [n, 1].
        bias: float32 [n] or None.
        residual: float32 [..., n] or None, added to the result in a rounding of its own.
        The others are those of `binary_matmul`.
    Returns:
        float32 [..., n].
    Raises:
        ValueError: for wrong shapes, dtypes or levels.
    """
    return torch.ops.bitmill.binary_matmul_floats.default(
        a, weight, scale, bias, residual, k, a_nonzero, weight_nonzero, levels
    )


def bit_ranges(
    level: Callable[[Tensor], Tensor], n: int, k: int, levels: str = "sign", device: torch.device | str | None = None
) -> BitRanges:
    """What the dot products become in the next layer, found by trying all of them.

    Args:
        level: called with dot products, float32 [count, 1]; answers [count, n], what each output makes of them: -1, 0
            and +1, or 0 and 1 for "bool". Such as torch.sign(scale * dot + bias).
        n: outputs.
        k: dot products lie in -k ... k; at most 65,536.
        levels: of the next layer, as in `bitpack`.
    Returns:
        The ranges for `binary_matmul_bits`; negative is None if nothing becomes 0 or `levels` is not "sign".
    Raises:
        ValueError: if the +1 of an output are no range, not even a wrapping one, or its -1 are not a range and at most
            64 others; or for wrong arguments.
    """
    check_one_of("bit_ranges", "levels", levels, LEVELS)
    require(0 <= k <= MOST_EVALUATED, f"bit_ranges: k must be between 0 and {MOST_EVALUATED}, got {k}")
    dots = torch.arange(-k, k + 1, dtype=torch.float32, device=device).unsqueeze(-1)
    edges: dict[int, list[Tensor]] = {1: [], -1: []}  # where an output's +1 or -1 begin, or have ended: [count, 2]
    before, zeros, seen = torch.zeros(1, n, dtype=torch.int8, device=device), False, 0
    for part in dots.split(max(1, EVALUATED_TOGETHER // max(n, 1))):
        value, expected = level(part), [part.shape[0], n]
        require(
            list(value.shape) == expected,
            f"bit_ranges: level must answer {expected} for {list(part.shape)}, got {list(value.shape)}",
        )
        value = value.to(torch.int8)
        rows = torch.cat((before, value))
        for sign, found in edges.items():
            found.append((rows == sign).diff(dim=0).nonzero() + torch.tensor([seen, 0], device=device))
        before, zeros, seen = value[-1:], zeros or not bool(value.all()), seen + len(value)
    for sign, found in edges.items():
        last = (before[0] == sign).nonzero()
        found.append(torch.cat((torch.full_like(last, seen), last), 1))
    positive, _ = _range_of(torch.cat(edges[1]), n, k, "+1 must be one range", 0)
    if levels != "sign" or not zeros:
        return BitRanges(positive, None, None)
    return BitRanges(positive, *_range_of(torch.cat(edges[-1]), n, k, "-1 must be about one range", MOST_SINGLE))


def _range_of(edges: Tensor, n: int, k: int, rule: str, most_outside: int) -> tuple[Tensor, Tensor | None]:
    """First and last of each output's range, int32 [2, n], and the dot products outside it, [n, count].

    The range is all of them if that is one piece, a wrapping one included; else the longest piece.

    Args:
        edges: (place among the 2 k + 1 dot products, output) where a piece begins or has ended, in order of place.
    """
    device = edges.device
    place, outputs = edges[edges[:, 1].argsort(stable=True)].T
    begins, ends, outputs = place[::2], place[1::2], outputs[::2]  # one past the last

    def of_output(values: Tensor, reduce: str) -> Tensor:
        return torch.zeros(n, dtype=torch.int64, device=device).scatter_reduce(
            0, outputs, values, reduce, include_self=False
        )

    length = ends - begins
    rank = length * (2 * k + 2) + begins  # by length, and no two alike
    chosen = rank == of_output(rank, "amax")[outputs]
    first, last = (torch.full((n,), NEVER, dtype=torch.int64, device=device) for _ in range(2))
    first[outputs[chosen]], last[outputs[chosen]] = begins[chosen] - k, ends[chosen] - 1 - k
    reaches = of_output((begins == 0).long(), "amax") & of_output((ends == 2 * k + 1).long(), "amax")
    wraps = (torch.bincount(outputs, minlength=n) == 2) & reaches.bool()
    first = torch.where(wraps, of_output(begins, "amax") - k, first)
    last = torch.where(wraps, of_output(ends, "amin") - 1 - k, last)
    ranges = torch.stack((first, last)).to(torch.int32)
    outside = ~chosen & ~wraps[outputs]
    outputs, begins, length = outputs[outside], begins[outside], length[outside]
    if len(outputs) == 0:
        return ranges, None
    counts = of_output(length, "sum")
    most = int(counts.max())
    require(most <= most_outside, f"bit_ranges: the dot products of an output that become {rule}")
    single = torch.full((n, most), NEVER, dtype=torch.int32, device=device)
    index = torch.arange(int(length.sum()), device=device)
    dots = index + (begins - (length.cumsum(0) - length)).repeat_interleave(length)
    outputs = outputs.repeat_interleave(length)
    single[outputs, index - (counts.cumsum(0) - counts)[outputs]] = (dots - k).to(torch.int32)
    return ranges, single
