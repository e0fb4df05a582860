# SPDX-License-Identifier: Apache-2.0
"""BinaryEmbedding: a lookup table with 1-bit entries and one scale a row."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..binarize import WeightRule, binarize_weight, method, weight_scale
from ..config import BinaryConfig
from ..ops import binary_embedding, tile_pack
from ..ops._checks import tile_shape
from ..ops._groups import columns_of_groups
from ..ops.binary_matmul import unpack_signs
from ._module import LatentEmbedding, PackedModule, embedding_from, require_finite, whole_ids
from .binary import check_padding


class BinaryEmbedding(LatentEmbedding):
    """Training form: latent table [num_embeddings, embedding_dim]; the padding row gets no gradient.

    Output dtype = the table's dtype.
    """

    config_class: ClassVar = BinaryConfig
    config: BinaryConfig

    def _rule(self) -> WeightRule:
        return method(self.config.method).table_rule(self.config.weight_bits)

    def _table(self) -> Any:
        return binarize_weight(self.weight, self._rule(), self.config.group_size)

    def forward(self, ids: Tensor) -> Tensor:
        """[..., embedding_dim]. Only the rows that are looked up are binarised: a batch sees little of a vocabulary."""
        rule = self._rule()
        rows = nn.functional.embedding(ids, self.weight, self.padding_idx).view(ids.numel(), self.embedding_dim)
        scale = weight_scale(rows.detach(), rule, self.config.group_size)
        if rule.centre == "global":
            rows, rule = rows.float() - self.weight.detach().float().mean(), dataclasses.replace(rule, centre="none")
        value = binarize_weight(rows, rule, self.config.group_size, scale).value
        return value.to(self.weight.dtype).view(*ids.shape, self.embedding_dim)

    @torch.no_grad()
    def pack(self) -> PackedBinaryEmbedding:
        """The packed form. Raises ValueError for a table with NaN or infinity."""
        require_finite("BinaryEmbedding", self.weight)
        table = self._table()
        zeros = table.signs == 0
        packed = PackedBinaryEmbedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, self.config, bool(zeros.any()), device="meta"
        )
        packed.weight = tile_pack((table.signs > 0).to(torch.uint8), 1)
        packed.weight_nonzero = tile_pack((~zeros).to(torch.uint8), 1) if packed.weight_zeros else None
        packed.scale = table.scale.to(self.weight.dtype).clone()
        return packed.train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Embedding:
        """An nn.Embedding with the binarised table."""
        return embedding_from(self._table().value.to(self.weight.dtype), self.padding_idx, self.training)


class PackedBinaryEmbedding(PackedModule):
    """Packed form: rows of bits and their scales.

    Buffers: weight int32 tiles [ceil(rows/16), ceil(dim/32), 16]; weight_nonzero the same, where entries are exactly 0;
    scale [rows, groups]. Output dtype = the scale's dtype.
    """

    config: BinaryConfig
    kernel = "binary_embedding"
    _apply = nn.Module._apply  # .half() and .bfloat16() do change the scale's dtype, which is the output's
    weight: Tensor
    weight_nonzero: Tensor | None
    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        config: BinaryConfig | None = None,
        weight_zeros: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else BinaryConfig()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.weight_zeros = padding_idx, weight_zeros
        group_size = self.config.group_size
        groups = -(-embedding_dim // group_size) if group_size else 1

        def words() -> Tensor:
            return torch.zeros(tile_shape(num_embeddings, embedding_dim), dtype=torch.int32, device=device)

        self.register_buffers(
            weight=words(),
            weight_nonzero=words() if weight_zeros else None,
            scale=torch.zeros(num_embeddings, groups, device=device),
        )

    def arguments(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "weight_zeros": self.weight_zeros,
        }

    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int [...] in [0, num_embeddings); answers [..., embedding_dim].

        Raises:
            IndexError: for an id outside.
            ValueError: for ids that are no integers.
        """
        return binary_embedding(whole_ids("PackedBinaryEmbedding", ids), *self.table())

    def table(self) -> tuple[Tensor, Tensor | None, Tensor, int, int]:
        """What `binary_embedding` takes besides ids."""
        tensors = self._buffers  # a look into them is ten times faster than an attribute
        weight, nonzero, scale = tensors["weight"], tensors["weight_nonzero"], tensors["scale"]
        assert weight is not None and scale is not None
        return weight, nonzero, scale, self.embedding_dim, self.config.group_size or 0

    @torch.no_grad()
    def dequantize(self) -> nn.Embedding:
        """An nn.Embedding with the binarised table."""
        signs = unpack_signs(self.weight, self.weight_nonzero, self.num_embeddings, self.embedding_dim)
        scale = columns_of_groups(self.scale, self.embedding_dim, self.config.group_size)
        return embedding_from(scale * signs.to(scale.dtype), self.padding_idx, self.training)

    def validate(self) -> None:
        check_padding("weight", self.weight, self.num_embeddings, self.embedding_dim)
        check_padding("weight_nonzero", self.weight_nonzero, self.num_embeddings, self.embedding_dim)
