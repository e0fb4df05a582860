# SPDX-License-Identifier: Apache-2.0
"""PackedSalientLinear: signs in tiles, and the salient weights beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import SalientConfig
from ..ops import tile_pack
from ..ops._checks import TILE_ROWS, ceil_div, tile_shape
from ..ops._salient_encoding import (
    ENCODINGS,
    decode,
    encode,
    encode_columns,
    encoding_of,
    entries_of,
    index_shape,
    start_length,
    value_dtype,
    value_shape,
)
from ._module import PackedModule, linear_from, require_width
from .packed_binary import check_padding

if TYPE_CHECKING:
    from .salient import QuantisedWeight

ARRAYS = ("weight", "index", "value", "start", "alpha", "mu", "value_scale", "value_zero")  # as the ops take them
_salient_linear = torch.ops.bitmill.salient_linear.default


class PackedSalientLinear(PackedModule):
    """Packed form: 1-bit weights in tiles, the salient weights beside them, one op a call.

    Buffers: weight int32 [ceil(n/16), ceil(k/32), 16]; index, value and start (None for columns) in one of the
    encodings of `bitmill.ops.salient_scatter`; alpha and mu (None without `centre`) float32 [n, groups]; value_scale
    and value_zero (None for 16 bits) float32 [n]; bias [n]. `pack` takes a list or a bitmap: the smaller,
    or for int8 activations the faster unless it is a sixteenth larger.
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
        self.code_bits = 4 if self.config.bits == 4 else 8
        groups = ceil_div(in_features, self.config.group_size) if self.config.group_size else 1
        codes = self.config.bits != 16

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        index = index_shape(encoding, out_features, in_features, entries)
        value = value_shape(encoding, out_features, entries, self.config.bits)
        self.register_buffers(
            weight=zeros(*tile_shape(out_features, in_features), dtype=torch.int32),
            index=zeros(*index, dtype=torch.uint8 if encoding == "list" else torch.int32),
            value=zeros(*value, dtype=value_dtype(encoding, self.config.bits)),
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
        from .salient import SalientLinear  # the training form imports this file

        return SalientLinear.from_linear(linear, config).pack()

    @classmethod
    @torch.no_grad()
    def from_parts(
        cls, parts: QuantisedWeight, mask: Tensor, bias: Tensor | None, config: SalientConfig
    ) -> PackedSalientLinear:
        """Pack a weight [n, k] that is quantised already, by the config's rules or from other scales of its form.

        Raises:
            ValueError: for scales or values that are not finite, or a mask [n, k] that the structure cannot hold.
        """
        (n, k), scales = parts.plus.shape, parts.scales
        value = parts.codes.to(torch.float16 if config.bits == 16 else torch.uint8)
        for number in (scales.alpha, scales.mu, scales.scale, value[mask]):
            if number is not None and not torch.isfinite(number).all():
                raise ValueError(
                    f"SalientLinear: weight must be small enough for {config.bits}-bit salient weights and float32"
                    " scales, got a scale or a value that overflows; scale the weight down"
                )
        if config.structure == "column":
            columns = mask.any(0)
            if not torch.equal(mask, columns.expand_as(mask)):
                raise ValueError(
                    'SalientLinear: mask must mark whole columns for structure "column", got parts of some'
                )
            index, value, start = encode_columns(columns, value, config.bits)
        else:
            integers = config.activations == "int8" and config.bits != 16 and not config.group_size
            index, value, start = encode(mask, value, config.bits, integers)
        encoding = encoding_of("SalientLinear", index)
        entries = entries_of(encoding, index, value, config.bits)
        packed = cls(k, n, bias is not None, config, encoding, entries, "meta")
        packed.weight = tile_pack((parts.plus & ~mask).to(torch.uint8), 1)
        packed.index, packed.value, packed.start = index, value, start
        packed.alpha, packed.mu = scales.alpha, scales.mu
        packed.value_scale, packed.value_zero = scales.scale, scales.zero
        packed.bias = None if bias is None else bias.detach().float().clone()
        return packed

    @classmethod
    @torch.no_grad()
    def joined(cls, layers: Sequence[PackedSalientLinear]) -> PackedSalientLinear | None:
        """One layer with the outputs of all, one after another; None if their arrays cannot be put together.

        That takes one input width, one config with codes of whole bytes, one encoding other than whole columns, and
        whole tiles of outputs in all but the last. The layers keep working: their arrays become parts of the new one's,
        so nothing is stored twice.
        """
        first = layers[0]
        encoding = encoding_of(cls.__name__, first.index)
        kinds = {(x.in_features, x.config, x.bias is None, encoding_of(cls.__name__, x.index)) for x in layers}
        fit = encoding != "columns" and first.config.bits != 4
        if len(kinds) > 1 or not fit or any(x.out_features % TILE_ROWS for x in layers[:-1]):
            return None
        n, lengths = sum(x.out_features for x in layers), [len(x.value) for x in layers]
        whole = cls(first.in_features, n, first.bias is not None, first.config, encoding, sum(lengths), "meta")
        for name in (*ARRAYS, "bias"):
            parts = [t for x in layers if (t := x._buffers[name]) is not None]
            if name == "start":
                ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
                whole.start = torch.cat([parts[0][:1], *(t[1:] + end for t, end in zip(parts, ends, strict=False))])
            elif parts:
                together = torch.cat(parts)
                setattr(whole, name, together)
                for x, part in zip(layers, together.split([len(t) for t in parts]), strict=True):
                    setattr(x, name, part)
        return whole.train(first.training)

    def bound(self) -> Callable[[Tensor], Tensor]:
        """`forward` with the buffers as they are now, for loops in which a module's look-ups take as long as its op."""
        tensors = self._buffers
        arguments = [*(tensors[name] for name in ARRAYS), tensors["bias"], self.config.group_size or 0]
        activations, bits = self.config.activations, self.code_bits
        return lambda x: _salient_linear(x, *arguments, activations, bits)

    def arguments(self) -> dict[str, Any]:
        encoding = encoding_of("PackedSalientLinear", self.index)
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "encoding": encoding,
            "entries": entries_of(encoding, self.index, self.value, self.config.bits),
        }

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def mask(self) -> Tensor:
        """Which weights are salient, bool [out_features, in_features]."""
        encoded = self.index, self.value, self.start
        return decode("PackedSalientLinear", encoded, self.out_features, self.in_features, self.config.bits)[0]

    def forward(self, x: Tensor) -> Tensor:
        require_width("PackedSalientLinear", x, self.in_features)
        tensors = self._buffers  # a look into _buffers is ten times faster than an attribute
        return _salient_linear(
            x,
            tensors["weight"],
            tensors["index"],
            tensors["value"],
            tensors["start"],
            tensors["alpha"],
            tensors["mu"],
            tensors["value_scale"],
            tensors["value_zero"],
            tensors["bias"],
            self.config.group_size or 0,
            self.config.activations,
            self.code_bits,
        )

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the partially binarised weight."""
        arrays = (self._buffers[name] for name in ARRAYS)
        dense = torch.ops.bitmill.salient_weight.default(
            *arrays, self.in_features, self.config.group_size or 0, self.code_bits
        )
        return linear_from(dense, self.bias, torch.float32, self.training)

    @torch.no_grad()
    def validate(self) -> None:
        check_padding("weight", self.weight, self.out_features, self.in_features)
        if self.index.dim() == 3:
            check_padding("index", self.index, self.out_features, self.in_features)
        self(self.alpha.new_zeros(0, self.in_features, dtype=torch.float32))  # no rows: the checks are all that runs
