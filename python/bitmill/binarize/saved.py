# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of binary values between forward and backward: bits, not floats.

A window of a gradient is one bit an element and levels -1, 0, +1 are two, where a float32 tensor is 32. They are kept
as `bitpack` packs rows, so a last dimension below 32 saves less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import bitpack, bitunpack
from ..ops._surrogates import surrogate_slope

WINDOWS = ("clip", "clip_open", "unit")  # surrogates whose slope is 0 or 1
BELOW_ONE, ABOVE_ONE = 1 - 2**-24, 1 + 2**-23  # the neighbours of 1 in float32
CHUNK = 1 << 18  # elements that are floats at a time on their way to bits or back


def keep_flags(flags: Tensor) -> Tensor:
    """bool [..., k] to int32 [..., ceil(k / 32)]."""
    return bitpack(torch.atleast_1d(flags).float(), None, "bool", 0.5)[0]


def kept_flags(plane: Tensor, shape: torch.Size) -> Tensor:
    """float32 of 0 and 1."""
    k = shape[-1] if shape else 1
    return bitunpack(torch.full_like(plane, -1), plane, k).float().reshape(shape)


def keep_levels(levels: Tensor, zero: str = "torch") -> tuple[Tensor, Tensor | None]:
    """The signs [..., k] of any floats as planes of bits, each int32 [..., ceil(k / 32)]: signs, and where not 0."""
    sign, nonzero, _, _ = bitpack(torch.atleast_1d(levels), None, "sign" if zero == "torch" else "plus")
    return sign, nonzero if zero == "torch" else None


def kept_levels(sign: Tensor, nonzero: Tensor | None, shape: torch.Size) -> Tensor:
    """float32 of -1, 0 and +1."""
    return bitunpack(sign, nonzero, shape[-1] if shape else 1).float().reshape(shape)


def keep_slope(ctx: Any, x: Tensor, surrogate: str) -> tuple[Tensor, ...]:
    """What `times_slope` needs of x: nothing, a bit an element, or x itself where the slope is not 0 or 1."""
    ctx.surrogate = surrogate
    if surrogate == "identity":
        return ()
    if surrogate in WINDOWS:
        return (torch.cat([_keep_window(part, surrogate) for part in _rows(x)]),)
    return (x,)


def _keep_window(x: Tensor, surrogate: str) -> Tensor:
    """`keep_flags` of where the slope is 1; |x| is compared as it is packed, which takes no tensor of flags."""
    if surrogate == "clip" and x.dtype != torch.float64:  # |x| <= 1, not at NaN
        return bitpack(x.abs().neg_(), None, "bool", -ABOVE_ONE)[0]
    if surrogate == "clip_open" and x.dtype != torch.float64:  # not |x| >= 1, so at NaN, too
        return bitpack(x.abs(), None, "bool", BELOW_ONE)[0].bitwise_not_()
    return keep_flags(surrogate_slope(x, surrogate) != 0)


def times_slope(ctx: Any, grad: Tensor, kept: Sequence[Tensor], owned: bool = False) -> Tensor:
    """The gradient times the surrogate's slope at the x of the forward; in place if the gradient is `owned`."""
    if not kept:
        return grad
    if ctx.surrogate not in WINDOWS:
        return grad * surrogate_slope(kept[0], ctx.surrogate)
    if torch.is_grad_enabled():  # for a second derivative, which writing into parts would lose
        return grad * kept_flags(kept[0], grad.shape)
    out = grad if owned and grad.is_contiguous() else grad.clone(memory_format=torch.contiguous_format)
    parts = _rows(out)
    for part, plane in zip(parts, kept[0].split([part.shape[0] for part in parts]), strict=True):
        part.mul_(kept_flags(plane, part.shape))
    return out


def _rows(x: Tensor) -> Sequence[Tensor]:
    """x as rows, in parts of about CHUNK elements; one part where a compiler looks on."""
    rows = torch.atleast_1d(x).unsqueeze(0).flatten(0, -2)
    if torch.compiler.is_compiling():
        return (rows,)
    return rows.split(max(CHUNK // max(rows.shape[1], 1), 1))
