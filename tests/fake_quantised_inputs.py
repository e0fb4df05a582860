# SPDX-License-Identifier: Apache-2.0
"""Dense weights as published programs write them, computed by their formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitmill.recipes.billm import residual_binarize


def linear_of(weight: Tensor, dtype: torch.dtype = torch.float16) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def pb_llm_weight(n: int, k: int, fraction: float, bits: int = 8, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """float32 [n, k] and its salient entries: gptq_pb's rounding without feedback."""
    w = torch.randn(n, k) * 0.05 + 0.003
    size = w.abs().flatten().sort().values
    mask = w.abs() > size[min(int((1 - fraction) * size.numel()), size.numel() - 1)]
    low, high = w.amin(1, keepdim=True).clamp_max(0), w.amax(1, keepdim=True).clamp_min(0)
    step = (high - low) / (2**bits - 1)
    zero = torch.round(-low / step)
    out = step * (torch.clamp(torch.round(w / step) + zero, 0, 2**bits - 1) - zero)
    for part, kept, target in zip(*(t.split(group_size or k, 1) for t in (w, mask, out)), strict=True):
        binarised = torch.where(kept, 0.0, part)
        mu = binarised.mean(1, keepdim=True)
        alpha = (binarised - mu).abs().mean(1, keepdim=True)
        target.copy_(torch.where(kept, target, mu + alpha * torch.sign(part - mu)))
    return out, mask


def billm_weight(n: int, k: int, salient: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """float32 [n, k] and its salient columns, so many a block: braq's binarisation without feedback and search."""
    w, columns = torch.randn(n, k) * 0.05 + 0.003, torch.zeros(k, dtype=torch.bool)
    for part, chosen in zip(w.split(block, 1), columns.split(block), strict=True):
        chosen[torch.randperm(len(chosen))[:salient]] = True
        sparse = part.abs() > 0.06
        zones = ((~chosen & ~sparse, 1), (~chosen & sparse, 1), (chosen.expand_as(part), 2))
        part.copy_(sum(residual_binarize(part, mask, order).value for mask, order in zones))
    return w, columns
