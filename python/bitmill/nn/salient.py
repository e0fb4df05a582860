# SPDX-License-Identifier: Apache-2.0
"""SalientLinear: PB-LLM's partially binarised linear layer (arXiv 2310.00034).

A fixed fraction of the weights, single ones or whole columns, is salient and keeps 8 or 16 bits; every other weight is
mu + alpha sgn(w - mu), with sgn(0) = +1. Training form and packed form hold the same weight bit for bit; their outputs
differ by summation order.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..config import SalientConfig
from ..ops import int8_fake_quant, tile_pack
from ..ops._checks import ceil_div, tile_shape
from ..ops._groups import columns_of_groups
from ..ops._library import without_autocast
from ..ops._salient_encoding import (
    ENCODINGS,
    encode,
    encode_columns,
    encoding_of,
    index_shape,
    start_length,
    value_dtype,
    value_shape,
)
from ..ops.salient_scatter import (
    binary_statistics,
    binary_value,
    high_bit_codes,
    rounded_to_float16,
    salient_columns,
    salient_mask,
    salient_value,
)
from ._module import LatentLinear, PackedModule, as_float32, linear_from, require_finite, require_width
from .binary import check_padding

ARRAYS = ("weight", "index", "value", "start", "alpha", "mu", "value_scale", "value_zero")  # as the ops take them
_salient_linear = torch.ops.bitmill.salient_linear.default


class QuantisedWeight(NamedTuple):
    """A weight [n, k] in both forms at once; the mask says which one counts.

    plus bool [n, k], alpha and mu float32 [n, groups]: the binarised form. codes [n, k]: the salient form, uint8 with
    scale and zero float32 [n], or without them float32 that a float16 holds exactly.
    """

    plus: Tensor
    alpha: Tensor
    mu: Tensor | None
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None

    def salient(self) -> Tensor:
        if self.scale is None or self.zero is None:
            return self.codes
        return salient_value(self.codes, self.scale, self.zero)


def quantise_weight(weight: Tensor, mask: Tensor, config: SalientConfig) -> QuantisedWeight:
    """The config's rules applied to a detached weight."""
    w, group_size = weight.detach().float(), config.group_size or 0
    alpha, mu = binary_statistics(w, mask, group_size, config.scale, config.centre)
    centred = w if mu is None else w - columns_of_groups(mu, w.shape[1], group_size)
    if config.bits == 8:
        return QuantisedWeight(centred >= 0, alpha, mu, *high_bit_codes(w))
    return QuantisedWeight(centred >= 0, alpha, mu, rounded_to_float16(w), None, None)


class SalientLinear(LatentLinear):
    """Training form: latent weight [out_features, in_features] and the mask of its salient entries.

    The mask is measured once, on the weight that the layer is created with, and is a persistent buffer. Salient
    weights are frozen: their gradient is exactly 0. Binarised weights get the straight-through identity; alpha and mu
    follow the weight in every forward and carry no gradient. With activations="int8" every row of x is rounded as the
    packed form rounds it, straight-through. Output dtype = input dtype; the arithmetic is float32,
    also under autocast.
    """

    config_class: ClassVar = SalientConfig
    config: SalientConfig
    mask: Tensor

    def create_state(self, device: torch.device, dtype: torch.dtype) -> None:
        measure = salient_columns if self.config.structure == "column" else salient_mask
        self.register_buffer("mask", measure(self.weight, self.config.fraction))

    def quantised_weight(self) -> Tensor:
        """What the layer multiplies with, float32 [out_features, in_features], with its straight-through gradient."""
        parts = quantise_weight(self.weight, self.mask, self.config)
        binary = binary_value(parts.plus, parts.alpha, parts.mu, self.config.group_size or 0)
        latent = self.weight.float()
        # The difference is exactly 0: it brings the gradient of the latent weight and leaves the value alone.
        return torch.where(self.mask, parts.salient(), binary + (latent - latent.detach()))

    def forward(self, x: Tensor) -> Tensor:
        require_width("SalientLinear", x, self.in_features)
        with without_autocast(x):
            values = int8_fake_quant(x.float()) if self.config.activations == "int8" else x.float()
            return nn.functional.linear(values, self.quantised_weight(), as_float32(self.bias)).to(x.dtype)

    @torch.no_grad()
    def pack(self) -> PackedSalientLinear:
        """The packed form, from the expressions that trained.

        Raises:
            ValueError: for a weight with NaN or infinity, or one that is too large for its scales or for float16.
        """
        require_finite("SalientLinear", self.weight)
        mask, config = self.mask, self.config
        parts = quantise_weight(self.weight, mask, config)
        value = parts.codes.to(torch.uint8 if config.bits == 8 else torch.float16)
        for number in (parts.alpha, parts.mu, parts.scale, value[mask]):
            if number is not None and not torch.isfinite(number).all():
                raise ValueError(
                    f"SalientLinear: weight must be small enough for {config.bits}-bit salient weights and float32"
                    f" scales, got magnitudes up to {self.weight.abs().max().item():.3g}; scale the weight down"
                )
        if config.structure == "column":
            columns = mask.any(0)
            if not torch.equal(mask, columns.expand_as(mask)):
                raise ValueError(
                    'SalientLinear: mask must mark whole columns for structure "column", got parts of some'
                )
            index, value, start = encode_columns(columns, value)
        else:
            index, value, start = encode(mask, value)
        packed = PackedSalientLinear(
            *(self.in_features, self.out_features, self.bias is not None, config),
            *(encoding_of("SalientLinear", index), (value if index.dim() == 3 else index).shape[0], "meta"),
        )
        packed.weight = tile_pack((parts.plus & ~mask).to(torch.uint8), 1)
        packed.index, packed.value, packed.start = index, value, start
        packed.alpha, packed.mu = parts.alpha, parts.mu
        packed.value_scale, packed.value_zero = parts.scale, parts.zero
        packed.bias = None if self.bias is None else self.bias.detach().float().clone()
        return packed.train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear with the partially binarised weight."""
        return self.to_linear(self.quantised_weight())


class PackedSalientLinear(PackedModule):
    """Packed form: 1-bit weights in tiles, the salient weights beside them, one op a call.

    Buffers: weight int32 [ceil(n/16), ceil(k/32), 16]; index, value and start (None for columns) in one of the
    encodings of `bitmill.ops.salient_scatter`; alpha and mu (None without `centre`) float32 [n, groups]; value_scale
    and value_zero (None for 16 bits) float32 [n]; bias [n]. `pack` takes the smaller of a list and a bitmap.
    """

    config: SalientConfig
    kernel = "salient_linear"
    weight: Tensor
    index: Tensor
    value: Tensor
    start: Tensor | None
    alpha: Tensor
    mu: Tensor | None
    value_scale: Tensor | None
    value_zero: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: SalientConfig | None = None,
        encoding: str = "bitmap",
        entries: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else SalientConfig()
        if encoding not in ENCODINGS:
            raise ValueError(f"PackedSalientLinear: encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        self.in_features, self.out_features = in_features, out_features
        groups = ceil_div(in_features, self.config.group_size) if self.config.group_size else 1
        codes = self.config.bits == 8

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        index = index_shape(encoding, out_features, in_features, entries)
        value = value_shape(encoding, out_features, entries, codes)
        self.register_buffers(
            weight=zeros(*tile_shape(out_features, in_features), dtype=torch.int32),
            index=zeros(*index, dtype=torch.uint8 if encoding == "list" else torch.int32),
            value=zeros(*value, dtype=value_dtype(encoding, codes)),
            start=None if encoding == "columns" else zeros(start_length(encoding, out_features), dtype=torch.int32),
            alpha=zeros(out_features, groups),
            mu=zeros(out_features, groups) if self.config.centre else None,
            value_scale=zeros(out_features) if codes else None,
            value_zero=zeros(out_features) if codes else None,
            bias=zeros(out_features) if bias else None,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SalientConfig | None = None) -> PackedSalientLinear:
        """Partially binarise and pack an nn.Linear."""
        return SalientLinear.from_linear(linear, config).pack()

    def arguments(self) -> dict[str, Any]:
        encoding = encoding_of("PackedSalientLinear", self.index)
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "encoding": encoding,
            "entries": (self.value if encoding == "bitmap" else self.index).shape[0],
        }

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        require_width("PackedSalientLinear", x, self.in_features)
        tensors = self._buffers  # a look into _buffers is ten times faster than an attribute
        return _salient_linear(
            x,
            *(tensors[name] for name in ARRAYS),
            tensors["bias"],
            self.config.group_size or 0,
            self.config.activations,
        )

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the partially binarised weight."""
        arrays = (self._buffers[name] for name in ARRAYS)
        dense = torch.ops.bitmill.salient_weight.default(*arrays, self.in_features, self.config.group_size or 0)
        return linear_from(dense, self.bias, torch.float32, self.training)

    @torch.no_grad()
    def validate(self) -> None:
        check_padding("weight", self.weight, self.out_features, self.in_features)
        if self.index.dim() == 3:
            check_padding("index", self.index, self.out_features, self.in_features)
        self(self.alpha.new_zeros(0, self.in_features, dtype=torch.float32))  # no rows: the checks are all that runs
