# SPDX-License-Identifier: Apache-2.0
"""What the ops ask of their arguments, for the fake and default kernels; cpp/bindings/checks.h asks the same.

Every failure is a ValueError: argument, expected, got, and the remedy where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TILE_ROWS = 16
MAX_COLUMNS = 1 << 24
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PACK_REMEDY = "; pack the weight with bitmill.ops.tile_pack"


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def tile_shape(n: int, k: int, bits: int = 1) -> list[int]:
    """Shape of n x k values of `bits` bits as weight tiles."""
    return [ceil_div(n, TILE_ROWS), ceil_div(k, 32 // bits), TILE_ROWS]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_tensor(
    op: str, name: str, t: Tensor | None, dtype: torch.dtype, shape: Sequence[int], like: Tensor, remedy: str = ""
) -> None:
    """A tensor of this dtype and shape on the device of `like`, or None."""
    if t is None:
        return
    require(
        t.device == like.device, f"{op}: {name} must be on {like.device}, got {t.device}; move the layer or its input"
    )
    require(t.dtype == dtype, f"{op}: {name} must be {short_name(dtype)}, got {short_name(t.dtype)}")
    require(list(t.shape) == list(shape), f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}{remedy}")


def check_rows(op: str, x: Tensor, name: str = "x") -> int:
    """Floating-point rows; answers k."""
    require(x.dim() >= 1, f"{op}: {name} must have at least one dimension, got a scalar")
    require(x.dtype in FLOATS, f"{op}: {name} must be float32, bfloat16 or float16, got {short_name(x.dtype)}")
    k = x.shape[-1]
    require(k <= MAX_COLUMNS, f"{op}: {name} must have at most {MAX_COLUMNS} columns, got {k}")
    return k


def check_broadcast(op: str, name: str, t: Tensor, shape: Sequence[int], remedy: str = "") -> None:
    sizes = zip(reversed(t.shape), reversed(shape), strict=False)
    require(
        t.dim() <= len(shape) and all(own in (1, size) for own, size in sizes),
        f"{op}: {name} must be broadcastable to {list(shape)}, got shape {list(t.shape)}{remedy}",
    )


def check_one_of(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    choices = ", ".join(f'"{a}"' for a in allowed[:-1]) + f' or "{allowed[-1]}"'
    require(value in allowed, f'{op}: {name} must be {choices}, got "{value}"')


def group_count(op: str, k: int, group_size: int, multiple: int = 32) -> int:
    """Groups of columns that share a scale; group_size 0 means one group."""
    require(
        0 <= group_size <= MAX_COLUMNS and group_size % multiple == 0,
        f"{op}: group_size must be 0 or a positive multiple of {multiple} up to {MAX_COLUMNS}, got {group_size}",
    )
    return ceil_div(k, group_size) if group_size else 1
