# SPDX-License-Identifier: Apache-2.0
"""8-bit rows for the ends of a language model: a lookup table and an output head, which may be one and the same.

w[r, c] = scale[r] q[r, c] with q in [-127, 127] and scale = amax / 127 of the row (`ops.int8_quantize`). A code q + 128
is kept as two planes of 4-bit tiles, its high and its low half, so that the products are those of `ops.fp4_linear` with
the halves' values for a codebook: x w^T = scale (x high^T + x low^T). There is no training form: 8 bits lose next to
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import Int8Config
from ..ops import int8_quantize, tile_pack, tile_unpack
from ..ops._checks import TILE_ROWS, tile_shape
from ._module import PackedModule, PackedTable, linear_from, require_finite, require_width
from .binary import check_padding

_fp4_linear = torch.ops.bitmill.fp4_linear.default
OFFSET = 128  # of a code


def pack_rows(layer: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """high, low int32 [ceil(n/16), ceil(k/8), 16] and scale float32 [n, 1] of a weight [n, k]."""
    require_finite(layer, weight)
    q, scale = int8_quantize(weight.detach().float())
    codes = (q.to(torch.int16) + OFFSET).to(torch.uint8)
    return tile_pack(codes >> 4, 4), tile_pack(codes & 15, 4), scale.unsqueeze(1)


class _PackedRows(PackedModule):
    """Buffers of both layers: high, low, scale."""

    config: Int8Config
    kernel = "fp4_linear"
    high: Tensor
    low: Tensor
    scale: Tensor

    def create(self, n: int, k: int, device: torch.device | str | None, **others: Tensor | None) -> None:
        def tiles() -> Tensor:
            return torch.zeros(tile_shape(n, k, 4), dtype=torch.int32, device=device)

        self.register_buffers(high=tiles(), low=tiles(), scale=torch.zeros(n, 1, device=device), **others)

    def dense(self) -> Tensor:
        """The weight, float32 [n, k]."""
        n, k = self.weight_shape()
        high, low = (tile_unpack(tiles, n, k, 4).float() for tiles in (self.high, self.low))
        return self.scale * (16 * high + low - OFFSET)

    @torch.no_grad()
    def validate(self) -> None:
        n, k = self.weight_shape()
        check_padding("high", self.high, n, 4 * k)
        check_padding("low", self.low, n, 4 * k)
        if not torch.isfinite(self.scale).all():
            raise ValueError("scale: every scale must be finite, got NaN or infinity; the layer is corrupt")


class PackedInt8Embedding(PackedTable, _PackedRows):
    """A lookup table [num_embeddings, embedding_dim] of 8-bit rows.

    `dtype` is that of the output, which .half(), .bfloat16() and .to(dtype) change; the buffers' dtypes stay.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        config: Int8Config | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        self.config = config if config is not None else Int8Config()
        self.create(num_embeddings, embedding_dim, device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: Int8Config | None = None) -> PackedInt8Embedding:
        """Round an nn.Embedding to 8 bits.

        Raises:
            ValueError: for NaN or infinity, a subclass of nn.Embedding, or one with max_norm.
        """
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise ValueError(
                "PackedInt8Embedding: embedding must be a torch.nn.Embedding without max_norm, got"
                f" {type(embedding).__name__}, whose forward may differ"
            )
        sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        packed = cls(*sizes, config, embedding.weight.dtype, device="meta")
        packed.high, packed.low, packed.scale = pack_rows(cls.__name__, embedding.weight)
        return packed.train(embedding.training)

    def as_linear(self, bias: Tensor | None = None) -> PackedInt8Linear:
        """The table as an output head, on the same buffers."""
        head = PackedInt8Linear(self.embedding_dim, self.num_embeddings, bias is not None, self.config, device="meta")
        head.high, head.low, head.scale = self.high, self.low, self.scale
        head.bias = None if bias is None else bias.detach().float().clone()
        return head.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int [...] in [0, num_embeddings); answers [..., embedding_dim]. Raises IndexError for an id outside."""
        scale = nn.functional.embedding(ids, self.scale)  # checks the ids, which plain indexing would let wrap around
        tile, lane = ids // TILE_ROWS, ids % TILE_ROWS
        place = torch.arange(0, 32, 4, dtype=torch.int32, device=ids.device)

        def half(tiles: Tensor) -> Tensor:
            nibbles = (tiles[tile, :, lane].unsqueeze(-1) >> place) & 15
            return nibbles.flatten(-2)[..., : self.embedding_dim]

        return (scale * (16 * half(self.high) + half(self.low) - OFFSET)).to(self.dtype)

    @torch.no_grad()
    def dequantize(self) -> nn.Embedding:
        """An nn.Embedding (of `dtype`) with the rounded table."""
        table = self.dense().to(self.dtype)
        return nn.Embedding.from_pretrained(table, False, self.padding_idx).train(self.training)


class PackedInt8Linear(_PackedRows):
    """A linear layer with 8-bit rows: buffers of the module docstring, and bias float32 [n]."""

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Int8Config | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else Int8Config()
        self.in_features, self.out_features = in_features, out_features
        own = torch.zeros(out_features, device=device) if bias else None
        self.create(out_features, in_features, device, bias=own)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Int8Config | None = None) -> PackedInt8Linear:
        """Round an nn.Linear to 8 bits.

        Raises:
            ValueError: for NaN or infinity, or if `linear` is not exactly an nn.Linear.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{cls.__name__}: linear must be a torch.nn.Linear, got {type(linear).__name__}, whose forward may"
                " differ"
            )
        packed = cls(linear.in_features, linear.out_features, linear.bias is not None, config, device="meta")
        packed.high, packed.low, packed.scale = pack_rows(cls.__name__, linear.weight)
        packed.bias = None if linear.bias is None else linear.bias.detach().float().clone()
        return packed.train(linear.training)

    def arguments(self) -> dict[str, Any]:
        features = {"in_features": self.in_features, "out_features": self.out_features}
        return {**features, "bias": self.bias is not None}

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        require_width("PackedInt8Linear", x, self.in_features)
        tensors, activations = self._buffers, self.config.activations
        values, scale = x.float(), tensors["scale"]
        low = torch.arange(0.0, 16.0, device=x.device)
        high = 16 * low - OFFSET
        out = _fp4_linear(values, tensors["high"], scale, None, "e2m1", 0, high, activations)
        rest = _fp4_linear(values, tensors["low"], scale, tensors["bias"], "e2m1", 0, low, activations)
        return (out + rest).to(x.dtype)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the rounded weight."""
        return linear_from(self.dense(), self.bias, torch.float32, self.training)
