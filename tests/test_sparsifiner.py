# SPDX-License-Identifier: Apache-2.0
"""Sparsifiner: predicted masks, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from bitmill import binarize
from bitmill.recipes.sparsifiner import MaskPredictor, SparsifinerAttention


def test_predicted_masks() -> None:
    predictor = MaskPredictor(8, 20, keep=0.3, reduction=2, topk=4)
    with torch.no_grad():
        predictor.basis.normal_()
    q, k, v = torch.randn(3, 2, 4, 20, 8).unbind(0)
    mask = predictor(q, k)
    assert mask[:, :, 0].all() and (mask[:, :, 1:].sum(-1) == 6).all()
    kept = predictor.estimate(q, k).masked_fill(~mask[:, :, 1:], torch.inf).amin(-1)
    dropped = predictor.estimate(q, k).masked_fill(mask[:, :, 1:], -torch.inf).amax(-1)
    assert (kept >= dropped).all()
    binary = binarize.softmax_aware_attention(q, k, v, mask)
    signs = torch.sign(q) @ torch.sign(k).mT / 8**0.5
    chosen = binarize.softmax_aware_map(signs.masked_fill(~mask, -torch.inf))
    assert torch.equal(binary, chosen @ torch.sign(v)) and not bool((chosen.bool() & ~mask).any())
    predictor.estimate(q, k).sum().backward()
    assert all(p.grad is not None for p in predictor.parameters())


def test_sparsifiner_errors() -> None:
    for arguments, message in (
        ((8, 20, 0.0), r"keep must lie in \(0, 1\], got 0.0"),
        ((8, 20, 0.5, 6), "topk must lie between 1 and tokens // reduction = 3, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskPredictor(*arguments)
    with pytest.raises(ValueError, match=r"expected q and k \[batch, heads, 60, d\], got \[1, 2, 59, 8\]"):
        SparsifinerAttention(16, 2, 60)(torch.randn(1, 59, 16))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads = 3, got 16"):
        SparsifinerAttention(16, 3, 60)
