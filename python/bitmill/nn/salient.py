# SPDX-License-Identifier: Apache-2.0
"""SalientLinear: PB-LLM's partially binarised linear layer (arXiv 2310.00034).

A fixed fraction of the weights, single ones or whole columns, is salient and keeps 4, 8 or 16 bits; every other weight
is mu + alpha sgn(w - mu), with sgn(0) = +1. Training form and packed form hold the same weight bit for bit; their
outputs differ by summation order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..binarize.levels import with_slope
from ..config import SalientConfig
from ..ops import int8_fake_quant, tile_pack
from ..ops._checks import TILE_ROWS, ceil_div, tile_shape
from ..ops._groups import columns_of_groups
from ..ops._library import without_autocast
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
from ..ops._surrogates import surrogate_slope
from ..ops.salient_scatter import (
    binary_statistics,
    binary_value,
    high_bit_codes,
    high_bit_scales,
    rounded_to_float16,
    salient_columns,
    salient_mask,
    salient_quantiles,
    salient_value,
)
from ._module import LatentLinear, PackedModule, as_float32, linear_from, require_finite, require_width
from .binary import check_padding

ARRAYS = ("weight", "index", "value", "start", "alpha", "mu", "value_scale", "value_zero")  # as the ops take them
_salient_linear = torch.ops.bitmill.salient_linear.default


class Scales(NamedTuple):
    """What a weight [n, k] is quantised with.

    alpha and mu (None: 0) float32 [n, groups]: of the binarised form. scale and zero float32 [n]: of the salient form's
    codes, or None for a float16 instead of a code.
    """

    alpha: Tensor
    mu: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    bits: int
    group_size: int

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, config: SalientConfig) -> Scales:
        """The config's rules applied to a weight [n, k] and the mask of its salient entries."""
        scale, zero = (None, None) if config.bits == 16 else high_bit_scales(weight.detach(), config.bits)
        return cls.around(weight, mask, scale, zero, config)

    @classmethod
    def around(
        cls, weight: Tensor, mask: Tensor, scale: Tensor | None, zero: Tensor | None, config: SalientConfig
    ) -> Scales:
        """Those of the binarised form from the weight and its mask, those of the codes as they are given."""
        w, group_size, n = weight.detach().float(), config.group_size or 0, weight.shape[0]
        if config.granularity == "layer":
            w, mask = w.reshape(1, -1), mask.reshape(1, -1)
        alpha, mu = binary_statistics(w, mask, group_size, config.scale, config.centre)
        if config.granularity == "layer":
            alpha, mu = alpha.repeat(n, 1), None if mu is None else mu.repeat(n, 1)
        return cls(alpha, mu, scale, zero, config.bits, group_size)

    def of_group(self, column: int) -> Scales:
        """For the columns of one group alone: of the group that has this column."""
        if not self.group_size:
            return self
        group = slice(column // self.group_size, column // self.group_size + 1)
        mu = None if self.mu is None else self.mu[:, group]
        return self._replace(alpha=self.alpha[:, group], mu=mu, group_size=0)

    def centred(self, weight: Tensor) -> Tensor:
        """float32 [n, k], detached: w - mu."""
        w = weight.detach().float()
        return w if self.mu is None else w - columns_of_groups(self.mu, w.shape[1], self.group_size)

    def slope(self, weight: Tensor, surrogate: str) -> Tensor:
        """The derivative that stands for that of the binarised form, alpha times the surrogate's window.

        float32 [n, k], or [n, 1] where a row has one number.
        """
        alpha = columns_of_groups(self.alpha, weight.shape[1], self.group_size)
        return alpha if surrogate == "identity" else alpha * surrogate_slope(self.centred(weight), surrogate)

    def quantise(self, weight: Tensor) -> QuantisedWeight:
        """A detached weight [n, k] in both forms."""
        w, centred = weight.detach().float(), self.centred(weight)
        if self.scale is None or self.zero is None:
            return QuantisedWeight(centred >= 0, rounded_to_float16(w), self)
        return QuantisedWeight(centred >= 0, high_bit_codes(w, self.scale, self.zero, self.bits), self)


class QuantisedWeight(NamedTuple):
    """A weight [n, k] in both forms at once; the mask says which one counts.

    plus bool [n, k]: the sign of the binarised form. codes [n, k]: the salient form, uint8, or float32 that a float16
    holds exactly.
    """

    plus: Tensor
    codes: Tensor
    scales: Scales

    def binary(self) -> Tensor:
        return binary_value(self.plus, self.scales.alpha, self.scales.mu, self.scales.group_size)

    def salient(self) -> Tensor:
        if self.scales.scale is None or self.scales.zero is None:
            return self.codes
        return salient_value(self.codes, self.scales.scale, self.scales.zero)

    def value(self, mask: Tensor) -> Tensor:
        """float32 [n, k]: the salient form where `mask`, the binarised one elsewhere."""
        return torch.where(mask, self.salient(), self.binary())


class SalientLinear(LatentLinear):
    """Training form: latent weight [out_features, in_features] and the mask of its salient entries.

    What is salient, and the scale and zero of its codes, is measured once, on the weight that the layer is created
    with: `mask` bool [out_features, in_features], `value_scale` and `value_zero` float32 [out_features] (None for 16
    bits) are persistent buffers. Salient weights are frozen: their gradient is exactly 0 (decoupled weight decay would
    move them all the same). Binarised weights have the gradient of alpha times the config's surrogate; alpha and mu are
    the best ones for the weight in every forward, in training and in eval mode, and carry no gradient. With
    activations="int8" every row of x is rounded as the packed form rounds it, straight-through. Output dtype = input
    dtype; the arithmetic is float32, also under autocast.

    `SalientConfig(metric="quantile", granularity="layer", centre=False)` is the published training code, except that
    its 8-bit routine, which turns negative weights positive, is not copied, and that sgn(0) is +1, not 0.
    """

    config_class: ClassVar = SalientConfig
    config: SalientConfig
    mask: Tensor
    value_scale: Tensor | None
    value_zero: Tensor | None

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Linear, config: SalientConfig | None = None, mask: Tensor | None = None
    ) -> SalientLinear:
        """A layer on the same Parameters: nothing is copied, tied weights stay tied.

        Args:
            mask: which entries are salient, bool [out_features, in_features]; None to measure it by config.metric,
                which takes a metric of the weight alone.
        Raises:
            ValueError: if `linear` is not exactly an nn.Linear, or for a mask of another shape or dtype, or none where
                the metric needs one.
        """
        return super().from_linear(linear, config, mask=mask)

    def create_state(self, device: torch.device, dtype: torch.dtype, mask: Tensor | None = None) -> None:
        self.register_buffer("mask", self._measured_mask() if mask is None else self._own(mask))
        scales = (None, None) if self.config.bits == 16 else high_bit_scales(self.weight.detach(), self.config.bits)
        for name, t in zip(("value_scale", "value_zero"), scales, strict=True):
            self.register_buffer(name, t)

    def _measured_mask(self) -> Tensor:
        metric, fraction = self.config.metric, self.config.fraction
        if metric == "quantile":
            return salient_quantiles(self.weight, fraction)
        if metric != "magnitude" and not self.weight.is_meta:
            raise ValueError(
                f"SalientLinear: config.metric must be 'magnitude' or 'quantile' where no activations are seen, got"
                f" {metric!r}; give from_linear a mask, or use bitmill.recipes.pb_llm or pb_llm_qat"
            )
        return (salient_columns if self.config.structure == "column" else salient_mask)(self.weight, fraction)

    def _own(self, mask: Tensor) -> Tensor:
        if mask.shape != self.weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"SalientLinear: mask must be bool {list(self.weight.shape)}, got"
                f" {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            )
        return mask.to(self.weight.device, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SalientLinear:
        """The scales of the codes stay float32: with others the frozen weights would be others."""
        kept = {name: t for name in ("value_scale", "value_zero") if (t := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, t in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != t.dtype:
                self._buffers[name] = t.to(moved.device)
        return self

    def scales(self) -> Scales:
        """What the weight is quantised with now."""
        return Scales.around(self.weight, self.mask, self.value_scale, self.value_zero, self.config)

    def quantised_weight(self) -> Tensor:
        """What the layer multiplies with, float32 [out_features, in_features], with its straight-through gradient."""
        scales = self.scales()
        parts = scales.quantise(self.weight)
        slope = scales.slope(self.weight, self.config.surrogate)
        return torch.where(self.mask, parts.salient(), with_slope(self.weight.float(), parts.binary(), slope))

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
        parts = self.scales().quantise(self.weight)
        return PackedSalientLinear.from_parts(parts, self.mask, self.bias, self.config).train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear with the partially binarised weight."""
        return self.to_linear(self.quantised_weight())


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
            *(tensors[name] for name in ARRAYS),
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
