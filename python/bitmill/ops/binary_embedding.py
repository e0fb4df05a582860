# SPDX-License-Identifier: Apache-2.0
"""Rows of a packed table as floats: scale * (-1, 0 or +1), what an embedding of 1-bit entries reads.

`binary_embedding_norm` is all of a BERT's embedding, layer_norm(words[ids] + types[type_ids] + positions), in one op:
the composition of `binary_embedding`, two additions and `layer_norm`, which it equals bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._block_arguments import LayerNormArguments
from ._checks import FLOATS, MAX_COLUMNS, TILE_ROWS, check_tensor, group_count, require, short_name, tile_shape
from ._groups import columns_of_groups
from .bitpack import bitunpack

library.define(
    "binary_embedding",
    "(Tensor ids, Tensor weight, Tensor? weight_nonzero, Tensor scale, int k, int group_size) -> Tensor",
)
library.define(
    "binary_embedding_norm",
    "(Tensor ids, Tensor weight, Tensor? weight_nonzero, Tensor scale, int k, int group_size, Tensor types,"
    " Tensor? type_ids, Tensor positions, int first, Tensor norm_weight, Tensor norm_bias, float eps) -> Tensor",
)


@library.default("binary_embedding")
def _binary_embedding_reference(
    ids: Tensor, weight: Tensor, weight_nonzero: Tensor | None, scale: Tensor, k: int, group_size: int
) -> Tensor:
    _check("binary_embedding", ids, weight, weight_nonzero, scale, k, group_size)
    _check_ids("binary_embedding", "ids", ids, scale.shape[0])
    return _rows(ids, weight, weight_nonzero, scale, k, group_size)


def _rows(ids: Tensor, weight: Tensor, weight_nonzero: Tensor | None, scale: Tensor, k: int, group_size: int) -> Tensor:
    tile, lane = ids // TILE_ROWS, ids % TILE_ROWS
    signs = bitunpack(weight[tile, :, lane], None if weight_nonzero is None else weight_nonzero[tile, :, lane], k)
    return columns_of_groups(scale[ids], k, group_size) * signs.to(scale.dtype)


def _check(op, ids, weight, weight_nonzero, scale, k, group_size) -> None:
    n = _row_count(scale)
    require(0 <= k <= MAX_COLUMNS, f"{op}: k must be between 0 and {MAX_COLUMNS}, got {k}")
    require(scale.dtype in FLOATS, f"{op}: scale must be float32, bfloat16 or float16, got {short_name(scale.dtype)}")
    check_tensor(op, "scale", scale, scale.dtype, [n, group_count(op, k, group_size)], scale)
    check_tensor(op, "ids", ids, torch.int64, ids.shape, scale)
    check_tensor(op, "weight", weight, torch.int32, tile_shape(n, k), scale)
    check_tensor(op, "weight_nonzero", weight_nonzero, torch.int32, tile_shape(n, k), scale)


def _check_ids(op: str, name: str, ids: Tensor, rows: int) -> None:
    if ids.numel():
        least, most = (int(t) for t in torch.aminmax(ids))
        if least < 0 or most >= rows:
            raise IndexError(f"{op}: {name} must lie in [0, {rows}), got {least if least < 0 else most}")


def _row_count(table: Tensor) -> int:
    return table.shape[0] if table.dim() else 0


@torch.library.register_fake("bitmill::binary_embedding")
def _(ids, weight, weight_nonzero, scale, k, group_size):
    _check("binary_embedding", ids, weight, weight_nonzero, scale, k, group_size)
    return scale.new_empty((*ids.shape, k))


def binary_embedding(
    ids: Tensor, weight: Tensor, weight_nonzero: Tensor | None, scale: Tensor, k: int, group_size: int = 0
) -> Tensor:
    """Rows of a table of bits.

    Args:
        ids: int64 [...], each in [0, n).
        weight: tiles of the table [n, k], int32 [ceil(n / 16), ceil(k / 32), 16].
        weight_nonzero: the same, tiles of nonzero bits, or None.
        scale: float32, bfloat16 or float16 [n, groups].
        k: columns.
        group_size: columns that share a scale, a multiple of 32; 0: all.
    Returns:
        [..., k] of the scale's dtype.
    Raises:
        IndexError: for an id outside.
        ValueError: for wrong shapes or dtypes.
    """
    return torch.ops.bitmill.binary_embedding.default(ids, weight, weight_nonzero, scale, k, group_size)


@library.default("binary_embedding_norm")
def _binary_embedding_norm_reference(
    ids: Tensor,
    weight: Tensor,
    weight_nonzero: Tensor | None,
    scale: Tensor,
    k: int,
    group_size: int,
    types: Tensor,
    type_ids: Tensor | None,
    positions: Tensor,
    first: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    words, op = (ids, weight, weight_nonzero, scale, k, group_size), "binary_embedding_norm"
    _check_norm(*words, types, type_ids, positions, first, norm_weight, norm_bias, eps)
    _check_ids(op, "ids", ids, scale.shape[0])
    if type_ids is not None:
        _check_ids(op, "type_ids", type_ids, types.shape[0])
    x = _rows(*words) + (types[0] if type_ids is None else types[type_ids])
    return torch.layer_norm(x + positions[first : first + ids.shape[-1]], (k,), norm_weight, norm_bias, eps)


def _check_norm(
    ids, weight, weight_nonzero, scale, k, group_size, types, type_ids, positions, first, norm_weight, norm_bias, eps
) -> None:
    op = "binary_embedding_norm"
    _check(op, ids, weight, weight_nonzero, scale, k, group_size)
    require(scale.dtype == torch.float32, f"{op}: scale must be float32, got {short_name(scale.dtype)}")
    require(ids.dim() > 0, f"{op}: ids must have at least one dimension, got a scalar")
    check_tensor(op, "types", types, torch.float32, [_row_count(types), k], scale)
    require(types.shape[0] > 0, f"{op}: types must have at least one row, got none")
    check_tensor(op, "type_ids", type_ids, torch.int64, ids.shape, scale)
    check_tensor(op, "positions", positions, torch.float32, [_row_count(positions), k], scale)
    require(first >= 0, f"{op}: first must be at least 0, got {first}")
    rows, n = positions.shape[0], ids.shape[-1]
    require(first <= rows - n, f"{op}: positions must have rows for {n} ids from {first} on, got {rows} rows")
    LayerNormArguments(norm_weight, norm_bias, eps).check(op, types, "norm_")


@torch.library.register_fake("bitmill::binary_embedding_norm")
def _(ids, weight, weight_nonzero, scale, k, *others):
    _check_norm(ids, weight, weight_nonzero, scale, k, *others)
    return scale.new_empty((*ids.shape, k))


def binary_embedding_norm(
    ids: Tensor,
    weight: Tensor,
    weight_nonzero: Tensor | None,
    scale: Tensor,
    k: int,
    group_size: int,
    types: Tensor,
    type_ids: Tensor | None,
    positions: Tensor,
    first: int,
    norm: LayerNormArguments,
) -> Tensor:
    """The embedding of a BERT whose words are rows of a table of bits, for inference.

    Args:
        ids, weight, weight_nonzero, k, group_size: as for `binary_embedding`; ids [..., n].
        scale: as for `binary_embedding`, float32.
        types: float32 [types, k].
        type_ids: int64, the shape of ids; None: all are of type 0.
        positions: float32 [positions, k].
        first: the position of the first id of each sequence; the last one's must be in the table too.
        norm: weight and bias, float32 [k], and epsilon.
    Returns:
        float32 [..., n, k].
    Raises:
        IndexError: for an id outside.
        ValueError: for wrong shapes or dtypes.
    """
    return torch.ops.bitmill.binary_embedding_norm.default(
        ids, weight, weight_nonzero, scale, k, group_size, types, type_ids, positions, first, *norm
    )
