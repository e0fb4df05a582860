# SPDX-License-Identifier: Apache-2.0
"""Scores of binary queries and keys, and the decisions that make {0, 1} maps of them, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

# An additive mask drops a key from here down: BERT's -10000, the lowest float of any dtype, and minus infinity alike.
DROPPED = -1e4


def scaled(products: Tensor, d: int, scaling: float | None) -> Tensor:
    """Products of queries and keys times `scaling`, or over sqrt(d) for None."""
    # divided, as in the published code: the product with a rounded reciprocal may pass a window that the quotient ends
    return products / math.sqrt(d) if scaling is None else products * scaling


def masked_scores(scores: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Scores with a mask (bool or additive) applied: minus infinity where a key is dropped.

    `dropout` sets scores to 0 after an additive bias and before keys are dropped, so that no dropped key returns.
    """
    if mask is None:
        return drop(scores, dropout) if dropout else scores
    if mask.dtype == torch.bool:
        gone = ~mask
    else:
        bias = mask.float()
        gone = bias <= DROPPED
        scores = scores + bias.masked_fill(gone, 0.0)
    return (drop(scores, dropout) if dropout else scores).masked_fill(gone, -torch.inf)


def row_softmax(scores: Tensor) -> Tensor:
    """The softmax of every row; a row of -inf only is 0, as in torch's attention."""
    return torch.softmax(scores, -1).nan_to_num(0.0)


def _straight_through(levels: Tensor, scores: Tensor) -> Tensor:
    """levels, with the gradient of the softmax of scores."""
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return levels
    probability = row_softmax(scores)
    return levels + (probability - probability.detach())


def softmax_aware_map(scores: Tensor, beta: float = 0.25, row_scale: bool = False) -> Tensor:
    """[softmax(scores) >= beta max] of every row, with the gradient of the softmax (BiViT, section 3.2).

    Decided on the scores, as scores >= max - ln(1 / beta), so no softmax is needed without a gradient. Scores of -inf
    are never 1. `beta` lies in (0, 1]. `row_scale` multiplies a row by the mean of its selected probabilities, the
    scale v of equation 5.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"softmax_aware_map: beta must lie in (0, 1], got {beta}")
    if scores.shape[-1] == 0:
        return scores.clone()
    fixed = scores.detach()
    bits = ((fixed >= fixed.amax(-1, keepdim=True) - math.log(1 / beta)) & (fixed > -torch.inf)).to(scores.dtype)
    if row_scale:
        chosen = row_softmax(fixed) * bits
        bits = bits * (chosen.sum(-1, keepdim=True) / bits.sum(-1, keepdim=True).clamp_min(1))
    return _straight_through(bits, scores)


def one_hot_map(scores: Tensor) -> Tensor:
    """1 at the first largest score of every row, with the gradient of the softmax; a row of -inf only is 0."""
    if scores.shape[-1] == 0:
        return scores.clone()
    fixed = scores.detach()
    bits = torch.zeros_like(fixed).scatter(-1, fixed.argmax(-1, keepdim=True), 1.0)
    return _straight_through(bits * (fixed > -torch.inf), scores)


def sampled_map(scores: Tensor) -> Tensor:
    """Bernoulli samples of the softmax, with its gradient."""
    return _straight_through(torch.bernoulli(row_softmax(scores.detach())), scores)


# What `softmax_aware_attention` may select keys by, besides its threshold.
SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"one_hot": one_hot_map, "sample": sampled_map}
