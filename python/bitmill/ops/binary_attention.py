# SPDX-License-Identifier: Apache-2.0
"""Attention whose queries, keys, values and map are bits, without a gradient.

dot = sgn(q) . sgn(k), exact; S = fl(dot scaling), or fl(dot / sqrt(d)) without it; then the map A, for attended keys:
    "bool"           [S + bias > 0]
    "softmax_aware"  [S + bias >= max - ln(1 / beta)], the largest of the row
    "elastic"        [w > alpha_a / 2 sum w], w = rint(2^38 exp(alpha_q alpha_k S + bias - max)), S in float64
and the context A sgn(v), exact; "elastic" multiplies it by fl(alpha_a alpha_v), and adds fl(alpha_a (A value_addend)),
summed by halves, where values have an addend that all channels share. The sum of the whole numbers w is the
same in every order, so a decision depends on no instruction set. A mask is bool (True: attend) or additive: it drops a
key where it is -10000 or less and is a bias elsewhere. A row without an attended key is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _library as library
from ._checks import FLOATS, MAX_COLUMNS, check_broadcast, check_one_of, check_tensor, require, short_name
from .bitpack import binarized, sum_by_halves

RULES = ("bool", "softmax_aware", "elastic")
ZEROS = ("torch", "plus")
DROPPED = -1e4  # cpp/core/binary_attention.h has it too
ALPHA_FLOOR = 1e-5
WEIGHT_ONE = 2.0**38
LARGEST_SCALING = torch.finfo(torch.float32).max

library.define(
    "binary_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, str rule, float? scaling, float beta, str zero, Tensor? alpha_q,"
    " Tensor? alpha_k, Tensor? alpha_v, Tensor? alpha_a, Tensor? value_addend=None) -> Tensor",
)


def _empty_context(q: Tensor, v: Tensor) -> Tensor:
    """[..., n, e] in the memory of [first, n, ..., e]: heads beside each other, so merging them copies nothing."""
    leading, shape = q.shape[:-2], (q.shape[-2], v.shape[-1])
    if len(leading) < 2:
        return q.new_empty((*leading, *shape))
    return q.new_empty((leading[0], shape[0], *leading[1:], shape[1])).movedim(1, -2)


def _map(dot: Tensor, d: int, mask: Tensor | None, rule: str, scaling: float | None, beta: float) -> Tensor:
    """The map of the rules that are decided in float32, bool [..., n, m]."""
    scores = dot / math.sqrt(d) if scaling is None else dot * scaling
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.float().masked_fill(mask <= DROPPED, 0.0)
    scores = scores if mask is None else scores.masked_fill(~_attended(mask), -torch.inf)
    if rule == "bool":
        return scores > 0
    if scores.shape[-1] == 0:
        return scores.bool()
    return (scores >= scores.amax(-1, keepdim=True) - math.log(1 / beta)) & (scores > -torch.inf)


def _attended(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else ~(mask <= DROPPED)


def _elastic_map(dot: Tensor, slope: float, threshold: float, mask: Tensor | None) -> Tensor:
    """The elastic map: weights are whole numbers, decided in float64."""
    scores = dot.double()  # integers, whose differences are scaled, unless there is a bias
    if scores.shape[-1] == 0:
        return scores.bool()
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else _attended(mask).expand(scores.shape)
    bias = None if mask is None or mask.dtype == torch.bool else mask.double().masked_fill(~keep, 0.0)
    if bias is not None and bool((bias != 0).any()):
        scores, slope = slope * scores + bias, 1.0
    below = slope * (scores - scores.masked_fill(~keep, -torch.inf).amax(-1, keepdim=True))
    weight = below.exp().mul(WEIGHT_ONE).round()
    weight = weight.masked_fill(~keep, 0.0).nan_to_num(0.0).to(torch.int64)
    return (weight.double() > threshold * weight.sum(-1, keepdim=True).double()) & keep


@library.default("binary_attention")
def _binary_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rule: str,
    scaling: float | None,
    beta: float,
    zero: str,
    alpha_q: Tensor | None,
    alpha_k: Tensor | None,
    alpha_v: Tensor | None,
    alpha_a: Tensor | None,
    value_addend: Tensor | None = None,
) -> Tensor:
    _check_binary_attention(q, k, v, mask, rule, scaling, beta, zero, alpha_q, alpha_k, alpha_v, alpha_a, value_addend)
    query, key, value = (binarized(t, None, "sign" if zero == "torch" else "plus", 0.0) for t in (q, k, v))
    step: Tensor | float = 1.0
    if alpha_v is not None and alpha_a is not None:
        step = alpha_a.clamp_min(ALPHA_FLOOR) * alpha_v.clamp_min(ALPHA_FLOOR)
    chosen = chosen_keys(query, key, mask, rule, scaling, beta, alpha_q, alpha_k, alpha_a)
    context = step * whole_context(chosen, value)
    if value_addend is not None and alpha_a is not None:
        added = torch.where(chosen, value_addend.mT, 0.0)
        context = context + alpha_a.clamp_min(ALPHA_FLOOR) * sum_by_halves(added).unsqueeze(-1)
    return _empty_context(q, v).copy_(context)


def chosen_keys(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    rule: str,
    scaling: float | None,
    beta: float,
    alpha_q: Tensor | None,
    alpha_k: Tensor | None,
    alpha_a: Tensor | None,
) -> Tensor:
    """The map A, bool [..., n, m], of levels -1, 0, +1."""
    dot, d = query @ key.mT, query.shape[-1]
    if alpha_q is None or alpha_k is None or alpha_a is None:
        return _map(dot, d, mask, rule, scaling, beta)
    step_q, step_k, step_a = (alpha.clamp_min(ALPHA_FLOOR) for alpha in (alpha_q, alpha_k, alpha_a))
    product = step_q.item() * step_k.item()
    slope = product / math.sqrt(d) if scaling is None else product * scaling
    return _elastic_map(dot, slope, step_a.item() / 2, mask)


def whole_context(chosen: Tensor, value: Tensor) -> Tensor:
    """A sgn(v), float32."""
    return chosen.float() @ value + 0.0  # an integer has no -0, but a product of floats may answer it


def _check_binary_attention(
    q, k, v, mask, rule, scaling, beta, zero, alpha_q, alpha_k, alpha_v, alpha_a, value_addend
) -> None:
    op = "binary_attention"
    check_one_of(op, "zero", zero, ZEROS)
    require(q.dtype in FLOATS, f"{op}: q must be float32, bfloat16 or float16, got {short_name(q.dtype)}")
    require(
        q.dim() >= 2 and k.dim() == q.dim() and v.dim() == q.dim() and q.shape[-1] == k.shape[-1] > 0,
        f"{op}: expected q [..., n, d], k [..., m, d] and v [..., m, e] with d > 0,"
        f" got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}",
    )
    (n, d), m = q.shape[-2:], k.shape[-2]
    require(max(d, m) <= MAX_COLUMNS, f"{op}: d and m must be at most {MAX_COLUMNS}, got {d} and {m}")
    check_tensor(op, "k", k, q.dtype, [*q.shape[:-2], m, d], q)
    check_tensor(op, "v", v, q.dtype, [*q.shape[:-2], m, v.shape[-1]], q)
    check_rule(op, q, rule, scaling, beta, alpha_q=alpha_q, alpha_k=alpha_k, alpha_v=alpha_v, alpha_a=alpha_a)
    check_mask(op, q, mask, [*q.shape[:-2], n, m])
    if value_addend is not None:
        require(rule == "elastic", f'{op}: value_addend goes with rule "elastic", got "{rule}"')
        check_tensor(op, "value_addend", value_addend, torch.float32, value_addend.shape, q)
        check_broadcast(op, "value_addend", value_addend, [*q.shape[:-2], m, 1])


def check_rule(op: str, q: Tensor, rule: str, scaling: float | None, beta: float, **alphas: Tensor | None) -> None:
    check_one_of(op, "rule", rule, RULES)
    require(
        scaling is None or (scaling > 0 and torch.finfo(torch.float32).tiny <= scaling <= LARGEST_SCALING),
        f"{op}: scaling must be a positive, finite float32, got {scaling}",
    )
    require(0 < beta <= 1, f"{op}: beta must lie in (0, 1], got {beta}")
    for name, alpha in alphas.items():
        require(
            (alpha is not None) == (rule == "elastic"),
            f'{op}: {name} goes with rule "elastic" only, and is needed there; got rule "{rule}"',
        )
        check_tensor(op, name, alpha, torch.float32, [], q)


def check_mask(op: str, q: Tensor, mask: Tensor | None, scores: list[int]) -> None:
    if mask is None:
        return
    require(mask.device == q.device, f"{op}: mask must be on {q.device}, got {mask.device}")
    require(
        mask.dtype == torch.bool or mask.dtype in FLOATS,
        f"{op}: mask must be bool, float32, bfloat16 or float16, got {short_name(mask.dtype)}",
    )
    check_broadcast(op, "mask", mask, scores)


@torch.library.register_fake("bitmill::binary_attention")
def _(q, k, v, mask, rule, scaling, beta, zero, alpha_q, alpha_k, alpha_v, alpha_a, value_addend=None):
    _check_binary_attention(q, k, v, mask, rule, scaling, beta, zero, alpha_q, alpha_k, alpha_v, alpha_a, value_addend)
    return _empty_context(q, v)


def binary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    rule: str = "bool",
    scaling: float | None = None,
    beta: float = 0.25,
    zero: str = "torch",
    alpha_q: Tensor | None = None,
    alpha_k: Tensor | None = None,
    alpha_v: Tensor | None = None,
    alpha_a: Tensor | None = None,
    value_addend: Tensor | None = None,
) -> Tensor:
    """Binary attention, packing included, for inference; `bitmill.binarize` has the forms that train.

    Args:
        q, k, v: float32, bfloat16 or float16 [..., n, d], [..., m, d], [..., m, e], before their signs; any strides.
        mask: bool or float, broadcastable to [..., n, m], or None.
        rule: "bool" (BiBERT), "softmax_aware" (BiViT) or "elastic" (BiT); the formulas are in the module docstring.
        scaling: of the scores; None for 1 / sqrt(d).
        beta: of "softmax_aware", in (0, 1].
        zero: "torch": sgn(0) = sgn(NaN) = 0; "plus": +1 where x >= 0, else -1.
        alpha_q, alpha_k, alpha_v, alpha_a: float32 scalar tensors, the steps of "elastic"; bounded below by 1e-5.
        value_addend: of "elastic": float32, broadcastable to [..., m, 1], added to alpha_v sgn(v), or None.
    Returns:
        [..., n, e] of q's dtype; with two leading dimensions or more, in memory [first, n, ..., e].
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names.
    """
    return torch.ops.bitmill.binary_attention.default(
        q, k, v, mask, rule, scaling, beta, zero, alpha_q, alpha_k, alpha_v, alpha_a, value_addend
    )
