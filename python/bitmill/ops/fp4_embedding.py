# SPDX-License-Identifier: Apache-2.0
"""Rows of a packed table of 4-bit floats: row i of `fp4_weight` for each id i, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._checks import TILE_ROWS
from ._fp4_arguments import EmbeddingArguments
from ._groups import columns_of_groups
from .fp4 import table
from .fp4_linear import scale_values

library.define(
    "fp4_embedding",
    '(Tensor ids, Tensor weight, Tensor scale, int k, str format="e2m1", int group_size=0, Tensor? global_scale=None)'
    " -> Tensor",
)


@library.default("fp4_embedding")
def _fp4_embedding_reference(ids: Tensor, *arguments: Any) -> Tensor:
    of = EmbeddingArguments(*arguments)
    of.check("fp4_embedding", ids)
    if ids.numel():
        least, most = (int(t) for t in torch.aminmax(ids))
        if least < 0 or most >= of.scale.shape[0]:
            got = least if least < 0 else most
            raise IndexError(f"fp4_embedding: ids must lie in [0, {of.scale.shape[0]}), got {got}")
    place = torch.arange(0, 32, 4, dtype=torch.int32, device=ids.device)
    words = of.weight[ids // TILE_ROWS, :, ids % TILE_ROWS].unsqueeze(-1)
    values = table(of.format, ids.device)[(words >> place & 15).flatten(-2)[..., : of.k]]
    rows = of.scale[ids]
    if of.global_scale is None:
        return values * columns_of_groups(scale_values(rows, None), of.k, of.group_size)
    one = torch.ones_like(of.global_scale)  # fp4_weight multiplies with the global scale last
    return values * columns_of_groups(scale_values(rows, one), of.k, of.group_size) * of.global_scale


@torch.library.register_fake("bitmill::fp4_embedding")
def _(ids, *arguments):
    of = EmbeddingArguments(*arguments)
    of.check("fp4_embedding", ids)
    return of.scale.new_empty((*ids.shape, of.k), dtype=torch.float32)


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
