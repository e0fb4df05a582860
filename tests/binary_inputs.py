# SPDX-License-Identifier: Apache-2.0
"""Inputs of the binary products for tests, in the order of the ops' arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill import ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, a tenth of them replaced by 0 and +-0.5, where a level changes."""
    ties = torch.tensor([0.0, -0.0, 0.5, -0.5])[torch.randint(4, shape)]
    return torch.where(torch.rand(shape) < 0.1, ties, torch.randn(shape)).to(dtype)


def tiles(n: int, k: int, zeros: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight tiles, tiles of their nonzero bits or None, and the same weight as int8 [n, k]."""
    signs = torch.randint(2, (n, k), dtype=torch.int8) * 2 - 1
    if zeros:
        signs *= torch.rand(n, k) < 0.8
    plus, nonzero = (ops.tile_pack(plane.to(torch.uint8), 1) for plane in (signs > 0, signs != 0))
    return plus, nonzero if zeros else None, signs


def linear_arguments(
    m: int,
    n: int,
    k: int,
    levels: str = "sign",
    dtype: torch.dtype = torch.float32,
    zeros: bool = False,
    bias: bool = False,
    shift: bool = False,
    alpha: bool = False,
    row_scale: bool = False,
    group_size: int = 0,
    surrogate: str = "clip",
) -> tuple[Any, ...]:
    """Arguments of binary_linear, in its order."""
    weight, nonzero, _ = tiles(n, k, zeros)
    groups = -(-k // group_size) if group_size else 1
    return (
        values(m, k, dtype=dtype),
        weight,
        torch.randn(n, groups),
        torch.randn(n) if bias else None,
        nonzero,
        values(k) if shift else None,
        torch.tensor(0.7) if alpha else None,
        levels,
        row_scale,
        group_size,
        surrogate,
    )


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def leaves(arguments: tuple[Any, ...], places: tuple[int, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    fresh = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
    wanted = [fresh[place].requires_grad_() for place in places if fresh[place] is not None]
    return tuple(fresh), wanted


def assert_gradients(got: Tensor, wants: Tensor, inputs: list[Tensor], same: list[Tensor]) -> None:
    g = torch.randn_like(got)
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, wants, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(wants, same, g), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + b.abs().max().item()))


def changed(arguments: tuple[Any, ...], **changes: Any) -> tuple[Any, ...]:
    names = ("x", "weight", "scale", "bias", "weight_nonzero", "shift", "alpha", "levels", "row_scale", "group_size")
    return tuple(changes.get(name, a) for name, a in zip((*names, "surrogate"), arguments, strict=True))


def on_meta(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    def moved(a: Any) -> Any:
        return a.to("meta") if isinstance(a, Tensor) else [moved(each) for each in a] if isinstance(a, list) else a

    return tuple(moved(a) for a in arguments)


def with_gradients(arguments: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    return leaves(arguments, places)[0]
