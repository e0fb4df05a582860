# SPDX-License-Identifier: Apache-2.0
"""Floats to bits and back: activation rows [..., k] to int32 [..., ceil(k / 32)], weights to tiles.

With z = x + shift: levels "sign" is sgn(z) in {-1, 0, +1} (two planes; sgn(NaN) = 0, as torch.sign), "plus" is
+1 where z >= 0 and else -1, "bool" is 1 where z > threshold and else 0. Bit j of word w is column 32 w + j; 1 means
+1 (or 1). Weight tiles: int32 [ceil(n / 16), ceil(k / v), 16], v = 32 / bits; word [t, w, l] holds row 16 t + l,
columns v w ... v w + v - 1, the lowest bits first (cpp/core/layout.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import (
    MAX_COLUMNS,
    TILE_ROWS,
    ceil_div,
    check_one_of,
    check_rows,
    check_tensor,
    require,
    tile_shape,
)

LEVELS = ("sign", "plus", "bool")

library.define(
    "bitpack",
    '(Tensor x, Tensor? shift=None, str levels="sign", float threshold=0.0, bool mean=False)'
    " -> (Tensor sign, Tensor nonzero, Tensor count, Tensor mean)",
)
library.define("bitunpack", "(Tensor sign, Tensor? nonzero, int k) -> Tensor")
library.define("tile_pack", "(Tensor codes, int bits) -> Tensor")
library.define("tile_unpack", "(Tensor tiles, int n, int k, int bits) -> Tensor")

Packed = tuple[Tensor, Tensor, Tensor, Tensor]


def _pack_bits(bits: Tensor) -> Tensor:
    """bool [..., k] to int32 [..., ceil(k / 32)]."""
    k = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.int32), (0, -k % 32))
    place = torch.arange(32, device=bits.device, dtype=torch.int32)
    return (padded.unflatten(-1, (ceil_div(k, 32), 32)) << place).sum(-1, dtype=torch.int32)


def _unpack_bits(words: Tensor, k: int) -> Tensor:
    """int32 [..., ceil(k / 32)] to bool [..., k]."""
    place = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> place) & 1).flatten(-2)[..., :k].bool()


def tiles_of_rows(words: Tensor) -> Tensor:
    """Words of rows, int32 [n, w], such as a plane that `bitpack` answers, to weight tiles [ceil(n / 16), w, 16]."""
    n, count = words.shape
    padded = torch.nn.functional.pad(words, (0, 0, 0, -n % TILE_ROWS))
    return padded.view(ceil_div(n, TILE_ROWS), TILE_ROWS, count).transpose(1, 2).contiguous()


def mean_by_halves(magnitudes: Tensor) -> Tensor:
    """Row means in the order of summation of cpp/core/bitpack.h."""
    return sum_by_halves(magnitudes) / max(magnitudes.shape[-1], 1)


def sum_by_halves(x: Tensor) -> Tensor:
    """Row sums in an order that is the same everywhere: the upper half onto the lower, until one is left."""
    k = x.shape[-1]
    if k == 0:
        return x.new_zeros(x.shape[:-1])
    total = torch.nn.functional.pad(x, (0, (1 << (k - 1).bit_length()) - k))
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def binarized(x: Tensor, shift: Tensor | None, levels: str, threshold: float | Tensor) -> Tensor:
    """The level of each element as float32: -1, 0 or +1 ("sign"), -1 or +1 ("plus"), 0 or 1 ("bool")."""
    z = x.float() if shift is None else x.float() + shift
    if levels == "sign":
        return torch.sign(z)
    if levels == "plus":
        return torch.where(z >= 0, 1.0, -1.0)
    return (z > threshold).float()


@library.default("bitpack")
def _bitpack_reference(
    x: Tensor, shift: Tensor | None = None, levels: str = "sign", threshold: float = 0.0, mean: bool = False
) -> Packed:
    _check_bitpack(x, shift, levels)
    level = binarized(x, shift, levels, threshold)
    sign = _pack_bits(level > 0)
    nonzero = _pack_bits(level != 0) if levels == "sign" else sign.new_empty(0)
    count = ((level != 0) if levels == "sign" else (level > 0)).sum(-1, dtype=torch.int32)
    means = x.new_empty(0, dtype=torch.float32)
    if mean:
        means = mean_by_halves((x.float() if shift is None else x.float() + shift).abs())
    return sign, nonzero, count, means


@library.default("bitunpack")
def _bitunpack_reference(sign: Tensor, nonzero: Tensor | None, k: int) -> Tensor:
    _check_bitunpack(sign, nonzero, k)
    values = _unpack_bits(sign, k).to(torch.int8) * 2 - 1
    return values if nonzero is None else values * _unpack_bits(nonzero, k).to(torch.int8)


@library.default("tile_pack")
def _tile_pack_reference(codes: Tensor, bits: int) -> Tensor:
    _check_tile_pack(codes, bits)
    n, k = codes.shape
    words, values = tile_shape(n, k, bits)[1], 32 // bits
    padded = torch.nn.functional.pad(codes & ((1 << bits) - 1), (0, words * values - k))
    place = torch.arange(32, device=codes.device, dtype=torch.uint8)[:bits]
    planes = ((padded.unsqueeze(-1) >> place) & 1).flatten(1).bool()  # [rows, words * 32], the lowest bits first
    return tiles_of_rows(_pack_bits(planes))


@library.default("tile_unpack")
def _tile_unpack_reference(tiles: Tensor, n: int, k: int, bits: int) -> Tensor:
    _check_tile_unpack(tiles, n, k, bits)
    rows = tiles.transpose(1, 2).flatten(0, 1)[:n]
    place = 1 << torch.arange(bits, device=tiles.device, dtype=torch.int32)
    planes = _unpack_bits(rows, tiles.shape[1] * 32).unflatten(-1, (tiles.shape[1] * (32 // bits), bits))
    return (planes * place).sum(-1)[:, :k].to(torch.uint8)


def _check_bitpack(x: Tensor, shift: Tensor | None, levels: str) -> None:
    check_one_of("bitpack", "levels", levels, LEVELS)
    check_tensor("bitpack", "shift", shift, torch.float32, [check_rows("bitpack", x)], x)


def _check_bitunpack(sign: Tensor, nonzero: Tensor | None, k: int) -> None:
    require(sign.dim() >= 1, "bitunpack: sign must have at least one dimension, got a scalar")
    require(
        0 <= k <= MAX_COLUMNS and sign.shape[-1] == ceil_div(k, 32),
        f"bitunpack: sign must have ceil(k / 32) words in its last dimension, got k = {k} and {sign.shape[-1]} words",
    )
    for name, plane in (("sign", sign), ("nonzero", nonzero)):
        check_tensor("bitunpack", name, plane, torch.int32, sign.shape, sign)


def _check_bits(op: str, bits: int) -> None:
    require(bits in (1, 4, 8), f"{op}: bits must be 1, 4 or 8, got {bits}")


def _check_tile_pack(codes: Tensor, bits: int) -> None:
    _check_bits("tile_pack", bits)
    require(codes.dim() == 2, f"tile_pack: codes must have shape [n, k], got {list(codes.shape)}")
    require(codes.shape[1] <= MAX_COLUMNS, f"tile_pack: codes must have at most {MAX_COLUMNS} columns")
    check_tensor("tile_pack", "codes", codes, torch.uint8, codes.shape, codes)


def _check_tile_unpack(tiles: Tensor, n: int, k: int, bits: int) -> None:
    _check_bits("tile_unpack", bits)
    require(
        n >= 0 and 0 <= k <= MAX_COLUMNS,
        f"tile_unpack: n must be at least 0 and k between 0 and 16777216, got n = {n}, k = {k}",
    )
    check_tensor("tile_unpack", "tiles", tiles, torch.int32, tile_shape(n, k, bits), tiles)


@torch.library.register_fake("bitmill::bitpack")
def _(x, shift=None, levels="sign", threshold=0.0, mean=False):
    _check_bitpack(x, shift, levels)
    plane = (*x.shape[:-1], ceil_div(x.shape[-1], 32))
    return (
        x.new_empty(plane, dtype=torch.int32),
        x.new_empty(plane if levels == "sign" else 0, dtype=torch.int32),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
        x.new_empty(x.shape[:-1] if mean else 0, dtype=torch.float32),
    )


@torch.library.register_fake("bitmill::bitunpack")
def _(sign, nonzero, k):
    _check_bitunpack(sign, nonzero, k)
    return sign.new_empty((*sign.shape[:-1], k), dtype=torch.int8)


@torch.library.register_fake("bitmill::tile_pack")
def _(codes, bits):
    _check_tile_pack(codes, bits)
    return codes.new_empty(tile_shape(codes.shape[0], codes.shape[1], bits), dtype=torch.int32)


@torch.library.register_fake("bitmill::tile_unpack")
def _(tiles, n, k, bits):
    _check_tile_unpack(tiles, n, k, bits)
    return tiles.new_empty((n, k), dtype=torch.uint8)


def bitpack(
    x: Tensor, shift: Tensor | None = None, levels: str = "sign", threshold: float = 0.0, mean: bool = False
) -> Packed:
    """Pack rows to bits.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        shift: float32 [k], added first, or None.
        levels: "sign", "plus" or "bool" (see the module's docstring).
        threshold: for "bool".
        mean: also answer mean |x + shift| of each row.
    Returns:
        sign: int32 [..., ceil(k / 32)].
        nonzero: the same for "sign" (bit 1 where the level is not 0), empty otherwise.
        count: int32 [...], set bits of `nonzero` ("sign") or of `sign`.
        mean: float32 [...], or empty.
    Raises:
        ValueError: for another dtype, a wrong shape or unknown levels.
    """
    return torch.ops.bitmill.bitpack.default(x, shift, levels, threshold, mean)


def bitunpack(sign: Tensor, nonzero: Tensor | None, k: int) -> Tensor:
    """Undo `bitpack`: int8 [..., k] of -1, 0 (only with `nonzero`) and +1."""
    return torch.ops.bitmill.bitunpack.default(sign, nonzero, k)


def tile_pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [n, k] of 1, 4 or 8 bits to weight tiles, int32 [ceil(n / 16), ceil(k bits / 32), 16]."""
    return torch.ops.bitmill.tile_pack.default(codes, bits)


def tile_unpack(tiles: Tensor, n: int, k: int, bits: int) -> Tensor:
    """Undo `tile_pack`: uint8 codes [n, k]."""
    return torch.ops.bitmill.tile_unpack.default(tiles, n, k, bits)
