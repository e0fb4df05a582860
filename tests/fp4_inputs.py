# SPDX-License-Identifier: Apache-2.0
"""Arguments for the products with an FP4 weight; their default kernels with the defaults of the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops.fp4_linear import _fp4_linear_reference, _fp4_weight_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = [(0, False), (0, True), (8, False), (16, False), (32, True), (64, False), (128, True)]
SHAPES = [(1, 1), (16, 32), (19, 77), (33, 300), (5, 0), (0, 9)]

# 16 integers times a power of two, the largest magnitude 127: offset and sums as large as they can be.
WIDE = torch.tensor([-127, 127, -126, 3, 5, 0, 1, -1, 2, 4, 8, 16, 32, 64, -64, 100]) * 2.0**-5


def layer(
    n: int, k: int, group_size: int = 0, e8m0: bool = False, dtype: torch.dtype = torch.float32, leading=(3,)
) -> dict[str, Tensor]:
    """Random arguments of fp4_linear."""
    groups = -(-k // group_size) if group_size else 1
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = torch.randint(120, 132, (n, groups), dtype=torch.uint8) if e8m0 else torch.randn(n, groups)
    x = torch.randn(*leading, k).to(dtype)
    return {"x": x, "weight": ops.tile_pack(codes, 4), "scale": scale, "bias": torch.randn(n)}


def default_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    format: str = "e2m1",
    group_size: int = 0,
    codebook: Tensor | None = None,
    activations: str = "float",
    global_scale: Tensor | None = None,
) -> Tensor:
    """The default kernel with the defaults of the public function."""
    return _fp4_linear_reference(x, weight, scale, bias, format, group_size, codebook, activations, global_scale)


def default_weight(
    weight: Tensor,
    scale: Tensor,
    n: int,
    k: int,
    format: str = "e2m1",
    group_size: int = 0,
    codebook: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    return _fp4_weight_reference(weight, scale, n, k, format, group_size, codebook, global_scale)
