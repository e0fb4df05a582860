# SPDX-License-Identifier: Apache-2.0
"""Rows of a packed table as floats: scale * (-1, 0 or +1), what an embedding of 1-bit entries reads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import FLOATS, MAX_COLUMNS, TILE_ROWS, check_tensor, group_count, require, tile_shape
from ._groups import columns_of_groups
from .bitpack import bitunpack

library.define(
    "binary_embedding",
    "(Tensor ids, Tensor weight, Tensor? weight_nonzero, Tensor scale, int k, int group_size) -> Tensor",
)


@library.default("binary_embedding")
def _binary_embedding_reference(
    ids: Tensor, weight: Tensor, weight_nonzero: Tensor | None, scale: Tensor, k: int, group_size: int
) -> Tensor:
    _check(ids, weight, weight_nonzero, scale, k, group_size)
    rows = scale.shape[0]
    if ids.numel():
        least, most = (int(t) for t in torch.aminmax(ids))
        if least < 0 or most >= rows:
            raise IndexError(f"binary_embedding: ids must lie in [0, {rows}), got {least if least < 0 else most}")
    tile, lane = ids // TILE_ROWS, ids % TILE_ROWS
    signs = bitunpack(weight[tile, :, lane], None if weight_nonzero is None else weight_nonzero[tile, :, lane], k)
    return columns_of_groups(scale[ids], k, group_size) * signs.to(scale.dtype)


def _check(ids, weight, weight_nonzero, scale, k, group_size) -> None:
    op, n = "binary_embedding", scale.shape[0] if scale.dim() else 0
    require(0 <= k <= MAX_COLUMNS, f"{op}: k must be between 0 and {MAX_COLUMNS}, got {k}")
    require(scale.dtype in FLOATS, f"{op}: scale must be float32, bfloat16 or float16, got {str(scale.dtype)[6:]}")
    check_tensor(op, "scale", scale, scale.dtype, [n, group_count(op, k, group_size)], scale)
    check_tensor(op, "ids", ids, torch.int64, ids.shape, scale)
    check_tensor(op, "weight", weight, torch.int32, tile_shape(n, k), scale)
    check_tensor(op, "weight_nonzero", weight_nonzero, torch.int32, tile_shape(n, k), scale)


@torch.library.register_fake("bitmill::binary_embedding")
def _(ids, weight, weight_nonzero, scale, k, group_size):
    _check(ids, weight, weight_nonzero, scale, k, group_size)
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
