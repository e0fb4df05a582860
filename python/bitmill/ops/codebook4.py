# SPDX-License-Identifier: Apache-2.0
"""Quantisation to the 16 values of a table, with a float scale for a group of columns: bitsandbytes' NF4 and FP4.

scale = amax / max |table|,  code = that of the value nearest to fl(x fl(1 / scale)),  x ~ table[code] scale.
Between neighbours a < b, b is nearer above fl((a + b) / 2). With rounding "stochastic" z = fl(x fl(1 / scale)) becomes
b where floor(2^32 (z - a) / (b - a)) + r >= 2^32, in float64, r the element's random number of fp4.py. (Other roundings
would mean little: the middles are rounded themselves, and a table may have no neighbour toward zero.) Of equal values,
zeros of both signs among them, the lowest code stands for all. Packed rows are those of fp4.py. All else is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import ceil_div, check_one_of, check_rows, check_tensor, group_count
from ._fp4_codes import stochastic_words
from ._groups import columns_of_groups
from .fp4 import GROUP_MULTIPLE, check_packed, pack_nibbles, table, unpack_nibbles

ROUNDINGS = ("nearest", "stochastic")

library.define(
    "codebook4_quantize",
    '(Tensor x, Tensor codebook, int group_size=64, str rounding="nearest", SymInt seed=0, SymInt offset=0)'
    " -> (Tensor packed, Tensor scale)",
)
library.define(
    "codebook4_dequantize", "(Tensor packed, Tensor scale, Tensor codebook, int k, int group_size=64) -> Tensor"
)


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """Codes, uint8, of values that are not NaN in a table of up to 256 values."""
    ordered, order = codebook.sort(stable=True)
    order = order[torch.searchsorted(ordered, ordered)].to(torch.uint8)
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2, out_int32=True)]


def _stochastic(values: Tensor, codebook: Tensor, words: Tensor) -> Tensor:
    """Codes, uint8, of one of the two neighbours; beyond the table its end."""
    ordered, order = codebook.sort(stable=True)
    order = order[torch.searchsorted(ordered, ordered)].to(torch.uint8)
    lower = (torch.bucketize(values, ordered, right=True) - 1).clamp(0, codebook.numel() - 2)
    a, b = ordered[lower].double(), ordered[lower + 1].double()
    chance = ((values - a) / (b - a)).nan_to_num(0.0).clamp(0, 1) * 2.0**32
    return order[lower + (chance.long() + words >= 1 << 32)]


@library.default("codebook4_quantize")
def _codebook4_quantize_reference(
    x: Tensor, codebook: Tensor, group_size: int = 64, rounding: str = "nearest", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    groups, k = _check_codebook4_quantize(x, codebook, group_size, rounding), x.shape[-1]
    width = group_size or max(k, 1)

    def blocks_of(t: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(t, (0, groups * width - k)).contiguous()
        return padded.unflatten(-1, (groups, width))

    blocks = blocks_of(x.float())
    amax = blocks.abs().amax(-1)
    largest = codebook.abs().max().expand_as(amax)  # torch may divide by a number as a product with its reciprocal
    scale = torch.where((amax / largest < torch.inf) & (largest < torch.inf), amax / largest, torch.nan)
    inverse = (1 / scale).clamp_max(torch.finfo(torch.float32).max)  # no 0 x infinity where a scale is next to nothing
    values, ordered = blocks * inverse.unsqueeze(-1), codebook.nan_to_num()  # a table with a NaN has no order
    words = stochastic_words(x, rounding, seed, offset)
    codes = nearest(values, ordered) if words is None else _stochastic(values, ordered, blocks_of(words))
    codes = torch.where(scale.isnan().unsqueeze(-1), 0, codes)
    return pack_nibbles(codes.flatten(-2)[..., :k]), scale


@library.default("codebook4_dequantize")
def _codebook4_dequantize_reference(
    packed: Tensor, scale: Tensor, codebook: Tensor, k: int, group_size: int = 64
) -> Tensor:
    _check_codebook4_dequantize(packed, scale, codebook, k, group_size)
    return codebook[unpack_nibbles(packed, k).int()] * columns_of_groups(scale, k, group_size)


def _check_codebook4_quantize(x: Tensor, codebook: Tensor, group_size: int, rounding: str) -> int:
    """Answers the number of groups."""
    op = "codebook4_quantize"
    check_one_of(op, "rounding", rounding, ROUNDINGS)
    k = check_rows(op, x)
    check_tensor(op, "codebook", codebook, torch.float32, [16], x)
    return group_count(op, k, group_size, GROUP_MULTIPLE)


def _check_codebook4_dequantize(packed: Tensor, scale: Tensor, codebook: Tensor, k: int, group_size: int) -> None:
    op = "codebook4_dequantize"
    check_packed(op, packed, k)
    check_tensor(op, "codebook", codebook, torch.float32, [16], packed)
    groups = group_count(op, k, group_size, GROUP_MULTIPLE)
    check_tensor(op, "scale", scale, torch.float32, [*packed.shape[:-1], groups], packed)


@torch.library.register_fake("bitmill::codebook4_quantize")
def _(
    x: Tensor, codebook: Tensor, group_size: int = 64, rounding: str = "nearest", seed: int = 0, offset: int = 0
) -> tuple[Tensor, Tensor]:
    groups = _check_codebook4_quantize(x, codebook, group_size, rounding)
    *leading, k = x.shape
    packed = x.new_empty((*leading, ceil_div(k, 2)), dtype=torch.uint8)
    return packed, x.new_empty((*leading, groups), dtype=torch.float32)


@torch.library.register_fake("bitmill::codebook4_dequantize")
def _(packed: Tensor, scale: Tensor, codebook: Tensor, k: int, group_size: int = 64) -> Tensor:
    _check_codebook4_dequantize(packed, scale, codebook, k, group_size)
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.float32)


def _table(codebook: Tensor | str, device: torch.device) -> Tensor:
    return table(codebook, device) if isinstance(codebook, str) else codebook


def codebook4_quantize(
    x: Tensor,
    codebook: Tensor | str = "nf4",
    group_size: int = 64,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantise to values of a table, with one scale for a group of columns; a partial group has its own.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        codebook: float32 [16], the value of each code in any order, or a name that `code_values` takes.
        group_size: columns that share a scale, a multiple of 8, or 0 for a whole row.
        rounding: "nearest" or "stochastic" (see the module's docstring).
        seed, offset: of the random numbers, as of `fp4_cast`.
    Returns:
        packed: uint8 [..., ceil(k / 2)].
        scale: float32 [..., ceil(k / group_size)], or [..., 1]; 0 for a group of zeros; NaN, with codes 0, for a group
            with a NaN or an infinity, and for all where the codebook has one, or nothing but zeros.
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names.
    Source: bitsandbytes, quantize_4bit. Its blocks run over the flattened tensor, which are these where they divide k,
    and its bytes have element 0 in the high nibble.
    """
    codebook = _table(codebook, x.device)
    return torch.ops.bitmill.codebook4_quantize.default(x, codebook, group_size, rounding, seed, offset)


def codebook4_dequantize(packed: Tensor, scale: Tensor, codebook: Tensor | str, k: int, group_size: int = 64) -> Tensor:
    """Undo `codebook4_quantize`: float32 [..., k]; a group whose scale is NaN is NaN."""
    codebook = _table(codebook, packed.device)
    return torch.ops.bitmill.codebook4_dequantize.default(packed, scale, codebook, k, group_size)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, group_size: int, *rounding: Any) -> Tensor:
        packed, scale = codebook4_quantize(x, codebook, group_size, *rounding)
        return codebook4_dequantize(packed, scale, codebook, x.shape[-1], group_size).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None, None


def codebook4_fake_quant(
    x: Tensor,
    codebook: Tensor | str = "nf4",
    group_size: int = 64,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """x quantised and back, of x's dtype. The gradient goes straight through everywhere: no value is clipped.

    The arguments are those of `codebook4_quantize`.
    """
    return _FakeQuant.apply(x, _table(codebook, x.device), group_size, rounding, seed, offset)
