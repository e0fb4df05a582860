# SPDX-License-Identifier: Apache-2.0
"""Attention with binary maps: the rules, masks of every form, gradients against plain autograd, edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitmill import binarize
from bitmill.binarize import bool_attention, elastic_attention, softmax_aware_attention, softmax_aware_map

STEPS = {f"alpha_{name}": torch.tensor(a) for name, a in (("q", 0.9), ("k", 1.1), ("v", 0.7), ("a", 0.3))}


def elastic_with_steps(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return elastic_attention(q, k, v, **STEPS, mask=mask)


RULES: tuple[Callable[..., Tensor], ...] = (bool_attention, softmax_aware_attention, elastic_with_steps)
every_rule = pytest.mark.parametrize("attention", RULES)


def qkv(*shape: int, m: int | None = None, e: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q [..., n, d], k [..., m, d], v [..., m, e], with exact zeros."""
    *leading, n, d = shape
    m = n if m is None else m
    sizes = ((n, d), (m, d), (m, d if e is None else e))
    return [(torch.randn(*leading, *s) * (torch.rand(*leading, *s) < 0.95)).to(dtype).requires_grad_() for s in sizes]


def obvious_map(rule: Callable[..., Tensor], scores: Tensor) -> Tensor:
    if rule is bool_attention:
        return (scores > 0).float()
    probability = torch.softmax(scores.double(), -1)
    if rule is softmax_aware_attention:
        return (probability >= 0.25 * probability.amax(-1, keepdim=True) * (1 - 1e-9)).float()
    return (probability > STEPS["alpha_a"] / 2).float()


@every_rule
@pytest.mark.parametrize("shape", [(2, 3, 7, 15), (1, 33), (5, 64), (2, 1, 100, 45)])
def test_context_is_the_map_times_the_signs(attention: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    q, k, v = qkv(*shape, m=shape[-2] + 3, e=9)
    scale = 1.0
    scores = torch.sign(q) @ torch.sign(k).mT / math.sqrt(shape[-1])
    if attention is elastic_with_steps:
        scores, scale = scores * 0.9 * 1.1, 0.3 * 0.7
    want = obvious_map(attention, scores) @ torch.sign(v) * scale
    torch.testing.assert_close(attention(q, k, v), want, rtol=1e-6, atol=1e-6)


@every_rule
def test_masks_of_every_form_agree(attention: Callable[..., Tensor]) -> None:
    q, k, v = qkv(2, 4, 9, 16)
    keep = torch.rand(2, 1, 1, 9) < 0.7
    keep[..., 0] = True
    want = attention(q, k, v, keep)
    for value in (-1e4, torch.finfo(torch.float32).min, -torch.inf):
        assert torch.equal(attention(q, k, v, torch.where(keep, 0.0, value)), want)
    assert torch.equal(attention(q, k, v, keep.expand(2, 4, 9, 9)), want)
    alone = torch.stack([attention(q[i], k[i][:, keep[i, 0, 0]], v[i][:, keep[i, 0, 0]]) for i in range(2)])
    torch.testing.assert_close(alone, want)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    first = attention(q[..., :1, :], k[..., :1, :], v[..., :1, :])
    torch.testing.assert_close(attention(q, k, v, causal)[..., :1, :], first)


def test_a_row_without_keys() -> None:
    """bool and softmax-aware: 0, not NaN, and no NaN in a gradient. The elastic rule keeps what its softmax answers."""
    for attention in (bool_attention, softmax_aware_attention):
        q, k, v = qkv(2, 6, 16)
        mask = torch.ones(2, 6, 6, dtype=torch.bool)
        mask[0, 3] = False
        y = attention(q, k, v, mask)
        assert bool((y[0, 3] == 0).all()) and bool(y.isfinite().all())
        for gradient in torch.autograd.grad(y.square().sum(), (q, k, v)):
            assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("n", [1, 300])
@every_rule
def test_lengths_and_dtypes(attention: Callable[..., Tensor], n: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = qkv(1, 2, n, 24, dtype=dtype)
        y = attention(q, k, v)
        assert y.dtype == dtype and y.shape == (1, 2, n, 24)
        y.float().sum().backward()
        assert q.grad is not None and q.grad.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention(q, k, v), y)


def test_bool_gradient_has_open_windows() -> None:
    q, k, v = qkv(2, 5, 16)
    with torch.no_grad():
        q[0, 0, 0], k[0, 1, 2], v[0, 0, 0] = 1.0, -1.0, 1.0
    g = torch.randn(2, 5, 16)
    got = torch.autograd.grad(bool_attention(q, k, v), (q, k, v), g)
    signs, inside = [torch.sign(t) for t in (q, k, v)], [(t.abs() < 1).float() for t in (q, k, v)]
    scores = signs[0] @ signs[1].mT / 4
    d_scores = (g @ signs[2].mT) * (scores.abs() < 1)
    want = (d_scores @ signs[1] / 4, d_scores.mT @ signs[0] / 4, (scores > 0).float().mT @ g)
    for a, b, window in zip(got, want, inside, strict=True):
        torch.testing.assert_close(a, b * window)


@pytest.mark.parametrize("beta", [0.1, 0.25, 1.0])
def test_softmax_aware_map_needs_no_softmax(beta: float) -> None:
    scores = torch.randn(50, 40) * 3
    scores[:, :5] = scores[:, 5:10]  # ties
    probability = torch.softmax(scores.double(), -1)
    want = probability >= beta * probability.amax(-1, keepdim=True) * (1 - 1e-12)
    assert torch.equal(softmax_aware_map(scores, beta).bool(), want)
    leaf = scores.clone().requires_grad_()
    assert torch.equal(softmax_aware_map(leaf, beta).detach().bool(), want)


@every_rule
def test_attention_compiles(attention: Callable[..., Tensor]) -> None:
    q, k, v = qkv(2, 2, 8, 16)
    keep = torch.rand(2, 1, 1, 8) < 0.8
    keep[..., 0] = True
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, keep), attention(q, k, v, keep))
    gradients = [torch.autograd.grad(f(q, k, v, keep).square().sum(), (q, k, v)) for f in (compiled, attention)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_policy_and_errors() -> None:
    q, k, v = (torch.zeros(3, 8) for _ in range(3))
    assert torch.equal(bool_attention(q, k, v), torch.zeros(3, 8))
    assert torch.equal(bool_attention(q, k, v, zero="plus"), torch.full((3, 8), 3.0))
    for arguments, message in (
        ((torch.randn(3, 8), torch.randn(3, 9), v), r"expected q \[..., n, d\], k \[..., m, d\]"),
        ((q, k, torch.randn(4, 8)), r"got \[3, 8\], \[3, 8\] and \[4, 8\]"),
        ((q, k, v, torch.ones(3, 3, dtype=torch.int64)), "mask must be boolean .* or additive floats, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            bool_attention(*arguments)
    with pytest.raises(ValueError, match=r"beta must lie in \(0, 1\], got 0"):
        binarize.softmax_aware_map(torch.randn(3, 3), 0)
