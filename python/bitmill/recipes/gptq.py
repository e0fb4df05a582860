# SPDX-License-Identifier: Apache-2.0
"""The core of GPTQ, which PB-LLM, BiLLM and ARB-LLM share: what a layer's inputs say about its weights, and the sweep.

A linear layer with weight W [n, k] and inputs X [tokens, k] is to keep its output: minimise |X (W - Q)^T|^2 over the Q
that a format allows. H = (2 / sequences) X^T X is the Hessian of that loss, up to a factor. `sweep` quantises column
after column and moves each column's error to the columns that are still free, the best way that H knows. `factor`
prepares H; what a column becomes is the caller's function, so a method brings its own format.

Source: Frantar et al., GPTQ, ICLR 2023, algorithm 1; normalisation and damping as in the published code of PB-LLM
(Shang et al., ICLR 2024) and BiLLM (Huang et al., ICML 2024). On a CUDA device leave TF32 off: H loses its small
eigenvalues otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._library import without_autocast

Quantise = Callable[[Tensor, int], Tensor]
"""(columns float32 [n, c] of the weight, the first one's index) to their quantised values, float32 [n, c]."""


class Hessian:
    """H = (2 / sequences) sum of X^T X over the calibration inputs X of a layer.

    Args:
        k: in_features of the layer.
        device: of the layer.
    Attributes:
        matrix: float32 [k, k], 0 at first.
        sequences: how many have been added.
    """

    def __init__(self, k: int, device: torch.device | str | None = None) -> None:
        self.matrix = torch.zeros(k, k, device=device)
        self.sequences = 0

    @torch.no_grad()
    def add(self, x: Tensor, sequences: int | None = None) -> None:
        """Add inputs, [sequences, ..., k], or [tokens, k] for one sequence; any float dtype.

        Args:
            x: the inputs.
            sequences: how many they come from, where their shape does not tell: OPT joins a batch to [tokens, k] before
                its feed-forward layers.
        Raises:
            ValueError: if x has fewer than two dimensions, or another width.
        """
        k = self.matrix.shape[0]
        if x.dim() < 2 or x.shape[-1] != k:
            raise ValueError(f"Hessian: x must have shape [sequences, ..., {k}] or [tokens, {k}], got {list(x.shape)}")
        if sequences is None:
            sequences = x.shape[0] if x.dim() > 2 else 1
        total = self.sequences + sequences
        if total == 0:
            return
        with without_autocast(x):
            rows = x.reshape(-1, k).float()
            self.matrix.addmm_(rows.T, rows, beta=self.sequences / total, alpha=2 / total)
        self.sequences = total


class Factor(NamedTuple):
    """upper float32 [k, k] with upper^T upper = H^-1 (damped), and which columns no input reaches, bool [k]."""

    upper: Tensor
    dead: Tensor


def factor(hessian: Tensor, damping: float = 0.01) -> Factor:
    """What `sweep` needs of a Hessian, symmetric float32 [k, k].

    `damping` times the mean of the diagonal is added to the diagonal; a dead column (a 0 there) counts as 1 first.

    Raises:
        ValueError: if the Hessian is not square, not finite, or not positive definite in float32; for a damping < 0.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"factor: hessian must have shape [k, k], got {list(hessian.shape)}")
    if not damping >= 0:
        raise ValueError(f"factor: damping must be at least 0, got {damping}")
    if not torch.isfinite(hessian).all():
        raise ValueError(
            "factor: hessian must be finite, got NaN or infinity; the calibration activations overflow, run the model"
            " in float32 or bfloat16"
        )
    h = hessian.float().clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    # H = R R^T with R upper is the Cholesky factor of H backwards, and then R^-1 is the factor of H^-1: one
    # factorisation and one triangular inverse instead of two factorisations around a full inverse.
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed:
        raise ValueError(
            f"factor: hessian must be positive definite, got one that is not with damping={damping}; take more"
            " calibration text or a greater damping"
        )
    identity = torch.eye(h.shape[0], device=h.device)
    return Factor(torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), dead)


class Swept(NamedTuple):
    """What `sweep` returns.

    weight float32 [n, k]: every column as it was when its turn came. quantised float32 [n, k]: what the caller made of
    it. loss: sum of (weight - quantised)^2 / U_jj^2 / 2, as GPTQ's programs print it.
    """

    weight: Tensor
    quantised: Tensor
    loss: float


@torch.no_grad()
def sweep(weight: Tensor, upper: Tensor, quantise: Quantise, block: int = 128, step: int = 1) -> Swept:
    """Quantise columns from left to right; each one's error is made up for by those to its right.

    Column j with error e = (w_j - q_j) / U_jj changes every later column i by -e U_ji.

    Args:
        weight: [n, k], finite; it is not changed.
        upper: U of `factor`, float32 [k, k].
        quantise: called once for each `step` columns, in order, with their values after all changes. The tensor is
            its own to read, not to keep.
        block: columns after which the changes go beyond them, a multiple of `step`; it decides speed and rounding only.
        step: columns quantised at once, without making up for errors among them (BiLLM: its block).
    Raises:
        ValueError: for NaN or infinity in the weight, shapes that do not fit, or a block that is no multiple of step.
    """
    n, k = weight.shape
    if upper.shape != (k, k):
        raise ValueError(f"sweep: upper must have shape [{k}, {k}] for a weight [{n}, {k}], got {list(upper.shape)}")
    if step < 1 or block < step or block % step:
        raise ValueError(f"sweep: block must be a positive multiple of step={step}, got {block}")
    if not torch.isfinite(weight).all():
        raise ValueError("sweep: weight must be finite, got NaN or infinity; repair the weight first")
    # Columns lie as rows here: one column, and all that it changes, are contiguous.
    current = weight.detach().float().T.clone(memory_format=torch.contiguous_format)
    quantised, error = torch.empty_like(current), torch.empty_like(current)
    diagonal = upper.diagonal().unsqueeze(1)
    for start in range(0, k, block):
        end = min(start + block, k)
        for first in range(start, end, step):
            last = min(first + step, end)
            quantised[first:last] = quantise(current[first:last].T, first).T
            error[first:last] = (current[first:last] - quantised[first:last]) / diagonal[first:last]
            current[last:end].addmm_(upper[first:last, last:end].T, error[first:last], alpha=-1)
        current[end:].addmm_(upper[start:end, end:].T, error[start:end], alpha=-1)
    return Swept(current.T.contiguous(), quantised.T.contiguous(), error.square().sum().item() / 2)


def output_error(hessian: Tensor, weight: Tensor, quantised: Tensor) -> float:
    """|X W^T - X Q^T| / |X W^T| in the Frobenius norm, from the Hessian of X; 0 if the layer's output is 0."""
    w, difference = weight.detach().float(), weight.detach().float() - quantised

    def norm(t: Tensor) -> float:
        return ((t @ hessian) * t).sum(dtype=torch.float64).clamp_min(0).sqrt().item()

    size = norm(w)
    return norm(difference) / size if size else 0.0
