# SPDX-License-Identifier: Apache-2.0
"""BinaryConv2d: a 2-D convolution with 1-bit filters and, unless act_bits is 32, 1-bit images: training form.

With 1-bit images it computes the exact integers and the canonical epilogue, as the packed form does, so their float32
outputs are equal bit for bit; with float images they differ by summation order. A padded pixel is 0, never -1 or +1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..binarize import (
    BinarizedWeight,
    FollowsEpoch,
    binarize_weight,
    epoch_numbers,
    learned_noise,
    method,
    quantize_activation,
    standardised,
    weight_scale,
)
from ..binarize.conv import exact_conv
from ..binarize.functions import ALPHA_FLOOR
from ..config import BinaryConfig
from ..ops import tile_pack
from ..ops._library import without_autocast
from ..ops.binary_conv import conv_columns, pad_image
from ._conv import (
    MAX_MAP,
    bordered,
    conv_activation_rule,
    conv_arguments,
    conv_config,
    geometry_of,
    map_scale,
    output_size,
    require_image,
    sample_scale,
)
from ._module import as_float32, require_finite
from .binary import NOISE_SHRINKS, elastic_step, mean_of_blocks
from .packed_conv import PackedBinaryConv2d, conv_from

__all__ = ["BinaryConv2d", "PackedBinaryConv2d"]


class BinaryConv2d(nn.Conv2d, FollowsEpoch):
    """Training form: latent filters [out_channels, in_channels / groups, height, width].

    A filter is a row of the method's weight rule. Parameters that a method adds: `shift` [in_channels], `alpha` [],
    `weight_scale` [out_channels, planes], `row_scale` and `column_scale` [2000] (XNOR-Net++'s scales of the output's
    map), FDA's noise as in BinaryLinear. Output dtype = input dtype; the arithmetic is float32, also under autocast.
    """

    config: BinaryConfig
    shift: Tensor | None
    alpha: Tensor | None
    alpha_ready: Tensor | None
    weight_scale: Tensor | None
    row_scale: Tensor | None
    column_scale: Tensor | None
    weight_inner: Tensor | None
    weight_outer: Tensor | None
    act_inner: Tensor | None
    act_outer: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        config: BinaryConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = conv_config("BinaryConv2d", config)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.config = config
        self.create_state(self.weight.device, self.weight.dtype)

    def create_state(self, device: torch.device, dtype: torch.dtype) -> None:
        """Create the parameters and buffers that the method adds to weight and bias."""
        binarizer, activation = method(self.config.method), conv_activation_rule(self.config)
        rows = self.weight.detach().flatten(1)

        def filled(value: float, *size: int) -> Tensor:
            return torch.full(size, value, device=device, dtype=dtype)

        state = {
            "shift": filled(0.0, self.in_channels) if activation.shift != "none" else None,
            "alpha": filled(1.0) if activation.scale == "learned" else None,
            "weight_scale": weight_scale(rows, self.rule).to(device, dtype) if self.rule.scale == "learned" else None,
            "row_scale": filled(1.0, MAX_MAP) if binarizer.conv.map_scales else None,
            "column_scale": filled(1.0, MAX_MAP) if binarizer.conv.map_scales else None,
        }
        for part, k in (("weight", rows.shape[1]), ("act", self.in_channels)):
            wanted = binarizer.noise and k >= NOISE_SHRINKS and (part == "weight" or self.config.act_bits != 32)
            inner = mean_of_blocks(k, device, dtype) if wanted else None
            state[f"{part}_inner"] = inner
            state[f"{part}_outer"] = None if inner is None else torch.zeros_like(inner.T)
        for name, value in state.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        ready = None if state["alpha"] is None else torch.zeros((), device=device, dtype=torch.bool)
        buffers = {"alpha_ready": ready, **epoch_numbers(binarizer.schedules, device)}
        for name, t in sorted(buffers.items(), key=lambda item: item[1] is None):  # see PackedModule.register_buffers
            self.register_buffer(name, t)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: BinaryConfig | None = None) -> BinaryConv2d:
        """A layer on the same Parameters: nothing is copied, tied weights stay tied.

        Raises:
            ValueError: if `conv` is not exactly an nn.Conv2d, whose forward this layer replaces, or for a configuration
                that a convolution cannot have.
        """
        if type(conv) is not nn.Conv2d:
            raise ValueError(
                f"BinaryConv2d: conv must be a torch.nn.Conv2d, got {type(conv).__name__}, whose forward may differ"
            )
        layer = cls(**conv_arguments(conv), config=config, device="meta")
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.create_state(conv.weight.device, conv.weight.dtype)
        return layer.train(conv.training)

    @property
    def rule(self) -> Any:
        """The rule of the filters."""
        return method(self.config.method).conv_weight_rule(self.config.weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        require_image("BinaryConv2d", x, self.in_channels)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        with without_autocast(x):
            return self._forward(x.float()).to(x.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        config, rule, binarizer = self.config, conv_activation_rule(self.config), method(self.config.method)
        weight, geometry = self.binarized_weight(), geometry_of(self)
        image = bordered(self, x)
        size = output_size(self, image)
        bias, maps = self._scaled_bias(), None
        if self.row_scale is not None and self.column_scale is not None:
            maps = map_scale(self.row_scale, self.column_scale, x.shape[0], size)
        noisy = self.noise is not None and self.training
        if config.act_bits == 32 or noisy:
            value, filters = self._noisy(image, weight) if noisy else (image, weight.value)
            out = self._convolve(value, filters.view_as(self.weight), geometry)
            out = out if maps is None else out * maps.unsqueeze(1)
            return out if bias is None else out + bias.view(-1, 1, 1)
        shifted = image if self.shift is None else image + self.shift.view(-1, 1, 1)
        alpha = None if self.alpha is None else elastic_step(self, shifted)
        rows = maps
        if binarizer.has_sample_scale:
            means = sample_scale(x if self.shift is None else x + self.shift.view(-1, 1, 1), size)
            rows = means if maps is None else means * maps
        if rule.standardise and self.training:
            image = standardised(image.flatten(1)).view_as(image)
        q = quantize_activation(
            image.movedim(1, -1), rule, 1, config.signed, config.zero, self.shift, alpha, None, self.terms
        )
        return exact_conv(
            q.value.movedim(-1, 1),
            weight.value.view_as(self.weight),
            bias,
            q.code.movedim(-1, 1),
            weight.signs.view_as(self.weight),
            weight.scale[:, 0],
            geometry,
            q.step,
            rows,
            carries_rows=not binarizer.has_sample_scale,
        )

    def binarized_weight(self) -> BinarizedWeight:
        """The filters as rows of the method's levels and scales, with their straight-through gradient."""
        return binarize_weight(self.weight.flatten(1), self.rule, None, self.weight_scale, self.tau, self.terms)

    def _scaled_bias(self) -> Tensor | None:
        bias = as_float32(self.bias)
        if bias is None or self.weight_scale is None or not method(self.config.method).conv.scales_bias:
            return bias
        return bias * self.weight_scale.float()[:, 0]

    def _convolve(self, x: Tensor, filters: Tensor, geometry: Any) -> Tensor:
        stride, padding, dilation, groups = geometry
        return conv2d(pad_image(x, padding), filters, None, stride, 0, dilation, groups)

    def _noisy(self, x: Tensor, weight: BinarizedWeight) -> tuple[Tensor, Tensor]:
        """FDA in training: learned noise on the signs, over the channels of a pixel and over a filter."""
        assert self.noise is not None
        noise = learned_noise(self.weight.float().flatten(1), self.weight_inner, self.weight_outer)
        filters = weight.value + weight.scale * (self.noise * noise)
        if self.config.act_bits == 32:
            return x, filters
        pixels = x.movedim(1, -1)
        level = quantize_activation(pixels, conv_activation_rule(self.config), zero=self.config.zero, terms=self.terms)
        noise = learned_noise(pixels, self.act_inner, self.act_outer)
        return (level.value + self.noise * noise).movedim(-1, 1), filters

    @torch.no_grad()
    def pack(self) -> PackedBinaryConv2d:
        """The packed form. Signs and scales come from the expressions that trained.

        Raises:
            ValueError: for filters with NaN or infinity, an elastic step that no training batch has set, or filters of
                whole numbers, which are not planes of signs.
        """
        require_finite("BinaryConv2d", self.weight)
        planes, weight = self.rule.planes, self.binarized_weight()
        parts = weight.signs.unflatten(1, (max(planes, 1), -1)).unbind(1)
        zeros = [part == 0 for part in parts]
        scale = weight.scale.clone()
        for p, plane in enumerate(zeros):  # a plane of zeros only is a scale of 0; scattered zeros need a plane of bits
            empty = plane.all(1)
            scale[empty, p] = 0
            plane[empty] = False
        maps: dict[str, Any] = {}
        if self.row_scale is not None and self.column_scale is not None:
            maps = {"map_rows": _used(self.row_scale), "map_columns": _used(self.column_scale)}
        packed = PackedBinaryConv2d(
            **conv_arguments(self),
            config=self.config,
            weight_zeros=any(bool(plane.any()) for plane in zeros),
            **maps,
            device="meta",
        )
        if self.alpha is not None:
            if not self.alpha_ready:
                raise ValueError(
                    "BinaryConv2d: alpha is not set, so it cannot be packed; run one batch in training mode first"
                )
            packed.alpha = self.alpha.float().clamp_min(ALPHA_FLOOR)
            scale = packed.alpha * scale
        packed.weight = self._tiles([part > 0 for part in parts])
        packed.weight_nonzero = self._tiles([~plane for plane in zeros]) if packed.weight_zeros else None
        packed.scale = scale
        bias = self._scaled_bias()
        packed.bias = None if bias is None else bias.detach().clone()
        if packed.shift is not None and self.shift is not None:
            packed.shift = self.shift.detach().float().clone()
        if self.row_scale is not None and self.column_scale is not None:
            packed.row_scale = self.row_scale[: maps["map_rows"]].detach().float().clone()
            packed.column_scale = self.column_scale[: maps["map_columns"]].detach().float().clone()
        return packed.train(self.training)

    def _tiles(self, planes: list[Tensor]) -> Tensor:
        """One plane of tiles, or several stacked."""
        tiles = [tile_pack(conv_columns(plane.view_as(self.weight)).to(torch.uint8), 1) for plane in planes]
        return tiles[0] if len(tiles) == 1 else torch.stack(tiles)

    @torch.no_grad()
    def dequantize(self) -> nn.Conv2d:
        """An nn.Conv2d with the binarised filters; images are no longer binarised.

        Raises:
            ValueError: for learned scales of the output's map, which an nn.Conv2d does not have.
        """
        filters = self.binarized_weight().value.view_as(self.weight)
        return conv_from(self, filters, self._scaled_bias(), self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


def _used(scales: Tensor) -> int:
    """How many come before the ones that are all 1, as they start: those have no output of their own."""
    changed = (scales != 1).nonzero()
    return int(changed[-1]) + 1 if len(changed) else 0
