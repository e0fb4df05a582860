# SPDX-License-Identifier: Apache-2.0
"""BinaryLinear: a linear layer with weights and, unless act_bits is 32, activations of 1 bit or a few: training form.

With quantised activations it computes the exact integer product and the canonical epilogue, as the packed form does, so
their float32 outputs are equal bit for bit; with float activations they differ by summation order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..binarize import (
    BinarizedWeight,
    FollowsEpoch,
    binarize_weight,
    elastic_alpha,
    epoch_numbers,
    exact_linear,
    learned_noise,
    method,
    quantize_activation,
    quantized_linear,
    standardised,
    weight_linear,
    weight_scale,
)
from ..binarize.functions import ALPHA_FLOOR
from ..config import BinaryConfig
from ..ops import int8_fake_quant, int8_quantize, tile_pack
from ..ops._groups import columns_of_groups
from ..ops._library import without_autocast
from ..ops.bitpack import mean_by_halves
from ._module import LatentLinear, agreed, as_float32, require_finite, require_width
from .packed_binary import PackedBinaryLinear, activation_rule, activation_state, check_padding, thresholds_of

__all__ = ["BinaryLinear", "PackedBinaryLinear", "activation_rule", "check_padding"]

NOISE_SHRINKS = 64  # columns a hidden unit of FDA's noise


class BinaryLinear(LatentLinear, FollowsEpoch):
    """Training form: latent weight [out_features, in_features], straight-through gradients of the named method.

    Parameters that a method adds: `shift` [in_features] (BiT's move), `alpha` [] (an elastic step; set from the first
    training batch), `weight_scale` [out_features, planes] (learned scales), `widths` [2^b - 1], `start`, `in_scale`,
    `out_scale` [] (N2UQ's thresholds), `weight_inner`, `weight_outer`, `act_inner`, `act_outer` (FDA's noise, in
    training only). Buffers: `alpha_ready`, and the numbers that follow the epoch (`bitmill.binarize.set_epoch`). Output
    dtype = input dtype; the arithmetic is float32, also under autocast.
    """

    config_class: ClassVar = BinaryConfig
    config: BinaryConfig
    shift: Tensor | None
    alpha: Tensor | None
    alpha_ready: Tensor | None
    weight_scale: Tensor | None
    weight_inner: Tensor | None
    weight_outer: Tensor | None
    act_inner: Tensor | None
    act_outer: Tensor | None

    def create_state(self, device: torch.device, dtype: torch.dtype) -> None:
        binarizer, rule, k = method(self.config.method), self.config.weight_rule, self.in_features
        state = activation_state(self.config, k, device, dtype)
        ready = None if state["alpha"] is None else torch.zeros((), device=device, dtype=torch.bool)
        state["weight_scale"] = None
        if rule.scale == "learned":
            state["weight_scale"] = weight_scale(self.weight.detach(), rule).to(device=device, dtype=dtype)
        for part in ("weight", "act"):
            wanted = binarizer.noise and k >= NOISE_SHRINKS and (part == "weight" or self.config.act_bits != 32)
            inner = mean_of_blocks(k, device, dtype) if wanted else None
            state[f"{part}_inner"] = inner
            state[f"{part}_outer"] = None if inner is None else torch.zeros_like(inner.T)
        for name, value in state.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        buffers = {"alpha_ready": ready, **epoch_numbers(binarizer.schedules, device)}
        for name, t in sorted(buffers.items(), key=lambda item: item[1] is None):  # see PackedModule.register_buffers
            self.register_buffer(name, t)

    def forward(self, x: Tensor) -> Tensor:
        require_width("BinaryLinear", x, self.in_features)
        with without_autocast(x):
            return self._forward(x.float()).to(x.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        config, rule = self.config, activation_rule(self.config)
        weight, bias = self.binarized_weight(), as_float32(self.bias)
        if self.noise is not None and self.training:
            return self._noisy(x, weight, bias)
        if config.act_bits == 32 and config.activations == "int8":
            levels, scale = int8_quantize(x.detach())
            value, rows = int8_fake_quant(x), scale.unsqueeze(-1)
            return exact_linear(value, weight, bias, rows=rows, group_size=config.group_size, level=levels)
        if config.act_bits == 32:
            return weight_linear(x, weight, bias, config.group_size)
        if rule.standardise and self.training:
            x = standardised(x)
        shift = self.shift
        if shift is not None and rule.shift == "added":
            x, shift = x + shift, None
        if rule.only_signs and self.terms is None and weight.is_plane:
            mean = mean_by_halves(x.detach().abs()).unsqueeze(-1) if rule.scale == "row_mean" else None
            return exact_linear(x, weight, bias, None, mean, config.group_size, None, rule.surrogate, config.zero)
        alpha = None if self.alpha is None else elastic_step(self, x)
        q = quantize_activation(
            x, rule, config.act_bits, config.signed, config.zero, shift, alpha, thresholds_of(self), self.terms
        )
        return quantized_linear(q, weight, bias, config.group_size)

    def binarized_weight(self) -> BinarizedWeight:
        """The weight as the method's levels and scales, with its straight-through gradient."""
        rule, group_size = self.config.weight_rule, self.config.group_size
        return binarize_weight(self.weight, rule, group_size, self.weight_scale, self.tau, self.terms)

    def _noisy(self, x: Tensor, weight: BinarizedWeight, bias: Tensor | None) -> Tensor:
        """FDA in training: learned noise on the signs, times a number that falls to 0 with the epochs."""
        assert self.noise is not None
        columns = columns_of_groups(weight.scale, self.in_features, self.config.group_size)
        noise = learned_noise(self.weight.float(), self.weight_inner, self.weight_outer)
        value = weight.value + columns * (self.noise * noise)
        if self.config.act_bits != 32:
            level = quantize_activation(x, activation_rule(self.config), zero=self.config.zero, terms=self.terms).value
            x = level + self.noise * learned_noise(x, self.act_inner, self.act_outer)
        return nn.functional.linear(x, value, bias)

    @torch.no_grad()
    def pack(self) -> PackedBinaryLinear:
        """The packed form. Signs and scales come from the expressions that trained.

        Raises:
            ValueError: for a weight with NaN or infinity, an elastic step that no training batch has set, or weights of
                whole numbers, which are not planes of signs.
        """
        config, planes = self.config, self.config.weight_rule.planes
        if not planes:
            binarizer = method(config.method)
            packable = " or ".join(str(b) for b in binarizer.weight_bits if binarizer.weight_rule(b).planes)
            raise ValueError(
                f"BinaryLinear: weight_bits of method {config.method!r} must be {packable} to be packed,"
                f" got {config.weight_bits}; keep the training form, or train with fewer bits"
            )
        require_finite("BinaryLinear", self.weight)
        weight = self.binarized_weight()
        signs, scale = weight.signs, weight.scale.clone()
        zeros = signs == 0
        if zeros.any():  # a group or plane of zeros only is a scale of 0; scattered zeros need their own plane
            width = config.group_size or max(self.in_features, 1)
            empty = torch.stack([part.all(1) for part in zeros.split(width, 1)], 1)
            scale[empty] = 0
            zeros = zeros & ~columns_of_groups(empty, signs.shape[1], width)
        packed = PackedBinaryLinear(
            self.in_features, self.out_features, self.bias is not None, config, bool(zeros.any()), device="meta"
        )
        if self.alpha is not None:
            if not self.alpha_ready:
                raise ValueError(
                    "BinaryLinear: alpha is not set, so it cannot be packed; run one batch in training mode first"
                )
            packed.alpha = self.alpha.float().clamp_min(ALPHA_FLOOR)
            scale = packed.alpha * scale if packed.folds_alpha else scale
        packed.weight = self._tiles(signs > 0)
        packed.weight_nonzero = self._tiles(~zeros) if packed.weight_zeros else None
        packed.scale = scale
        packed.bias = None if self.bias is None else self.bias.detach().float().clone()
        for name in ("shift", "widths", "start", "in_scale", "out_scale"):
            if getattr(packed, name) is not None:
                setattr(packed, name, getattr(self, name).detach().float().clone())
        return packed.train(self.training)

    def _tiles(self, bits: Tensor) -> Tensor:
        """One plane of tiles, or several stacked."""
        planes = self.config.weight_rule.planes
        tiles = [tile_pack(plane.to(torch.uint8), 1) for plane in bits.unflatten(1, (planes, -1)).unbind(1)]
        return tiles[0] if planes == 1 else torch.stack(tiles)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear with the binarised weight; activations are no longer binarised."""
        return self.to_linear(self.binarized_weight().value)


def elastic_step(layer: Any, x: Tensor) -> Tensor:
    """The layer's alpha; before the first training batch the value that the first-use rule gives for this input."""
    alpha, ready = layer.alpha, layer.alpha_ready
    if x.numel() == 0:  # an empty batch has no mean
        return alpha.float()
    first = elastic_alpha(x.detach(), layer.config.act_bits, layer.config.signed)
    if layer.training:
        first = agreed(first, ready)
    value = torch.where(ready, alpha.detach().float(), first)
    if not layer.training:
        return value
    with torch.no_grad():
        alpha.copy_(value)
        ready.fill_(True)
    return alpha.float()


def mean_of_blocks(k: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[k // 64, k]: row r answers the mean of the r-th 64 columns. A start that needs no random numbers."""
    rows = k // NOISE_SHRINKS
    block = torch.arange(k, device=device) // NOISE_SHRINKS
    return (block == torch.arange(rows, device=device).unsqueeze(1)).to(dtype) / NOISE_SHRINKS
