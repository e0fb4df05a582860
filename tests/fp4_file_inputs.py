# SPDX-License-Identifier: Apache-2.0
"""FP4 weights as other projects' files hold them, byte by byte by their definitions, and a model for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])


def model(k: int = 64, n: int = 24, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(k, n, bias), nn.ReLU(), nn.Linear(n, 5))


def random_codes(*shape: int) -> Tensor:
    return torch.randint(16, shape, dtype=torch.uint8)


def e8m0(*shape: int) -> Tensor:
    """Scales near 1, and the smallest and the largest."""
    scales = torch.randint(120, 134, shape, dtype=torch.uint8)
    scales.view(-1)[:2] = torch.tensor([0, 251])
    return scales


def nibbles(codes: Tensor, order: str = "low") -> Tensor:
    """uint8 [..., k] to two a byte."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    return first | second << 4 if order == "low" else second | first << 4


def mxfp4_values(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes [..., k] and E8M0 scales [..., k / 32] stand for, float32."""
    factor = torch.exp2(scales.double() - 127).masked_fill(scales == 255, torch.nan)
    return (E2M1.double()[codes.int()] * factor.repeat_interleave(32, -1)).float()
