# SPDX-License-Identifier: Apache-2.0
"""Attention with binary maps: the rules, masks of every form, gradients against plain autograd, edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitmill import binarize
from bitmill.binarize import (
    bool_attention,
    elastic_attention,
    elastic_map_attention,
    low_rank_addend,
    one_hot_map,
    sampled_map,
    softmax_aware_attention,
    softmax_aware_map,
)

STEPS = {f"alpha_{name}": torch.tensor(a) for name, a in (("q", 0.9), ("k", 1.1), ("v", 0.7), ("a", 0.3))}


def elastic_with_steps(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return elastic_attention(q, k, v, **STEPS, mask=mask)


def elastic_map(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return elastic_map_attention(q, k, v, STEPS["alpha_a"], mask)


RULES: tuple[Callable[..., Tensor], ...] = (bool_attention, softmax_aware_attention, elastic_with_steps, elastic_map)
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
    elif attention is elastic_map:
        scale = 0.3
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


@every_rule
def test_a_row_without_keys(attention: Callable[..., Tensor]) -> None:
    """0, not NaN, and no NaN in a gradient, whatever the form of the mask."""
    keep = torch.ones(2, 6, 6, dtype=torch.bool)
    keep[0, 3] = False
    for mask in (keep, torch.where(keep, 0.0, -1e4), torch.where(keep, 0.0, torch.finfo(torch.bfloat16).min)):
        q, k, v = qkv(2, 6, 16)
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


def test_one_hot_and_sampled_maps() -> None:
    scores = torch.randn(30, 20).mul(2).round()  # with ties
    scores[3] = -torch.inf
    bits = one_hot_map(scores)
    assert torch.equal(bits.sum(-1), (torch.arange(30) != 3).float())
    assert torch.equal(bits.argmax(-1)[4:], scores.argmax(-1)[4:])
    probability = torch.softmax(scores, -1).nan_to_num(0.0)
    mean = torch.stack([sampled_map(scores) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, probability, rtol=0, atol=0.05)
    for make in (one_hot_map, sampled_map, softmax_aware_map):
        leaf = scores[:3].clone().requires_grad_()
        g = torch.randn(3, 20)
        bits = make(leaf)
        assert bool(((bits.detach() == 0) | (bits.detach() == 1)).all())
        p = probability[:3]
        want = p * (g - (g * p).sum(-1, keepdim=True))
        torch.testing.assert_close(torch.autograd.grad(bits, leaf, g)[0], want)
    q, k, v = qkv(2, 5, 16)
    want = one_hot_map(torch.sign(q) @ torch.sign(k).mT) @ torch.sign(v)
    assert torch.equal(softmax_aware_attention(q, k, v, select="one_hot"), want)
    assert softmax_aware_attention(q, k, v, select="sample").shape == (2, 5, 16)
    with pytest.raises(ValueError, match="select must be one of threshold, one_hot, sample, got 'best'"):
        softmax_aware_attention(q, k, v, select="best")


def test_row_scale_is_the_mean_selected_probability() -> None:
    scores = torch.randn(7, 12) * 2
    scores[2] = -torch.inf
    bits, probability = softmax_aware_map(scores), torch.softmax(scores, -1).nan_to_num(0.0)
    v = (bits * probability).sum(-1, keepdim=True) / bits.sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(softmax_aware_map(scores, row_scale=True), v * bits)
    # the scale is the best one: a little more or less of it is farther from the softmax
    for other in (0.99, 1.01):
        near, far = ((probability - factor * v * bits).square().sum(-1) for factor in (1, other))
        assert bool((near <= far).all())


def test_dropout_of_scores_and_probabilities() -> None:
    q, k, _ = (t.detach() for t in qkv(2, 40, 16))
    keep = torch.rand(2, 1, 40) < 0.5
    keep[..., 0] = True
    dot, one_key_each = torch.sign(q) @ torch.sign(k).mT, torch.eye(40).expand(2, 40, 40)
    bits = bool_attention(q, k, one_key_each, keep, dropout=0.5)
    assert bool((bits <= ((dot > 0) & keep)).all())
    assert 0.4 < float(bits.sum() / ((dot > 0) & keep).sum()) < 0.6
    # a dropped score is 0: where all others are negative it is one of the largest
    bits = softmax_aware_attention(q.abs() + 1, -1 - k.abs(), one_key_each, keep, beta=1.0, dropout=0.5)
    assert bool((bits <= keep).all())
    assert 0.4 < float(bits.sum() / keep.expand(2, 40, 40).sum()) < 0.6
    steps = {**STEPS, "alpha_a": torch.tensor(0.06)}
    scale = steps["alpha_a"] * steps["alpha_v"]
    kept = [elastic_attention(q, k, one_key_each, **steps, mask=keep, dropout=p) / scale for p in (0.0, 0.5, 0.5)]
    assert all(bool((bits.round() <= keep).all()) for bits in kept)
    assert not torch.equal(kept[1], kept[2]) and not torch.equal(kept[0], kept[1])


def test_elastic_context_is_exact() -> None:
    """Whole numbers times one constant, so that a context of 0 is 0 for the next layer's sign."""
    q, k, v = qkv(3, 50, 32)
    y = elastic_with_steps(q, k, v) / (STEPS["alpha_a"] * STEPS["alpha_v"])
    torch.testing.assert_close(y, y.round(), rtol=1e-6, atol=0)
    assert bool((y == 0).any())


def test_low_rank_estimators() -> None:
    """BiPFT's score and context, written out element by element."""
    (q, k, v), r = qkv(2, 3, 6, 16), 2
    query_plus, query_minus, key_plus, key_minus = (torch.randn(2, 1, 6, r, requires_grad=True) for _ in range(4))
    value_plus = torch.randn(2, 1, 6, 1, requires_grad=True)
    addend = low_rank_addend(query_plus, query_minus, key_plus, key_minus)
    y = elastic_attention(q, k, v, **STEPS, addend=addend, value_addend=value_plus)
    steps = {name: float(a) for name, a in STEPS.items()}
    for b, h, i in ((0, 0, 0), (1, 2, 5)):
        score = torch.stack(
            [
                steps["alpha_q"] * steps["alpha_k"] * (q[b, h, i].sign() @ k[b, h, j].sign())
                + (query_minus + query_plus)[b, 0, i] @ key_plus[b, 0, j]
                + query_plus[b, 0, i] @ key_minus[b, 0, j]
                for j in range(6)
            ]
        )
        bits = torch.softmax(score / 4, 0) > steps["alpha_a"] / 2
        values = steps["alpha_v"] * v[b, h].sign() + value_plus[b, 0]
        torch.testing.assert_close(y[b, h, i], steps["alpha_a"] * values[bits].sum(0))
    with torch.no_grad():
        packed = elastic_attention(q, k, v, **STEPS, addend=addend, value_addend=value_plus)
    torch.testing.assert_close(packed, y)
    for mask in (torch.rand(2, 1, 6, 6) < 0.6, torch.where(torch.rand(6, 6) < 0.6, torch.randn(6, 6), -torch.inf)):
        trained = elastic_attention(q, k, v, **STEPS, mask=mask, addend=addend, value_addend=value_plus)
        with torch.no_grad():
            packed = elastic_attention(q, k, v, **STEPS, mask=mask, addend=addend, value_addend=value_plus)
        torch.testing.assert_close(packed, trained)
    y.square().sum().backward()
    for t in (query_plus, query_minus, key_plus, key_minus, value_plus):
        assert t.grad is not None and bool(t.grad.isfinite().all())


@every_rule
def test_fewer_heads_of_keys(attention: Callable[..., Tensor]) -> None:
    q, _, _ = qkv(2, 6, 5, 16)
    _, k, v = qkv(2, 3, 5, 16)
    want = attention(q, k[:, [0, 0, 1, 1, 2, 2]], v[:, [0, 0, 1, 1, 2, 2]])
    assert torch.equal(attention(q, k, v), want)
    with pytest.raises(ValueError, match="heads that divide those of q"):
        attention(q[:, :4], k, v)


@every_rule
def test_attention_compiles(attention: Callable[..., Tensor]) -> None:
    q, k, v = qkv(2, 2, 8, 16)
    keep = torch.rand(2, 1, 1, 8) < 0.8
    keep[..., 0] = True
    backend = "inductor" if attention is softmax_aware_attention else "aot_eager"  # one is enough for generated code
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(q, k, v, keep), attention(q, k, v, keep))
    gradients = [torch.autograd.grad(f(q, k, v, keep).square().sum(), (q, k, v)) for f in (compiled, attention)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@every_rule
def test_masks_that_do_not_fit(attention: Callable[..., Tensor]) -> None:
    """The same sentence in training, where torch would broadcast later, and without a gradient."""
    q, k, v = qkv(2, 3, 5, 16, m=7)
    for shape in ((2, 7), (5, 5), (1, 2, 3, 5, 7), (3, 3, 5, 7)):
        for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape)):
            for inputs in ((q, k, v), (q.detach(), k.detach(), v.detach())):
                with pytest.raises(ValueError, match=r"mask must be broadcastable to \[2, 3, 5, 7\], got shape"):
                    attention(*inputs, mask)


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
