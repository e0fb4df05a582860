# SPDX-License-Identifier: Apache-2.0
"""The core of GPTQ against column by column in float64, and what it promises of the layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.recipes.gptq import Hessian, factor, output_error, sweep


def inputs(k: int, sequences: int = 6, tokens: int = 30) -> Tensor:
    """Correlated, and of very different sizes, as activations are."""
    causes = k // 4 + 1
    mixed = torch.randn(sequences, tokens, causes) @ torch.randn(causes, k) + 0.5 * torch.randn(sequences, tokens, k)
    return mixed * torch.logspace(-1, 1, k)[torch.randperm(k)]


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian.matrix


def rounded(columns: Tensor, first: int) -> Tensor:
    """A coarse grid of its own for every column, so that a wrong index shows."""
    step = 0.25 + 0.01 * (first + torch.arange(columns.shape[1]))
    return torch.round(columns / step) * step


def reference(weight: Tensor, hessian: Tensor, step: int, damping: float = 0.01) -> tuple[Tensor, float]:
    """GPTQ as its derivation says, in float64: the inverse Hessian of the free columns is computed anew each time."""
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    w, q, loss = weight.double().clone(), torch.empty(weight.shape, dtype=torch.float64), 0.0
    for first in range(0, w.shape[1], step):
        last = min(first + step, w.shape[1])
        q[:, first:last] = rounded(w[:, first:last].float(), first).double()
        taken, fixed = w.clone(), w[:, last:].clone()
        for j in range(first, last):
            inverse = torch.linalg.inv(h[j:, j:])
            error = taken[:, j] - q[:, j]
            loss += (error.square() / inverse[0, 0]).sum().item() / 2
            fixed -= (error / inverse[0, 0]).unsqueeze(1) * inverse[0, last - j :]
        w[:, last:] = fixed
    return q.float(), loss


def test_hessian_is_the_mean_over_sequences() -> None:
    x = inputs(20)
    want = 2 / 6 * torch.einsum("stk,stl->kl", x.double(), x.double()).float()
    at_once, in_parts = Hessian(20), Hessian(20)
    at_once.add(x)
    for part in (x[:1], x[1], x[2:].bfloat16().float(), x[:0]):
        in_parts.add(part)
    assert at_once.sequences == in_parts.sequences == 6
    torch.testing.assert_close(at_once.matrix, want, rtol=1e-5, atol=1e-5 * want.max().item())
    torch.testing.assert_close(in_parts.matrix, want, rtol=2e-2, atol=2e-3 * want.max().item())
    joined = Hessian(20)
    joined.add(x.flatten(0, 1), sequences=6)
    assert joined.sequences == 6 and torch.equal(joined.matrix, at_once.matrix)


def test_hessian_says_what_is_wrong() -> None:
    for shape in ((20,), (3, 21), (2, 3, 19)):
        with pytest.raises(ValueError, match=r"Hessian: x must have shape .*20.*, got"):
            Hessian(20).add(torch.zeros(shape))
    empty = Hessian(20)
    empty.add(torch.zeros(0, 5, 20))
    assert empty.sequences == 0 and not empty.matrix.any()


@pytest.mark.parametrize("k", [1, 2, 45])
def test_factor_is_the_upper_one_of_the_damped_inverse(k: int) -> None:
    h = hessian_of(inputs(k))
    upper, dead = factor(h, 0.05)
    damped = h.double() + 0.05 * h.double().diagonal().mean() * torch.eye(k)
    assert not dead.any() and torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper.double().T @ upper.double() @ damped, torch.eye(k).double(), rtol=0, atol=1e-4)


def test_factor_of_dead_columns() -> None:
    x = inputs(12)
    x[..., [3, 11]] = 0
    h = hessian_of(x)
    upper, dead = factor(h)
    assert dead.nonzero().flatten().tolist() == [3, 11]
    alive = ~dead
    # A dead column is tied to no other one.
    assert upper[3].count_nonzero() == upper[11].count_nonzero() == upper[:, 3].count_nonzero() == 1
    counted = torch.where(dead, 1.0, h.diagonal())
    h_alive = h[alive][:, alive] + 0.01 * counted.mean() * torch.eye(10)
    u = upper[alive][:, alive]
    torch.testing.assert_close(u.T @ u @ h_alive, torch.eye(10), rtol=0, atol=1e-4)


def test_factor_says_what_is_wrong() -> None:
    x = inputs(8)
    with pytest.raises(ValueError, match=r"positive definite, .*damping=0; take more"):
        factor(torch.ones(8, 8), 0)
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        factor(hessian_of(x.masked_fill(x > 2, torch.nan)))
    with pytest.raises(ValueError, match=r"shape \[k, k\], got \[8, 7\]"):
        factor(torch.ones(8, 7))
    for damping in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="damping must be at least 0"):
            factor(hessian_of(x), damping)


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize(("block", "step"), [(1, 1), (16, 1), (128, 1), (8, 8), (16, 4), (50, 50)])
def test_sweep_equals_the_derivation(k: int, block: int, step: int) -> None:
    weight, h = torch.randn(9, k), hessian_of(inputs(k))
    kept = weight.clone()
    got = sweep(weight, factor(h).upper, rounded, block, step)
    want, loss = reference(weight, h, step)
    assert torch.equal(weight, kept)
    torch.testing.assert_close(got.quantised, want, rtol=1e-6, atol=1e-6)
    assert got.loss == pytest.approx(loss, rel=1e-4)
    again = torch.cat([rounded(got.weight[:, j : j + 1], j) for j in range(k)], 1)
    assert torch.equal(again, got.quantised)  # the swept weight holds what every column was when its turn came


def test_sweep_lowers_the_error_of_the_output() -> None:
    weight, x = torch.randn(16, 64), inputs(64, sequences=20)
    h = hessian_of(x)
    swept = sweep(weight, factor(h).upper, rounded).quantised
    plain = rounded(weight, 0)
    assert output_error(h, weight, swept) < 0.9 * output_error(h, weight, plain)
    y = x @ weight.T
    assert output_error(h, weight, plain) == pytest.approx(((x @ plain.T - y).norm() / y.norm()).item(), rel=1e-4)
    assert output_error(h, weight, weight) == output_error(torch.zeros(64, 64), weight, plain) == 0


def test_sweep_says_what_is_wrong() -> None:
    upper = torch.eye(6)
    with pytest.raises(ValueError, match="weight must be finite, got NaN"):
        sweep(torch.full((2, 6), torch.nan), upper, rounded)
    with pytest.raises(ValueError, match=r"upper must have shape \[5, 5\] for a weight \[2, 5\], got \[6, 6\]"):
        sweep(torch.zeros(2, 5), upper, rounded)
    for block, step in ((0, 1), (6, 4), (2, 4), (4, 0)):
        with pytest.raises(ValueError, match="multiple of step"):
            sweep(torch.zeros(2, 6), upper, rounded, block, step)
