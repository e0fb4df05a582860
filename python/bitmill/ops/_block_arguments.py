# SPDX-License-Identifier: Apache-2.0
"""What the ops of whole blocks take, in the order of their schemas, and what they ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import MAX_COLUMNS, PACK_REMEDY, check_one_of, check_tensor, require, tile_shape
from .binary_attention import check_mask, check_rule
from .bitpack import LEVELS


class MlpArguments(NamedTuple):
    """Of `binary_mlp`, after x and residual."""

    shift: Tensor | None
    threshold: float
    levels: str
    up: Tensor
    up_nonzero: Tensor | None
    positive: Tensor
    negative: Tensor | None
    single: Tensor | None
    inner_levels: str
    down: Tensor
    down_nonzero: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def check(self, op: str, x: Tensor, residual: Tensor | None, prefix: str = "") -> None:
        """Raises ValueError; `prefix` is that of the names which an attention's arguments have too."""
        inner = _last_size(self.positive)
        k = _check_input(op, x, f"{prefix}levels", self.levels)
        check_tensor(op, f"{prefix}shift", self.shift, torch.float32, [k], x)
        _check_weight(op, "up", self.up, self.up_nonzero, inner, k, x)
        _check_ranges(op, self.positive, self.negative, self.single, [], inner, x, prefix)
        _check_last(op, x, "down", self.down, self.down_nonzero, inner, self.scale, self.bias, residual, prefix)
        check_one_of(op, "inner_levels", self.inner_levels, LEVELS)


class SelfAttentionArguments(NamedTuple):
    """Of `binary_self_attention`, after x and residual."""

    shift: Sequence[Tensor]
    threshold: Sequence[float]
    levels: str
    weight: Sequence[Tensor]
    weight_nonzero: Sequence[Tensor]
    positive: Tensor
    negative: Tensor | None
    single: Tensor | None
    mask: Tensor | None
    lengths: Tensor | None
    heads: int
    rule: str
    scaling: float | None
    beta: float
    alpha_q: Tensor | None
    alpha_k: Tensor | None
    alpha_a: Tensor | None
    context_positive: Tensor
    context_negative: Tensor | None
    out_levels: str
    out: Tensor
    out_nonzero: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def check(self, op: str, x: Tensor, residual: Tensor | None) -> None:
        """Raises ValueError."""
        count, heads, lengths, mask = len(self.weight), self.heads, self.lengths, self.mask
        require(heads >= 1, f"{op}: heads must be at least 1, got {heads}")
        require(heads <= MAX_COLUMNS, f"{op}: heads must be at most {MAX_COLUMNS}, got {heads}")
        require(lengths is None or mask is None, f"{op}: mask and lengths exclude each other, got both")
        shape = "[sequences, n, k]" if lengths is None else "[rows, k] with lengths"
        require(x.dim() == (3 if lengths is None else 2), f"{op}: x must have shape {shape}, got {list(x.shape)}")
        k = _check_input(op, x, "levels", self.levels)
        require(count in (1, 3), f"{op}: weight must hold the weights of one or three layers, got {count}")
        columns, words = _last_size(self.positive), 32 * heads * (3 if count == 1 else 1)
        require(
            columns > 0 and columns % words == 0,
            f"{op}: positive must be of heads of whole words, a multiple of {words} columns, got {columns}",
        )
        for name, entries, needed in (
            ("shift", self.shift, False),
            ("threshold", self.threshold, True),
            ("weight_nonzero", self.weight_nonzero, False),
        ):
            require(
                len(entries) == count or (not entries and not needed),
                f"{op}: {name} must hold one entry for each of the {count} weights{'' if needed else ' or none'}, got"
                f" {len(entries)}",
            )
        for i, tiles in enumerate(self.weight):
            _check_weight(op, "weight", tiles, entry_of(self.weight_nonzero, i), columns, k, x)
            check_tensor(op, "shift", entry_of(self.shift, i), torch.float32, [k], x)
        width = columns // 3 if count == 1 else columns
        _check_ranges(op, self.positive, self.negative, self.single, [count], columns, x)
        _check_ranges(op, self.context_positive, self.context_negative, None, [], width, x, "context_")
        _check_last(op, x, "out", self.out, self.out_nonzero, width, self.scale, self.bias, residual)
        check_one_of(op, "out_levels", self.out_levels, LEVELS)
        if lengths is not None:
            require(lengths.dim() == 1, f"{op}: lengths must have shape [sequences], got {list(lengths.shape)}")
            check_tensor(op, "lengths", lengths, torch.int64, lengths.shape, x)
        steps = {"alpha_q": self.alpha_q, "alpha_k": self.alpha_k, "alpha_a": self.alpha_a}
        check_rule(op, x, self.rule, self.scaling, self.beta, **steps)
        if mask is not None:
            check_mask(op, x, mask, [x.shape[0], heads, x.shape[1], x.shape[1]])


class LayerNormArguments(NamedTuple):
    """Of `layer_norm`, after x."""

    weight: Tensor
    bias: Tensor
    eps: float

    def check(self, op: str, x: Tensor, prefix: str = "") -> None:
        """Raises ValueError."""
        check_tensor(op, f"{prefix}weight", self.weight, torch.float32, x.shape[-1:], x)
        check_tensor(op, f"{prefix}bias", self.bias, torch.float32, x.shape[-1:], x)


def entry_of(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    """One of a list where an empty tensor stands for None, as an empty list does for all."""
    return tensors[i] if tensors and tensors[i].numel() else None


def _last_size(t: Tensor) -> int:
    return t.shape[-1] if t.dim() else 0


def _check_input(op: str, x: Tensor, levels_name: str, levels: str) -> int:
    check_one_of(op, levels_name, levels, LEVELS)
    return check_floats(op, x)


def check_floats(op: str, x: Tensor) -> int:
    """Rows of float32; answers k."""
    require(x.dtype == torch.float32, f"{op}: x must be float32, got {str(x.dtype).removeprefix('torch.')}")
    require(x.dim() >= 1, f"{op}: x must have at least one dimension, got a scalar")
    require(x.shape[-1] <= MAX_COLUMNS, f"{op}: x must have at most {MAX_COLUMNS} columns, got {x.shape[-1]}")
    return x.shape[-1]


def _check_weight(op: str, name: str, weight: Tensor, nonzero: Tensor | None, n: int, k: int, x: Tensor) -> None:
    check_tensor(op, name, weight, torch.int32, tile_shape(n, k), x, PACK_REMEDY)
    check_tensor(op, f"{name}_nonzero", nonzero, torch.int32, tile_shape(n, k), x)


def _check_ranges(op: str, positive, negative, single, leading: list[int], n: int, x: Tensor, prefix: str = "") -> None:
    check_tensor(op, f"{prefix}positive", positive, torch.int32, [*leading, 2, n], x)
    check_tensor(op, f"{prefix}negative", negative, torch.int32, [*leading, 2, n], x)
    if single is not None:
        require(
            negative is not None and single.dim() == len(leading) + 2,
            f"{op}: {prefix}single must have shape [{'products, ' if leading else ''}n, count] and goes with negative,"
            f" got {list(single.shape)}" + (" without negative" if negative is None else ""),
        )
        check_tensor(op, f"{prefix}single", single, torch.int32, [*leading, n, single.shape[-1]], x)


def _check_last(op: str, x, name: str, weight, nonzero, k: int, scale, bias, residual, prefix: str = "") -> None:
    n = scale.shape[0] if scale.dim() else 0
    _check_weight(op, name, weight, nonzero, n, k, x)
    check_tensor(op, f"{prefix}scale", scale, torch.float32, [n, 1], x)
    check_tensor(op, f"{prefix}bias", bias, torch.float32, [n], x)
    check_tensor(op, "residual", residual, torch.float32, [*x.shape[:-1], n], x)
