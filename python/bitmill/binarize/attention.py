# SPDX-License-Identifier: Apache-2.0
"""Attention with binary queries, keys, values and attention maps: the training forms, in plain torch, float32.

q, k, v are [..., heads, tokens, d], before their signs. Scores are S = qb kb^T scaling + mask, with qb = sgn(q) and
kb = sgn(k), so S is an exact integer times a constant plus the mask; the map is a {0, 1} matrix, the context map . vb.

bool           map = [S > 0]                                     BiBERT, ICLR 2022
softmax_aware  map = [softmax(S) >= beta max], row by row        BiViT, ICCV 2023, equation 9
elastic        map = alpha_a [softmax(alpha_q alpha_k S) > alpha_a / 2], context alpha_v map . vb     BiT, NeurIPS 2022

A mask is boolean (True: attend) or additive, and is broadcast to S; None attends everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops._library import without_autocast
from .functions import ALPHA_FLOOR, boolean, elastic, sign
from .products import level_product


def _scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    q_step: Tensor | None = None,
    k_step: Tensor | None = None,
) -> Tensor:
    dot = level_product(q, k.mT, q_step, k_step)
    # divided, as in the published code: the product with a rounded reciprocal may pass a window that the quotient ends
    scores = dot / math.sqrt(q.shape[-1]) if scaling is None else dot * scaling
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.float()


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dim() < 2 or q.shape[-1] != k.shape[-1] or q.shape[-1] == 0 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{name}: expected q [..., n, d], k [..., m, d] and v [..., m, e] with d > 0,"
            f" got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name}: mask must be boolean (True: attend) or additive floats, got {mask.dtype}")


def bool_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scaling: float | None = None, zero: str = "torch"
) -> Tensor:
    """BiBERT's Bi-Attention: no softmax, and a context of whole numbers.

    Gradients are straight-through with open windows: |S| < 1 for the map, |x| < 1 for q, k and v.

    Args:
        q, k, v: float [..., n, d], [..., m, d], [..., m, e].
        mask: bool or additive float, broadcast to [..., n, m], or None.
        scaling: of the scores; None for 1 / sqrt(d). It does not change the map, only the window of its gradient.
        zero: what sgn(0) is, as in `sign`.
    Returns:
        [..., n, e] of q's dtype; a row without an attended key is 0.
    Raises:
        ValueError: for shapes that do not fit, or an integer mask.
    """
    _check("bool_attention", q, k, v, mask)
    with without_autocast(q):
        query, key, value = (sign(t.float(), "clip_open", zero) for t in (q, k, v))
        return level_product(boolean(_scores(query, key, mask, scaling), "clip_open"), value).to(q.dtype)


def softmax_aware_map(scores: Tensor, beta: float = 0.25) -> Tensor:
    """[softmax(scores) >= beta max] of every row, with the gradient of the softmax (BiViT, section 3.2).

    Decided on the scores, as scores >= max - ln(1 / beta), so no softmax is needed without a gradient. Scores of -inf
    are never 1. `beta` lies in (0, 1].
    """
    if not 0 < beta <= 1:
        raise ValueError(f"softmax_aware_map: beta must lie in (0, 1], got {beta}")
    if scores.shape[-1] == 0:
        return scores.clone()
    gap = math.log(1 / beta)
    bits = (scores.detach() >= scores.detach().amax(-1, keepdim=True) - gap) & (scores.detach() > -torch.inf)
    if not (torch.is_grad_enabled() and scores.requires_grad):
        return bits.to(scores.dtype)
    probability = torch.softmax(scores, -1).nan_to_num(0.0)  # a row of -inf has none
    return bits.to(scores.dtype) + (probability - probability.detach())


def softmax_aware_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    beta: float = 0.25,
    zero: str = "torch",
) -> Tensor:
    """BiViT's attention with Softmax-aware Binarization, without the row scale, as its code computes it.

    The gradient of the map is the softmax's, without a window; those of q, k and v have open windows |x| < 1.
    Arguments, result and errors are those of `bool_attention`; `beta` in (0, 1] is the threshold's share of the row's
    largest probability.
    """
    _check("softmax_aware_attention", q, k, v, mask)
    with without_autocast(q):
        query, key, value = (sign(t.float(), "clip_open", zero) for t in (q, k, v))
        return level_product(softmax_aware_map(_scores(query, key, mask, scaling), beta), value).to(q.dtype)


def elastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha_q: Tensor,
    alpha_k: Tensor,
    alpha_v: Tensor,
    alpha_a: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    zero: str = "torch",
    dropout: float = 0.0,
) -> Tensor:
    """BiT's attention: elastic signs of q, k and v, the softmax, and an elastic {0, alpha} map.

    Args:
        alpha_q, alpha_k, alpha_v, alpha_a: float32 scalar tensors, the learned steps.
        dropout: of the probabilities, before their threshold, as BiT trains.
        The others are those of `bool_attention`.
    Gradients are those of `elastic` (with closed windows) and of the softmax.
    """
    _check("elastic_attention", q, k, v, mask)
    with without_autocast(q):
        steps = [alpha.clamp_min(ALPHA_FLOOR) for alpha in (alpha_q, alpha_k, alpha_v, alpha_a)]
        query, key, value = (elastic(t.float(), a, zero=zero) for t, a in zip((q, k, v), steps[:3], strict=True))
        probability = torch.softmax(_scores(query, key, mask, scaling, steps[0], steps[1]), -1)
        probability = torch.nn.functional.dropout(probability, dropout, dropout > 0)
        attention = elastic(probability, steps[3], 1, signed=False)
        return level_product(attention, value, steps[3], steps[2]).to(q.dtype)
