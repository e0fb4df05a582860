# SPDX-License-Identifier: Apache-2.0
"""SalientLinear: PB-LLM's partially binarised linear layer (arXiv 2310.00034).

A fixed fraction of the weights, single ones or whole columns, is salient and keeps 4, 8 or 16 bits; every other weight
is mu + alpha sgn(w - mu), with sgn(0) = +1. Training form and packed form hold the same weight bit for bit; their
outputs differ by summation order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..binarize.levels import with_slope
from ..config import SalientConfig
from ..ops import int8_fake_quant
from ..ops._groups import columns_of_groups
from ..ops._library import without_autocast
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
from ._module import LatentLinear, as_float32, require_finite, require_width
from .packed_salient import PackedSalientLinear


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
        if self.config.structure == "column":
            return salient_columns(self.weight, fraction)
        return salient_mask(self.weight, fraction, self.config.group_size or 0)

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
