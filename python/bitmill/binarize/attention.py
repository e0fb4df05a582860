# SPDX-License-Identifier: Apache-2.0
"""Attention with binary queries, keys, values and attention maps: the training forms, in plain torch, float32.

q, k, v are [..., heads, tokens, d], before their signs. Scores are S = qb kb^T / sqrt(d) + mask, with qb = sgn(q) and
kb = sgn(k), so S is an exact integer times a constant plus the mask; the map is a {0, 1} matrix, the context map . vb.

bool           map = [S > 0]                                     BiBERT, ICLR 2022
softmax_aware  map = [softmax(S) >= beta max], row by row        BiViT, ICCV 2023, equation 9
elastic        map = alpha_a [softmax(alpha_q alpha_k S) > alpha_a / 2], context alpha_v map . vb     BiT, NeurIPS 2022
elastic_map    the same with alpha_q = alpha_k = alpha_v = 1 and other gradients                BinaryViT, CVPRW 2023

A mask is boolean (True: attend) or additive, and is broadcast to S; None attends everywhere. An additive mask drops a
key where it is -10000 or less, and is a bias elsewhere. A row without an attended key has the context 0. Heads of k and
v may be fewer than those of q: every one then serves a group of neighbours.

Without a gradient, dropout or another extra the functions call `bitmill.ops.binary_attention`. Its contexts are equal,
bit for bit for the first two rules; for the elastic ones up to the rounding of this softmax, which decides near ties,
and of the sum of values that have an addend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import binary_attention
from ..ops._checks import FLOATS, check_broadcast
from ..ops._library import without_autocast
from .attention_maps import SELECTIONS, masked_scores, row_softmax, scaled, softmax_aware_map
from .functions import ALPHA_FLOOR, boolean, elastic, sign
from .products import level_product


def _runs_packed(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing asks for a gradient, and the op takes these dtypes."""
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, *others))
    return not trains and q.dtype == k.dtype == v.dtype and q.dtype in FLOATS


def _kernel_mask(mask: Tensor | None) -> Tensor | None:
    return mask.float() if mask is not None and mask.dtype == torch.float64 else mask


def _checked(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with as many heads in k and v as in q."""
    if q.dim() < 2 or q.shape[-1] != k.shape[-1] or q.shape[-1] == 0 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{name}: expected q [..., n, d], k [..., m, d] and v [..., m, e] with d > 0,"
            f" got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name}: mask must be boolean (True: attend) or additive floats, got {mask.dtype}")
    if mask is not None:
        remedy = "; a mask of the keys of each batch [batch, m] becomes mask[:, None, None]"
        check_broadcast(name, "mask", mask, (*q.shape[:-1], k.shape[-2]), remedy)
    if scaling is not None and not scaling > 0:
        raise ValueError(f"{name}: scaling must be positive, got {scaling}")
    if q.shape[:-2] == k.shape[:-2]:
        return q, k, v
    if q.dim() < 3 or q.shape[:-3] != k.shape[:-3] or k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        raise ValueError(
            f"{name}: k and v must have the leading dimensions of q, or heads that divide those of q,"
            f" got {list(q.shape)} and {list(k.shape)}"
        )
    group = q.shape[-3] // k.shape[-3]
    return q, k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)


def bool_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    zero: str = "torch",
    dropout: float = 0.0,
) -> Tensor:
    """BiBERT's Bi-Attention: no softmax, and a context of whole numbers.

    Gradients are straight-through with open windows: |S| < 1 for the map, |x| < 1 for q, k and v.

    Args:
        q, k, v: float [..., n, d], [..., m, d], [..., m, e].
        mask: bool or additive float, broadcast to [..., n, m], or None.
        scaling: of the scores; None for 1 / sqrt(d). It does not change the map, only the window of its gradient.
        zero: what sgn(0) is, as in `sign`.
        dropout: of the scores, before their sign, as BiBERT trains: a dropped score is 0, so its bit is 0.
    Returns:
        [..., n, e] of q's dtype; a row without an attended key is 0.
    Raises:
        ValueError: for shapes that do not fit, or an integer mask.
    """
    q, k, v = _checked("bool_attention", q, k, v, mask, scaling)
    if not dropout and _runs_packed(q, k, v, mask):
        return binary_attention(q, k, v, _kernel_mask(mask), "bool", scaling, zero=zero)
    with without_autocast(q):
        query, key, value = (sign(t.float(), "clip_open", zero) for t in (q, k, v))
        scores = masked_scores(scaled(level_product(query, key.mT), q.shape[-1], scaling), mask, dropout)
        return level_product(boolean(scores, "clip_open"), value).to(q.dtype)


def softmax_aware_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    beta: float = 0.25,
    zero: str = "torch",
    dropout: float = 0.0,
    row_scale: bool = False,
    select: str = "threshold",
) -> Tensor:
    """BiViT's attention with Softmax-aware Binarization.

    The gradient of the map is the softmax's, without a window; those of q, k and v have open windows |x| < 1.

    Args:
        beta: in (0, 1], the threshold's share of the row's largest probability.
        dropout: of the scores, before the decision, as BiViT's code trains.
        row_scale: multiply the map by the mean selected probability of the row; off in BiViT's code.
        select: "threshold", or what BiViT's code has for comparison: "one_hot" (the largest score) or "sample"
            (Bernoulli samples of the softmax).
        The others, the result and the errors are those of `bool_attention`.
    """
    q, k, v = _checked("softmax_aware_attention", q, k, v, mask, scaling)
    if select != "threshold" and select not in SELECTIONS:
        raise ValueError(
            f"softmax_aware_attention: select must be one of threshold, {', '.join(SELECTIONS)}, got {select!r}"
        )
    if select == "threshold" and not dropout and not row_scale and _runs_packed(q, k, v, mask):
        return binary_attention(q, k, v, _kernel_mask(mask), "softmax_aware", scaling, beta, zero)
    with without_autocast(q):
        query, key, value = (sign(t.float(), "clip_open", zero) for t in (q, k, v))
        scores = masked_scores(scaled(level_product(query, key.mT), q.shape[-1], scaling), mask, dropout)
        chosen = softmax_aware_map(scores, beta, row_scale) if select == "threshold" else SELECTIONS[select](scores)
        context = chosen @ value if row_scale else level_product(chosen, value)
        return context.to(q.dtype)


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
    addend: Tensor | None = None,
    value_addend: Tensor | None = None,
) -> Tensor:
    """BiT's attention: elastic signs of q, k and v, the softmax, and an elastic {0, alpha} map.

    Args:
        alpha_q, alpha_k, alpha_v, alpha_a: float32 scalar tensors, the learned steps.
        dropout: of the probabilities, before their threshold, as BiT trains.
        addend: float, broadcast to [..., n, m], added to the products of queries and keys before their scaling:
            BiPFT's low-rank estimators (`low_rank_addend`). Like a mask it drops a key where it is -10000 or less
            after scaling, unless a gradient is asked for.
        value_addend: float, broadcast to [..., m, 1], added to the elastic values: BiPFT's other estimator.
        The others are those of `bool_attention`.
    Gradients are those of `elastic` (with closed windows) and of the softmax.
    """
    q, k, v = _checked("elastic_attention", q, k, v, mask, scaling)
    alphas = (alpha_q, alpha_k, alpha_v, alpha_a)
    if not dropout and _runs_packed(q, k, v, mask, addend, value_addend, *alphas):
        step_q, step_k, step_v, step_a = (a.float() for a in alphas)
        bias = _kernel_mask(mask)
        if addend is not None:
            bias = masked_scores(scaled(addend.float(), q.shape[-1], scaling), mask)
        value_addend = None if value_addend is None else value_addend.float()
        return binary_attention(
            q, k, v, bias, "elastic", scaling, 0.25, zero, step_q, step_k, step_v, step_a, value_addend
        )
    with without_autocast(q):
        query, key, value = (
            elastic(t.float(), a, zero=zero) for t, a in zip((q, k, v), (alpha_q, alpha_k, alpha_v), strict=True)
        )
        step_q, step_k, step_v, step_a = (a.clamp_min(ALPHA_FLOOR) for a in alphas)
        products = level_product(query, key.mT, step_q, step_k)
        if addend is not None:
            products = products + addend.float()
        probability = row_softmax(masked_scores(scaled(products, q.shape[-1], scaling), mask))
        probability = torch.nn.functional.dropout(probability, dropout, dropout > 0)
        chosen = elastic(probability, alpha_a, 1, signed=False)
        if value_addend is not None:
            return (chosen @ (value + value_addend.float())).to(q.dtype)
        return level_product(chosen, value, step_a, step_v).to(q.dtype)


def elastic_map_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha_a: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    zero: str = "torch",
    dropout: float = 0.0,
) -> Tensor:
    """BinaryViT's attention: signs without steps, the softmax, and an elastic {0, alpha} map.

    Gradients of q, k and v have the polynomial window (2 - 2|x|)+, that of alpha_a is a sum without LSQ's factor.

    Args:
        alpha_a: float32 scalar tensor, the learned step.
        dropout: of the map, after its threshold, as BinaryViT's code trains.
        The others are those of `bool_attention`.
    """
    q, k, v = _checked("elastic_map_attention", q, k, v, mask, scaling)
    one = torch.ones((), device=q.device)
    if not dropout and _runs_packed(q, k, v, mask, alpha_a):
        steps = one, one, one, alpha_a.float()
        return binary_attention(q, k, v, _kernel_mask(mask), "elastic", scaling, 0.25, zero, *steps)
    with without_autocast(q):
        query, key, value = (sign(t.float(), "polynomial", zero) for t in (q, k, v))
        scores = scaled(level_product(query, key.mT), q.shape[-1], scaling)
        chosen = elastic(row_softmax(masked_scores(scores, mask)), alpha_a, 1, signed=False, normalised=False)
        if dropout:
            return (torch.nn.functional.dropout(chosen, dropout) @ value).to(q.dtype)
        return level_product(chosen, value, alpha_a.clamp_min(ALPHA_FLOOR), one).to(q.dtype)


def low_rank_addend(query_plus: Tensor, query_minus: Tensor, key_plus: Tensor, key_minus: Tensor) -> Tensor:
    """BiPFT's estimate of what binary scores leave out: (qm + qp) kp^T + qp km^T, from [..., n, r] and [..., m, r]."""
    return (query_minus + query_plus) @ key_plus.mT + query_plus @ key_minus.mT
