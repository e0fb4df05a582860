# SPDX-License-Identifier: Apache-2.0
"""The rules that methods of more than one bit are made of: levels, scales, thresholds and ranges."""

from __future__ import annotations

import math

import pytest
import torch

from binary_inputs import leaf
from bitmill import binarize
from bitmill.binarize import Thresholds, method
from problems import assert_same_bits

# Gradients of weights: the same formula with plain autograd


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("levels", ["statsq", "n2uq"])
def test_odd_levels_are_the_nearest_ones_and_sums_of_signs(levels: str, bits: int) -> None:
    w = leaf(torch.randn(7, 45))
    rule = method(levels).weight_rule(bits)
    result = binarize.binarize_weight(w, rule)
    unit = w.detach().abs().mean(1, keepdim=True) / 2 ** (bits - 1)
    grid = torch.arange(-(2**bits) + 1, 2**bits, 2.0)
    nearest = grid[((w.detach() / unit).unsqueeze(-1) - grid).abs().argmin(-1)]
    torch.testing.assert_close(result.value, nearest * unit)
    planes = result.signs.unflatten(1, (bits, 45))
    assert set(planes.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close((planes * result.scale.unsqueeze(-1)).sum(1), result.value.detach())
    g = torch.randn(7, 45)
    result.value.backward(g)
    torch.testing.assert_close(w.grad, g if levels == "statsq" else g / (unit * (2**bits - 1)))


def test_ternary_weight_is_two_thirds_of_the_mean_wide() -> None:
    w = leaf(torch.randn(5, 33))
    with torch.no_grad():
        w[2] = 0
    result = binarize.binarize_weight(w, method("tbt").weight_rule(2))
    mean = w.detach().abs().mean(1, keepdim=True)
    assert torch.equal(result.signs, torch.sign(w.detach()) * (w.detach().abs() > 2 / 3 * mean))
    torch.testing.assert_close(result.scale, 4 / 3 * mean)
    assert result.value.isfinite().all() and not result.value[2].any(), "a row of zeros is 0, not NaN"
    g = torch.randn(5, 33)
    result.value.backward(g)
    assert torch.equal(w.grad, g)


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_of_a_row(bits: int) -> None:
    w = leaf(torch.randn(5, 33) * 1.5)
    result = binarize.binarize_weight(w, method("llmqat").weight_rule(bits))
    top = 2 ** (bits - 1) - 1
    step = w.detach().abs().amax(1, keepdim=True) / top
    assert (result.value - w).abs().max() <= 0.5001 * step.max() and result.signs.abs().max() == top
    g = torch.randn(5, 33)
    result.value.backward(g)
    assert torch.equal(w.grad, g * (w.detach().abs() < 2))


def test_residual_planes() -> None:
    """BinaryDM: value and gradients of its composition of clipped signs, written out."""
    w = leaf(torch.randn(6, 40))
    rule = method("binarydm").weight_rule(2)
    scale = leaf(binarize.weight_scale(w, rule))
    torch.testing.assert_close(scale[:, 0], w.abs().mean(1))
    result = binarize.binarize_weight(w, rule, learned_scale=scale)
    g = torch.randn(6, 40)
    result.value.backward(g)
    with torch.no_grad():
        s1, s2 = scale[:, :1], scale[:, 1:]
        b1 = torch.sign(w)
        rest = w - s1 * b1
        b2 = torch.sign(rest)
        grad_rest = g * s2 * (rest.abs() <= 1)
        torch.testing.assert_close(result.value, s1 * b1 + s2 * b2)
        torch.testing.assert_close(w.grad, grad_rest + (g - grad_rest) * s1 * (w.abs() <= 1))
        grad_scale = torch.stack([((g - grad_rest) * b1).sum(1), (g * b2).sum(1)], 1)
        torch.testing.assert_close(scale.grad, grad_scale)


@pytest.mark.parametrize("tau", [0.85, 0.99, 1.0])
def test_recu_chain(tau: float) -> None:
    w = leaf(torch.randn(6, 40))
    plain, quantile = leaf(w), torch.tensor(tau)
    result = binarize.binarize_weight(w, method("recu").weight, learned_scale=torch.full((6, 1), 0.5), tau=quantile)
    rows = plain - plain.mean(1, keepdim=True)
    rows = rows * 2 * math.sqrt(2) / (rows.var(1, keepdim=True) + 1e-5).sqrt()
    end = math.inf if tau == 1 else -rows.detach().abs().mean().item() * math.log(2 - 2 * tau)
    clamped = rows.clamp(-end, end)
    assert torch.equal(result.signs, torch.sign(clamped.detach()))
    g = torch.randn(6, 40)
    result.value.backward(g)
    (clamped * 0.5 * g).sum().backward()
    torch.testing.assert_close(w.grad, plain.grad)


@pytest.mark.parametrize("terms", [0, 9, 17])
def test_fourier_slope_is_its_series(terms: int) -> None:
    x = leaf(torch.tensor([-2.0, -1.0, -0.3, -1e-6, -1e-40, 0.0, 1e-40, 1e-5, 0.01, 0.7, 1.0, 1.0001, float("nan")]))
    series = sum(torch.cos((2 * i + 1) * 0.1 * x.detach().double()) for i in range(terms + 1))
    want = torch.where(x.detach().abs() <= 1, 0.4 / math.pi * series, 0.0).float()
    rule = method("fda").activation
    binarize.quantize_activation(x, rule, terms=torch.tensor(float(terms))).value.sum().backward()
    torch.testing.assert_close(x.grad, want)
    result = binarize.binarize_weight(w := leaf(x.detach()[:-1].reshape(2, 6)), method("fda").weight, terms=terms)
    result.value.sum().backward()
    torch.testing.assert_close(w.grad, want[:-1].reshape(2, 6) * w.detach().abs().mean(1, keepdim=True))


# Activations


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_thresholds_are_the_staircase_of_a_line(bits: int) -> None:
    """N2UQ: the gradient is that of the piecewise linear map through the intervals, for every parameter."""
    top = 2**bits - 1
    learned = (torch.rand(top) + 0.1, torch.tensor(-0.4), torch.tensor(1.25), torch.tensor(0.75))
    ours, theirs = ([leaf(t) for t in learned] for _ in range(2))
    x, z = (leaf(t) for t in [torch.randn(200)] * 2)
    y = binarize.threshold_levels(x, Thresholds(*ours))
    widths, start, in_scale, out_scale = theirs
    edges = start + torch.cat((torch.zeros(1), widths.cumsum(0)))
    line = sum(((in_scale * z - edges[i]) / widths[i]).clamp(0, 1) for i in range(top))
    middles = (start + widths.cumsum(0) - widths / 2).detach()
    count = (1.25 * x.detach().unsqueeze(-1) > middles).sum(-1)
    torch.testing.assert_close(y.detach(), 0.75 * 2 / top * count)
    g = torch.randn(200)
    y.backward(g)
    (out_scale * 2 / top * (line + (count - line).detach()) * g).sum().backward()
    for a, b in zip((x, *ours), (z, *theirs), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("name", "per_row", "window"), [("llmqat", True, 2.0), ("tbt", False, 2.5)])
def test_ranges(name: str, per_row: bool, window: float, signed: bool) -> None:
    x = leaf(torch.randn(4, 50) * 1.5)
    q = binarize.quantize_activation(x, method(name).activation_rule(8), 8, signed)
    seen = x.detach() if per_row else x.detach().clamp(-window, window)
    error = (q.value.detach() - seen).abs()
    span = 2 * seen.abs().amax() / 254 if signed else (seen.amax() - seen.amin()) / 255
    assert error.max() <= 0.51 * span
    assert q.low <= q.code.min() and q.code.max() <= q.high and torch.equal(q.code, q.code.round())
    assert q.step.shape == ((4, 1) if per_row else ())
    rebuilt = q.step * q.code if q.offset is None else q.step * q.code + q.offset
    assert_same_bits(rebuilt, q.value.detach())
    g = torch.randn(4, 50)
    q.value.backward(g)
    assert torch.equal(x.grad, g * (x.detach().abs() < window))


@pytest.mark.parametrize("name", ["llmqat", "tbt"])
@pytest.mark.parametrize("signed", [True, False])
def test_ranges_of_nothing(name: str, signed: bool) -> None:
    rule = method(name).activation_rule(8)
    for x in (torch.zeros(3, 5), torch.zeros(0, 5), torch.zeros(3, 0), torch.full((2, 5), -1.5)):
        q = binarize.quantize_activation(x, rule, 8, signed)
        assert q.value.isfinite().all() and q.value.shape == x.shape
        torch.testing.assert_close(q.value, x)


def test_elastic_without_its_lowest_or_highest_code() -> None:
    x = torch.linspace(-5, 5, 101)
    for signed, codes in ((True, {-1.0, 0.0, 1.0}), (False, {0.0, 1.0, 2.0})):
        y = binarize.elastic(x, torch.tensor(1.0), 2, signed, narrow=True)
        assert set((y - (0 if signed else -5)).tolist()) == codes
    alpha = [leaf(torch.tensor(0.7)) for _ in range(2)]
    for a, normalised in zip(alpha, (True, False), strict=True):
        binarize.elastic(x, a, 2, normalised=normalised).sum().backward()
    torch.testing.assert_close(alpha[0].grad * math.sqrt(101 * 1), alpha[1].grad)


def test_standardised_rows_keep_their_signs_and_have_no_gradient_along_themselves() -> None:
    x = leaf(torch.randn(4, 30))
    y = binarize.standardised(x)
    assert torch.equal(torch.sign(y), torch.sign(x))
    torch.testing.assert_close(y, x / (x.var(-1, keepdim=True) + 1e-5).sqrt())
    (y * y.detach()).sum().backward()
    assert binarize.standardised(torch.randn(3, 1)).isfinite().all()
