# SPDX-License-Identifier: Apache-2.0
"""The three encodings of salient weights (cpp/core/layout.h): a bitmap, a list, and whole columns.

Encoded arrays are (index, value, start); `index` tells the encoding: int32 tiles [ceil(n/16), ceil(k/32), 16] are a
bitmap, uint8 gaps [steps, 16] a list, int32 [c] columns. Bitmap and list hold the same weights: `encode` chooses.
Values are codes of 8 bits, codes of 4 bits, two to a byte, or float16: `bits` is 8, 4 or 16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._checks import TILE_ROWS, ceil_div, require, tile_shape
from .bitpack import tile_pack, tile_unpack

STRUCTURES = ("element", "column")
ENCODINGS = ("bitmap", "list", "columns")
NO_ENTRY = 255  # the gap of a step that holds no entry
MAX_LIST_COLUMNS = (1 << 16) - 1

Encoded = tuple[Tensor, Tensor, Tensor | None]  # index, value, start


def encoding_of(op: str, index: Tensor) -> str:
    kinds = {(torch.int32, 3): "bitmap", (torch.uint8, 2): "list", (torch.int32, 1): "columns"}
    kind = kinds.get((index.dtype, index.dim()))
    require(
        kind is not None,
        f"{op}: index must be int32 tiles (a bitmap), uint8 [steps, 16] (a list) or int32 [columns],"
        f" got {str(index.dtype).removeprefix('torch.')} of shape {list(index.shape)}",
    )
    return str(kind)


def index_shape(encoding: str, n: int, k: int, entries: int) -> list[int]:
    return {"bitmap": tile_shape(n, k), "list": [entries, TILE_ROWS], "columns": [entries]}[encoding]


def value_shape(encoding: str, n: int, entries: int, bits: int) -> list[int]:
    if encoding == "columns":
        return tile_shape(n, entries, bits)
    in_byte = 2 if bits == 4 else 1
    return [ceil_div(entries, in_byte)] if encoding == "bitmap" else [entries, TILE_ROWS // in_byte]


def value_dtype(encoding: str, bits: int) -> torch.dtype:
    return torch.int32 if encoding == "columns" else torch.float16 if bits == 16 else torch.uint8


def entries_of(encoding: str, index: Tensor, value: Tensor, bits: int) -> int:
    """What `index_shape` and `value_shape` give these shapes for: of a bitmap the values that there is room for."""
    if encoding != "bitmap":
        return index.shape[0]
    length = value.shape[0] if value.dim() else 0
    return 2 * length if bits == 4 else length


def start_length(encoding: str, n: int) -> int:
    return (ceil_div(n, TILE_ROWS) if encoding == "list" else n) + 1


def encode(salient: Tensor, value: Tensor, bits: int, integers: bool = False) -> Encoded:
    """The salient ones of value [n, k], uint8 or float16, as a list or a bitmap, whichever is smaller.

    A list takes 1 + bits / 8 bytes a step and row, a bitmap a bit a weight and bits / 8 bytes an entry: the list is
    smaller up to about 11 % of codes and 9 % of float16 values, if the rows of a tile have about as many.
    `integers`: the weight will meet int8 activations, which a bitmap multiplies faster; so a list has to make the whole
    weight smaller by a sixteenth.
    """
    n, k = salient.shape
    tiles, words, lanes = tile_shape(n, k)
    plane = 4 * tiles * words * lanes
    bitmap_bytes = 2 * plane + ceil_div(int(salient.sum()) * bits, 8) + 4 * (n + 1)
    if k <= MAX_LIST_COLUMNS:
        steps = int(_list_positions(salient)[1][-1])
        list_bytes = plane + steps * TILE_ROWS * (8 + bits) // 8 + 4 * (tiles + 1)
        if list_bytes * (17 if integers else 16) < bitmap_bytes * 16:
            return encode_list(salient, value, bits)
    return encode_bitmap(salient, value, bits)


def encode_bitmap(salient: Tensor, value: Tensor, bits: int) -> Encoded:
    counts = pad(salient.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    stored = value[salient]
    return tile_pack(salient.to(torch.uint8), 1), _pairs(stored) if bits == 4 else stored, counts


def encode_list(salient: Tensor, value: Tensor, bits: int) -> Encoded:
    rows, columns = salient.nonzero(as_tuple=True)
    position, start = _list_positions(salient)
    shape = (int(start[-1]), TILE_ROWS)
    index = torch.full(shape, NO_ENTRY, dtype=torch.uint8, device=value.device)
    stored = torch.zeros(shape, dtype=value.dtype, device=value.device)
    where = start.long()[rows // TILE_ROWS] + position, rows % TILE_ROWS
    index[where] = (_distances(rows, columns) % NO_ENTRY).to(torch.uint8)
    stored[where] = value[rows, columns]
    return index, _pairs(stored) if bits == 4 else stored, start


def encode_columns(columns: Tensor, value: Tensor, bits: int) -> Encoded:
    """Whole columns: bool [k], and value [n, k], uint8 or float16."""
    chosen = columns.nonzero().flatten()
    values = value[:, chosen]
    return chosen.to(torch.int32), tile_pack(values, 4) if bits == 4 else _tiles(values), None


def decode(op: str, encoded: Encoded, n: int, k: int, bits: int) -> tuple[Tensor, Tensor]:
    """salient bool [n, k] and what is stored there as float32 [n, k].

    Raises:
        ValueError: for arrays that contradict each other.
    """
    index, value, start = encoded
    encoding = encoding_of(op, index)
    salient = torch.zeros(n, k, dtype=torch.bool, device=index.device)
    dense = torch.zeros(n, k, device=index.device)
    if encoding == "columns":
        column = index.long()
        _agree(op, bool((column.diff() > 0).all() and (column >= 0).all() and (column < k).all()))
        salient[:, column] = True
        if bits == 4:
            dense[:, column] = tile_unpack(value, n, index.numel(), 4).float()
        else:
            dense[:, column] = _untile(value, n, index.numel(), torch.uint8 if bits == 8 else torch.float16).float()
        return salient, dense
    assert start is not None
    counts, last = start.long().diff(), int(start[-1])
    spare = last % 2 if encoding == "bitmap" and bits == 4 else 0  # half of the last byte
    complete = last + spare == entries_of(encoding, index, value, bits)
    _agree(op, bool(start[0] == 0) and complete and bool((counts >= 0).all()))
    if bits == 4:
        value = _apart(value)
    if encoding == "bitmap":
        salient = tile_unpack(index, n, k, 1).bool()
        _agree(op, bool((salient.sum(1) == counts).all()))
        return salient, dense.masked_scatter(salient, value.float())
    entry = index != NO_ENTRY
    moved = pad((index.long() + entry).cumsum(0), (0, 0, 1, 0))  # before each step
    tile = torch.repeat_interleave(counts)
    column = moved[1:] - moved[start.long()[tile]] - 1
    row = tile.unsqueeze(1) * TILE_ROWS + torch.arange(TILE_ROWS, device=index.device)
    entry &= row < n
    _agree(op, bool((column[entry] < k).all()))
    salient[row[entry], column[entry]] = True
    dense[row[entry], column[entry]] = value[entry].float()
    return salient, dense


def _agree(op: str, condition: bool) -> None:
    require(condition, f"{op}: the packed arrays contradict each other")


def _list_positions(salient: Tensor) -> tuple[Tensor, Tensor]:
    """For the entries in order of (row, column) each one's step within its tile; and the starts of the tiles."""
    rows, columns = salient.nonzero(as_tuple=True)
    n = salient.shape[0]
    step = _distances(rows, columns) // NO_ENTRY + 1
    of_row = torch.zeros(ceil_div(n, TILE_ROWS) * TILE_ROWS, dtype=torch.int64, device=rows.device)
    of_row.index_add_(0, rows, step)
    position = step.cumsum(0) - 1 - (of_row.cumsum(0) - of_row)[rows]
    tile = of_row.view(-1, TILE_ROWS)
    longest = tile.amax(1) if tile.numel() else tile.new_zeros(0)
    return position, pad(longest.cumsum(0), (1, 0)).to(torch.int32)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Columns between an entry and the one before it in its row."""
    previous = torch.where(rows.diff(prepend=rows.new_full((1,), -1)) == 0, columns.roll(1), -1)
    return columns - previous - 1


def _pairs(codes: Tensor) -> Tensor:
    """4-bit codes, uint8 [..., c], two to a byte along the last dimension, the first one in the low half."""
    even = pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | even[..., 1::2] << 4


def _apart(pairs: Tensor) -> Tensor:
    """Undo `_pairs`, up to a code more."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def _tiles(value: Tensor) -> Tensor:
    """uint8 or float16 [n, c] as int32 tiles of 8 or 16 bits."""
    n, c = value.shape
    tiles, words, _ = tile_shape(n, c, 8 * value.element_size())
    in_word = 4 // value.element_size()
    padded = pad(value, (0, words * in_word - c, 0, tiles * TILE_ROWS - n))
    return padded.view(tiles, TILE_ROWS, words, in_word).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)


def _untile(tiles: Tensor, n: int, c: int, dtype: torch.dtype) -> Tensor:
    in_word = 4 // dtype.itemsize
    values = tiles.contiguous().unsqueeze(-1).view(dtype).transpose(1, 2)
    return values.reshape(tiles.shape[0] * TILE_ROWS, tiles.shape[1] * in_word)[:n, :c]
