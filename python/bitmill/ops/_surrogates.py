# SPDX-License-Identifier: Apache-2.0
"""What stands in for the derivative of a step in the backward: the straight-through surrogates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SURROGATES = ("identity", "clip", "clip_open", "polynomial", "unit", "fourier", "ede", "tanh")
EDE_STEEPNESS = 0.1  # of IR-Net's first epoch
FOURIER_FREQUENCY = 0.1
FOURIER_TERMS = 17.0  # of the last epoch of FDA's schedule


def surrogate_slope(u: Tensor, surrogate: str) -> Tensor:
    """Slope of the straight-through surrogate at u = z / window: what stands in for the derivative of the level.

    "identity" 1; "clip" [|u| <= 1]; "clip_open" [|u| < 1], and 1 at NaN; "polynomial" (2 - 2 |u|)+ (Bi-Real net);
    "unit" [0 <= u <= 1] (elastic {0, 1}); "fourier" `fourier_slope` with the terms of the last epoch; "ede"
    1 - tanh(0.1 u)^2 (IR-Net's error decay estimator at its first epoch); "tanh" 1.001 - tanh(u)^2 (OneBit's code),
    which never vanishes.
    """
    if surrogate == "identity":
        return torch.ones_like(u)
    if surrogate == "clip":
        return (u.abs() <= 1).to(u.dtype)
    if surrogate == "clip_open":
        return (~(u.abs() >= 1)).to(u.dtype)
    if surrogate == "polynomial":
        return (2 - 2 * u.abs()).clamp_min(0)
    if surrogate == "ede":
        return 1 - torch.tanh(EDE_STEEPNESS * u).square()
    if surrogate == "fourier":
        return fourier_slope(u)
    if surrogate == "tanh":
        return 1.001 - torch.tanh(u).square()
    return ((u >= 0) & (u <= 1)).to(u.dtype)


def fourier_slope(u: Tensor, terms: Tensor | float = FOURIER_TERMS) -> Tensor:
    """(4 w / pi) sum_{i = 0..terms} cos((2 i + 1) w u) where |u| <= 1, else 0, with w = 0.1 (FDA, equation 7).

    The sum is sin(2 (terms + 1) w u) / (2 sin(w u)), so `terms` may be a tensor.
    """
    angle, count = FOURIER_FREQUENCY * u, terms + 1
    middle = angle.abs() < 1e-5  # where both sines are too small to divide, the cosines are 1
    safe = torch.where(middle, 1.0, angle)
    total = torch.where(middle, count, torch.sin(2 * count * safe) / (2 * torch.sin(safe)))
    return torch.where(u.abs() <= 1, 4 * FOURIER_FREQUENCY / math.pi * total, 0.0)
