# SPDX-License-Identifier: Apache-2.0
"""From one number a group of columns to one a column."""

from __future__ import annotations

import torch
from torch import Tensor


def columns_of_groups(t: Tensor, k: int, group_size: int | None) -> Tensor:
    """[..., groups] to [..., k]: each group's number at its columns. One group ([..., 1]) stays as it is.

    Not repeat_interleave and a slice: torch.compile (2.13, CPU) leaves the columns of a last, narrower group unwritten.
    It cannot see through searchsorted.
    """
    if not group_size:
        return t
    ends = torch.arange(1, t.shape[-1] + 1, device=t.device) * group_size
    return t.index_select(-1, torch.searchsorted(ends, torch.arange(k, device=t.device), right=True))
