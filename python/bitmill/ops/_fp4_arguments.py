# SPDX-License-Identifier: Apache-2.0
"""What the ops with FP4 weights and activations take, in the order of their schemas, and what they ask of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import (
    MAX_COLUMNS,
    PACK_REMEDY,
    check_one_of,
    check_rows,
    check_tensor,
    group_count,
    require,
    short_name,
    tile_shape,
)
from .fp4 import CODEBOOKS, FORMATS, GROUP_MULTIPLE, MX_BLOCK, SCALE_RULES
from .int8 import ACTIVATIONS
from .nvfp4 import NV_BLOCK

INTEGER_FORMATS = ("e2m1", "e1m2", "mxfp4", "nvfp4")
BLOCKS = {"mxfp4": MX_BLOCK, "nvfp4": NV_BLOCK}


class WeightArguments(NamedTuple):
    """Of `fp4_weight`."""

    weight: Tensor
    scale: Tensor
    n: int
    k: int
    format: str
    group_size: int
    codebook: Tensor | None
    global_scale: Tensor | None = None

    def check(self, op: str, like: Tensor) -> None:
        """Raises ValueError; all must be on the device of `like`."""
        scale, dtype = self.scale, self.scale.dtype
        check_one_of(op, "format", self.format, (*FORMATS, *CODEBOOKS))
        require(
            self.n >= 0 and 0 <= self.k <= MAX_COLUMNS,
            f"{op}: n must be at least 0 and k between 0 and {MAX_COLUMNS}, got n = {self.n}, k = {self.k}",
        )
        groups = group_count(op, self.k, self.group_size, GROUP_MULTIPLE)
        valid = dtype in (torch.float32, torch.uint8)
        require(valid, f"{op}: scale must be float32, or uint8 for E8M0, got {short_name(dtype)}")
        valid = self.global_scale is None or dtype == torch.uint8
        require(valid, f"{op}: scale must be uint8, E4M3, with a global_scale, got {short_name(dtype)}")
        check_tensor(op, "scale", scale, dtype, [self.n, groups], like)
        check_tensor(op, "weight", self.weight, torch.int32, tile_shape(self.n, self.k, 4), like, PACK_REMEDY)
        check_tensor(op, "codebook", self.codebook, torch.float32, [16], like)
        check_tensor(op, "global_scale", self.global_scale, torch.float32, [], like)


class LinearArguments(NamedTuple):
    """Of `fp4_linear`, after x."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    format: str
    group_size: int
    codebook: Tensor | None
    activations: str
    global_scale: Tensor | None = None

    def weight_for(self, x: Tensor) -> WeightArguments:
        n = self.scale.shape[0] if self.scale.dim() else 0
        return WeightArguments(
            self.weight, self.scale, n, x.shape[-1], self.format, self.group_size, self.codebook, self.global_scale
        )

    def check(self, op: str, x: Tensor) -> None:
        """Raises ValueError."""
        check_one_of(op, "activations", self.activations, ACTIVATIONS)
        check_rows(op, x)
        of = self.weight_for(x)
        of.check(op, x)
        check_tensor(op, "bias", self.bias, torch.float32, [of.n], x)


class EmbeddingArguments(NamedTuple):
    """Of `fp4_embedding`, after ids."""

    weight: Tensor
    scale: Tensor
    k: int
    format: str = "e2m1"
    group_size: int = 0
    global_scale: Tensor | None = None

    def check(self, op: str, ids: Tensor) -> None:
        """Raises ValueError; all must be where the scale is."""
        scale = self.scale
        check_one_of(op, "format", self.format, (*FORMATS, *CODEBOOKS))
        require(0 <= self.k <= MAX_COLUMNS, f"{op}: k must be between 0 and {MAX_COLUMNS}, got {self.k}")
        groups = group_count(op, self.k, self.group_size, GROUP_MULTIPLE)
        dtypes = (torch.uint8,) if self.global_scale is not None else (torch.float32, torch.uint8)
        require(
            scale.dtype in dtypes,
            f"{op}: scale must be float32, uint8 for E8M0, or uint8 for E4M3 with a global_scale,"
            f" got {short_name(scale.dtype)}",
        )
        n = scale.shape[0] if scale.dim() else 0
        check_tensor(op, "scale", scale, scale.dtype, [n, groups], scale)
        check_tensor(op, "ids", ids, torch.int64, ids.shape, scale)
        check_tensor(op, "weight", self.weight, torch.int32, tile_shape(n, self.k, 4), scale)
        check_tensor(op, "global_scale", self.global_scale, torch.float32, [], scale)


class ActivationArguments(NamedTuple):
    """Of `fp4_activations`, after x."""

    format: str
    input_scale: Tensor | None
    input_shift: Tensor | None
    scale_rule: str

    def check(self, op: str, x: Tensor) -> None:
        """Raises ValueError."""
        check_one_of(op, "activations", self.format, INTEGER_FORMATS)
        check_one_of(op, "scale_rule", self.scale_rule, SCALE_RULES)
        k, blocks = check_rows(op, x), self.format in BLOCKS
        require(
            (self.input_scale is None) == blocks,
            f'{op}: input_scale must {"be None" if blocks else "be given"} for activations "{self.format}"',
        )
        valid = self.input_shift is None or not blocks
        require(valid, f'{op}: input_shift must be None for activations "{self.format}"')
        check_tensor(op, "input_scale", self.input_scale, torch.float32, [], x)
        check_tensor(op, "input_shift", self.input_shift, torch.uint8, [k], x)


class FP4LinearArguments(NamedTuple):
    """Of `fp4_fp4_linear`, after x."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    format: str
    group_size: int
    global_scale: Tensor | None
    activations: str
    input_scale: Tensor | None
    input_shift: Tensor | None
    scale_rule: str

    @property
    def casting(self) -> ActivationArguments:
        return ActivationArguments(self.activations, self.input_scale, self.input_shift, self.scale_rule)

    def weight_for(self, x: Tensor) -> WeightArguments:
        n = self.scale.shape[0] if self.scale.dim() else 0
        return WeightArguments(
            self.weight, self.scale, n, x.shape[-1], self.format, self.group_size, None, self.global_scale
        )

    def check(self, op: str, x: Tensor) -> None:
        """Raises ValueError."""
        self.casting.check(op, x)
        width = BLOCKS.get(self.activations, 0)
        require(
            self.group_size == width,
            f'{op}: group_size must be {width} for activations "{self.activations}", got {self.group_size}',
        )
        of = self.weight_for(x)
        of.check(op, x)
        check_tensor(op, "bias", self.bias, torch.float32, [of.n], x)
