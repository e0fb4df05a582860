# SPDX-License-Identifier: Apache-2.0
"""Rows of a packed table of 4-bit floats: row i of `fp4_weight` for each id i, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, TILE_ROWS, ceil_div, check_one_of, check_tensor, require, tile_shape
from ._groups import columns_of_groups
from .fp4 import CODEBOOKS, FORMATS, short_name, table
from .fp4_linear import scale_values

library.define(
    "fp4_embedding",
    '(Tensor ids, Tensor weight, Tensor scale, int k, str format="e2m1", int group_size=0, Tensor? global_scale=None)'
    " -> Tensor",
)


@library.default("fp4_embedding")
def _fp4_embedding_reference(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    k: int,
    format: str = "e2m1",
    group_size: int = 0,
    global_scale: Tensor | None = None,
) -> Tensor:
    _check(ids, weight, scale, k, format, group_size, global_scale)
    if ids.numel():
        least, most = (int(t) for t in torch.aminmax(ids))
        if least < 0 or most >= scale.shape[0]:
            got = least if least < 0 else most
            raise IndexError(f"fp4_embedding: ids must lie in [0, {scale.shape[0]}), got {got}")
    place = torch.arange(0, 32, 4, dtype=torch.int32, device=ids.device)
    words = weight[ids // TILE_ROWS, :, ids % TILE_ROWS].unsqueeze(-1)
    values = table(format, ids.device)[(words >> place & 15).flatten(-2)[..., :k]]
    rows = scale[ids]
    if global_scale is None:
        return values * columns_of_groups(scale_values(rows, None), k, group_size)
    one = torch.ones_like(global_scale)  # fp4_weight multiplies with the global scale last
    return values * columns_of_groups(scale_values(rows, one), k, group_size) * global_scale


def _check(ids, weight, scale, k, format, group_size, global_scale) -> None:
    op = "fp4_embedding"
    check_one_of(op, "format", format, (*FORMATS, *CODEBOOKS))
    require(0 <= k <= MAX_COLUMNS, f"{op}: k must be between 0 and {MAX_COLUMNS}, got {k}")
    valid = group_size >= 0 and group_size % 8 == 0
    require(valid, f"{op}: group_size must be 0 or a positive multiple of 8, got {group_size}")
    dtypes = (torch.uint8,) if global_scale is not None else (torch.float32, torch.uint8)
    require(
        scale.dtype in dtypes,
        f"{op}: scale must be float32, uint8 for E8M0, or uint8 for E4M3 with a global_scale,"
        f" got {short_name(scale.dtype)}",
    )
    n = scale.shape[0] if scale.dim() else 0
    check_tensor(op, "scale", scale, scale.dtype, [n, ceil_div(k, group_size) if group_size else 1], scale)
    check_tensor(op, "ids", ids, torch.int64, ids.shape, scale)
    check_tensor(op, "weight", weight, torch.int32, tile_shape(n, k, 4), scale)
    check_tensor(op, "global_scale", global_scale, torch.float32, [], scale)


@torch.library.register_fake("bitmill::fp4_embedding")
def _(ids, weight, scale, k, format="e2m1", group_size=0, global_scale=None):
    _check(ids, weight, scale, k, format, group_size, global_scale)
    return scale.new_empty((*ids.shape, k), dtype=torch.float32)


def fp4_embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    k: int,
    format: str = "e2m1",
    group_size: int = 0,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Rows of a table [n, k] of codes.

    Args:
        ids: int64 [...], each in [0, n).
        weight: tiles of the codes, int32 [ceil(n / 16), ceil(k / 8), 16].
        scale: float32 or uint8 (E8M0, or E4M3 with a global_scale) [n, ceil(k / group_size)], or [n, 1].
        k: columns.
        format: what codes stand for, a name that `code_values` takes.
        group_size: columns that share a scale, a multiple of 8; 0: all.
        global_scale: float32 [], a factor of all, or None.
    Returns:
        float32 [..., k].
    Raises:
        IndexError: for an id outside.
        ValueError: for wrong shapes, dtypes, devices or names.
    """
    return torch.ops.bitmill.fp4_embedding.default(ids, weight, scale, k, format, group_size, global_scale)
