# SPDX-License-Identifier: Apache-2.0
"""PackedZonedLinear: the packed form of BiLLM's and ARB-LLM's binarised weights (arXiv 2402.04291, 2410.03129).

Such weights are found from calibration text (`recipes.billm`, `recipes.arb_llm`), so there is no training form. A
weight takes a sign bit and a zone bit, which for a salient column is its second sign; then come the scales of the
zones, 7 numbers a row and block of 128 columns with means and 4 without, and a bit a column. In float16 that is 2.88
bits a weight, or 2.5, and where salient columns are split into zones too 3 scales more, or 2, and a bit for each of
their weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ZonedConfig
from ..ops import zoned
from ..ops._checks import TILE_ROWS, ceil_div, tile_shape
from ..ops.bitpack import _unpack_bits
from ._module import PackedModule, linear_from, require_width
from .packed_binary import check_padding

ARRAYS = ("sign", "zone", "salient_zone", "salient", "scale", "column_scale")  # as the ops take them
_zoned_linear = torch.ops.bitmill.zoned_linear.default


class PackedZonedLinear(PackedModule):
    """Packed form: two planes of bits in tiles and the scales of the zones, one op a call, which unpacks nothing.

    Buffers: sign and zone int32 [ceil(n/16), ceil(k/32), 16]; salient_zone [ceil(n/16), entries, 16], only with
    split_salient; salient int32 [ceil(k/32)]; scale float16 or float32 [ceil(n/16), ceil(k/block), s, 16]; column_scale
    [k] of the same dtype, only with one; bias float32 [n]. `bitmill.ops.zoned` has the formulas.
    """

    config: ZonedConfig
    kernel = "zoned_linear"
    sign: Tensor
    zone: Tensor
    salient_zone: Tensor | None
    salient: Tensor
    scale: Tensor
    column_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: ZonedConfig | None = None,
        entries: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config = self.config = config if config is not None else ZonedConfig()
        if entries and not config.split_salient:
            raise ValueError(f"PackedZonedLinear: entries must be 0 without split_salient, got {entries}")
        self.in_features, self.out_features = in_features, out_features
        dtype = torch.float16 if config.scale_bits == 16 else torch.float32
        scales = zoned.scale_count(config.centre, config.split_salient)

        def bits(columns: int) -> Tensor:
            return torch.zeros(tile_shape(out_features, columns), dtype=torch.int32, device=device)

        def scale(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        blocks = ceil_div(in_features, config.block)
        self.register_buffers(
            sign=bits(in_features),
            zone=bits(in_features),
            salient_zone=bits(32 * entries) if config.split_salient else None,
            salient=torch.zeros(ceil_div(in_features, 32), dtype=torch.int32, device=device),
            scale=scale(ceil_div(out_features, TILE_ROWS), blocks, scales, TILE_ROWS),
            column_scale=scale(in_features) if config.column_scale else None,
            bias=torch.zeros(out_features, device=device) if bias else None,
        )

    @classmethod
    @torch.no_grad()
    def from_parts(cls, weight: zoned.ZonedWeight, bias: Tensor | None, config: ZonedConfig) -> PackedZonedLinear:
        """Pack a zoned weight [n, k]; scales are rounded to the config's bits.

        Raises:
            ValueError: for scales that do not fit the config, or that are not finite in its bits.
        """
        (n, k), dtype = weight.first.shape, torch.float16 if config.scale_bits == 16 else torch.float32
        expected = (n, ceil_div(k, config.block), zoned.scale_count(config.centre, config.split_salient))
        if weight.scale.shape != expected or (weight.column_scale is None) == config.column_scale:
            raise ValueError(
                f"PackedZonedLinear: weight must have scales {list(expected)} and"
                f" {'a' if config.column_scale else 'no'} column_scale for {config}, got {list(weight.scale.shape)} and"
                f" {'none' if weight.column_scale is None else 'one'}"
            )
        arrays = zoned.pack(weight, config.block, dtype)
        for scales in arrays[4:]:
            if scales is not None and not torch.isfinite(scales).all():
                raise ValueError(
                    f"PackedZonedLinear: weight must be small enough for scales of {config.scale_bits} bits, got one"
                    " that is not finite; scale the weight down, or take scale_bits=32"
                )
        entries = 0 if arrays[2] is None else arrays[2].shape[1]
        packed = cls(k, n, bias is not None, config, entries, "meta")
        for name, value in zip(ARRAYS, arrays, strict=True):
            setattr(packed, name, value)
        packed.bias = None if bias is None else bias.detach().float().clone()
        return packed

    def arguments(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "entries": 0 if self.salient_zone is None else self.salient_zone.shape[1],
        }

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def salient_share(self) -> float:
        """The share of the columns that is salient: what papers call the bits beyond one a weight."""
        return self._salient_columns().float().mean().item() if self.in_features else 0.0

    def _salient_columns(self) -> Tensor:
        return _unpack_bits(self.salient, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        require_width("PackedZonedLinear", x, self.in_features)
        tensors = self._buffers  # a look into _buffers is ten times faster than an attribute
        arrays = (tensors[name] for name in ARRAYS)
        return _zoned_linear(x, *arrays, tensors["bias"], self.out_features, self.config.block)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the binarised weight."""
        arrays = (self._buffers[name] for name in ARRAYS)
        dense = torch.ops.bitmill.zoned_weight.default(*arrays, *self.weight_shape(), self.config.block)
        return linear_from(dense, self.bias, torch.float32, self.training)

    @torch.no_grad()
    def validate(self) -> None:
        n, k = self.weight_shape()
        self(self.scale.new_zeros(0, k, dtype=torch.float32))  # no rows: the checks are all that runs
        for name in ("sign", "zone"):
            check_padding(name, getattr(self, name), n, k)
        check_padding(
            "salient_zone", self.salient_zone, n, zoned.split_columns(self._salient_columns(), self.config.block)
        )
        if k % 32 and bool(_unpack_bits(self.salient, 32 * len(self.salient))[k:].any()):
            raise ValueError("salient: bits past the last column must be 0, got 1; the layer is corrupt")
        for name in ("scale", "column_scale"):
            scales = getattr(self, name)
            if scales is not None and not torch.isfinite(scales).all():
                raise ValueError(f"{name}: every scale must be finite, got NaN or infinity; the layer is corrupt")
