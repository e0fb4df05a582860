# SPDX-License-Identifier: Apache-2.0
"""Inputs of the tests of FP4 casts."""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor

VALUES = {
    "e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "e1m2": (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5),
    "e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16),
}
HALVES = ("bfloat16", "float16")


@cache
def every(kind: str) -> Tensor:
    """Every bfloat16 or float16; of float32 +-64 units around every value and middle, extremes, and random bits."""
    if kind in HALVES:
        return torch.arange(1 << 16).to(torch.int16).view(getattr(torch, kind))
    points = [v for values in VALUES.values() for v in values]
    points += [(a + b) / 2 for values in VALUES.values() for a, b in itertools.pairwise(values)]
    near = torch.tensor(points).view(torch.int32)[:, None] + torch.arange(-64, 65, dtype=torch.int32)
    extreme = torch.tensor([0.0, torch.inf, torch.nan, 1e-45, 1e-40, 3.4028235e38, 16.000002, 6.0000005])
    positive = torch.cat([near.clamp_min(0).flatten().view(torch.float32), extreme])
    random = torch.randint(-(1 << 31), 1 << 31, (2001,)).to(torch.int32).view(torch.float32)
    return torch.cat([positive, -positive, random])


def finite_rows(kind: str, width: int) -> Tensor:
    """Every finite half in random order, a few left out, as rows; of float32 those up to 6, with a 6 in every 16
    columns, which makes the scales of blocks 1."""
    x = every(kind)
    x = x[x.isfinite()] if kind in HALVES else x[x.abs() <= 6]
    x = x[torch.randperm(x.numel())][: x.numel() // width * width].view(-1, width)
    if kind not in HALVES:
        x[:, ::16] = 6
    return x
