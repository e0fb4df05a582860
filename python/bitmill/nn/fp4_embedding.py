# SPDX-License-Identifier: Apache-2.0
"""FP4Embedding: a lookup table whose rows are 4-bit floats, in any format of FP4Config, as those of FP4Linear's weight.

Both forms give the same rows bit for bit. Activations are not looked at: ids have none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import FP4Config
from ..ops import (
    codebook4_fake_quant,
    fp4_embedding,
    fp4_fake_quant,
    mxfp4_fake_quant,
    nvfp4_fake_quant,
    nvfp4_global_scale,
)
from ..ops._library import without_autocast
from ..ops.fp4 import CODEBOOKS
from ._module import LatentEmbedding, PackedTable, embedding_from, require_finite, whole_ids
from .fp4 import FP4Linear, PackedFP4Linear, row_scale


class FP4Embedding(LatentEmbedding):
    """Training form: latent table [num_embeddings, embedding_dim], straight-through gradient, none for the padding row.

    Output dtype = the table's dtype; the arithmetic is float32, also under autocast.
    """

    config_class: ClassVar = FP4Config
    config: FP4Config

    def forward(self, ids: Tensor) -> Tensor:
        """[..., embedding_dim]. Only the rows that are looked up are quantised: a batch sees little of a vocabulary."""
        with without_autocast(ids):
            rows = nn.functional.embedding(ids, self.weight, self.padding_idx).view(ids.numel(), self.embedding_dim)
            return self._quantised(rows.float()).to(self.weight.dtype).view(*ids.shape, self.embedding_dim)

    def _quantised(self, rows: Tensor) -> Tensor:
        format = self.config.format
        if format == "mxfp4":
            return mxfp4_fake_quant(rows, self.config.scale_rule)
        if format == "nvfp4":
            return nvfp4_fake_quant(rows, nvfp4_global_scale(self.weight))
        if format in CODEBOOKS:
            return codebook4_fake_quant(rows, format, self.config.group_size)
        return fp4_fake_quant(rows, format, row_scale(rows, format))

    def _linear(self) -> FP4Linear:
        """The layer whose weight is the table."""
        config = dataclasses.replace(self.config, activations="float")
        linear = FP4Linear(self.embedding_dim, self.num_embeddings, False, config, device="meta")
        linear.weight = self.weight
        return linear

    @torch.no_grad()
    def pack(self) -> PackedFP4Embedding:
        """The packed form, from the expressions that trained.

        Raises:
            ValueError: for a table with NaN or infinity, or one that is too large for its block scales.
        """
        require_finite("FP4Embedding", self.weight)
        sizes = self.num_embeddings, self.embedding_dim, self.padding_idx
        packed, linear = PackedFP4Embedding(*sizes, self.config, self.weight.dtype, "meta"), self._linear().pack()
        packed.weight, packed.scale, packed.global_scale = linear.weight, linear.scale, linear.global_scale
        return packed.train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Embedding:
        """An nn.Embedding with the quantised table."""
        table = self._linear().quantised_weight().to(self.weight.dtype)
        return embedding_from(table, self.padding_idx, self.training)


class PackedFP4Embedding(PackedTable):
    """Packed form: rows of 4-bit codes and their scales.

    Buffers: weight int32 [ceil(rows/16), ceil(dim/8), 16]; scale [rows, groups], float32, or uint8 for "mxfp4" (E8M0)
    and "nvfp4" (E4M3); global_scale float32 [] for "nvfp4". `dtype` is that of the output, which .half(), .bfloat16()
    and .to(dtype) change; the buffers' dtypes stay.
    """

    config: FP4Config
    kernel = "fp4_embedding"
    weight: Tensor
    scale: Tensor
    global_scale: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        config: FP4Config | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        self.config = config if config is not None else FP4Config()
        buffers = self._empty_linear(device)._buffers
        self.register_buffers(**{name: t for name, t in buffers.items() if name != "bias"})

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: FP4Config | None = None) -> PackedFP4Embedding:
        """Cast and pack an nn.Embedding."""
        return FP4Embedding.from_embedding(embedding, config).pack()

    def _empty_linear(self, device: torch.device | str | None, bias: bool = False, **changes: Any) -> PackedFP4Linear:
        config = dataclasses.replace(self.config, **{"activations": "float", **changes})
        return PackedFP4Linear(self.embedding_dim, self.num_embeddings, bias, config, device=device)

    def as_linear(self, bias: Tensor | None = None, activations: str = "float") -> PackedFP4Linear:
        """The table as an output head, on the same buffers."""
        head = self._empty_linear("meta", bias is not None, activations=activations)
        head.weight, head.scale, head.global_scale = self.weight, self.scale, self.global_scale
        head.bias = None if bias is None else bias.detach().float().clone()
        return head.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int [...] in [0, num_embeddings); answers [..., embedding_dim].

        Raises:
            IndexError: for an id outside.
            ValueError: for ids that are no integers.
        """
        config = self.config
        format = "e2m1" if config.format in ("mxfp4", "nvfp4") else config.format
        settings = (self.embedding_dim, format, config.group_size, self.global_scale)
        return fp4_embedding(whole_ids("PackedFP4Embedding", ids), self.weight, self.scale, *settings).to(self.dtype)

    @torch.no_grad()
    def dequantize(self) -> nn.Embedding:
        """An nn.Embedding of this dtype with the quantised table."""
        table = self.as_linear().dequantize().weight.to(self.dtype)
        return embedding_from(table, self.padding_idx, self.training)

    def validate(self) -> None:
        self.as_linear().validate()
