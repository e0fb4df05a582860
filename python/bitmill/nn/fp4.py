# SPDX-License-Identifier: Apache-2.0
"""FP4Linear: a linear layer with 4-bit floating-point weights and float or int8 activations.

Formats "e2m1", "e1m2" and "e3m0" have one float32 scale an output channel, amax / largest value; "nf4" and "bnb-fp4"
one for a group of columns; "mxfp4" has E2M1 codes and one E8M0 scale for 32 columns, "nvfp4" one E4M3 scale for 16 and
a float32 scale of the whole weight. Training form and packed form hold the same weight bit for bit; their outputs
differ by summation order.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import FP4Config
from ..ops import (
    code_values,
    codebook4_fake_quant,
    codebook4_quantize,
    fp4_cast,
    fp4_fake_quant,
    fp4_linear,
    fp4_weight,
    int8_fake_quant,
    mxfp4_fake_quant,
    mxfp4_quantize,
    nvfp4_fake_quant,
    nvfp4_global_scale,
    nvfp4_quantize,
    tile_pack,
)
from ..ops._checks import ceil_div, tile_shape
from ..ops._library import without_autocast
from ..ops.fp4 import CODEBOOKS, unpack_nibbles
from ..ops.fp4_linear import scale_values
from ._module import LatentLinear, PackedModule, as_float32, linear_from, require_finite, require_width
from .binary import check_padding


def row_scale(weight: Tensor, format: str) -> Tensor:
    """The scale float32 [n, 1] that takes a row's largest magnitude to the format's; 1 for a row of zeros."""
    magnitude = weight.detach().float().abs()
    if weight.shape[1] == 0:
        return magnitude.new_ones(weight.shape[0], 1)
    scale = magnitude.amax(1, keepdim=True) / max(code_values(format))
    return torch.where(scale == 0, 1.0, scale)


class FP4Linear(LatentLinear):
    """Training form: latent weight [out_features, in_features], straight-through gradient.

    The scales follow the weight in every forward and carry no gradient. With activations="int8" every row of the input
    is rounded to int8 and back first, with the straight-through identity gradient. A NaN or an infinity in the weight
    makes what shares its scale NaN. Output dtype = input dtype; the arithmetic is float32, also under autocast.
    """

    config_class: ClassVar = FP4Config
    config: FP4Config

    def quantised_weight(self) -> Tensor:
        """What the layer multiplies with, float32 [out_features, in_features], with its straight-through gradient."""
        weight, format = self.weight.float(), self.config.format
        if format == "mxfp4":
            return mxfp4_fake_quant(weight, self.config.scale_rule)
        if format == "nvfp4":
            return nvfp4_fake_quant(weight, nvfp4_global_scale(weight))
        if format in CODEBOOKS:
            return codebook4_fake_quant(weight, format, self.config.group_size)
        return fp4_fake_quant(weight, format, row_scale(weight, format))

    def forward(self, x: Tensor) -> Tensor:
        require_width("FP4Linear", x, self.in_features)
        with without_autocast(x):
            values = x.float()
            if self.config.activations == "int8":
                values = int8_fake_quant(values)
            return nn.functional.linear(values, self.quantised_weight(), as_float32(self.bias)).to(x.dtype)

    @torch.no_grad()
    def pack(self) -> PackedFP4Linear:
        """The packed form, from the expressions that trained.

        Raises:
            ValueError: for a weight with NaN or infinity, or one that is too large for its block scales.
        """
        require_finite("FP4Linear", self.weight)
        weight, config = self.weight.float(), self.config
        global_scale = None
        if config.format == "mxfp4":
            codes, scale = mxfp4_quantize(weight, config.scale_rule)
            if (scale == 255).any():  # "even" rounds the largest magnitudes of float32 up to infinity
                raise ValueError(
                    f"FP4Linear: weight must be below 2^127 for scale_rule {config.scale_rule!r}, got magnitudes up to"
                    f" {weight.abs().max().item():.3g}; scale the weight down"
                )
        elif config.format == "nvfp4":
            global_scale = nvfp4_global_scale(weight)
            codes, scale = nvfp4_quantize(weight, global_scale)
        elif config.format in CODEBOOKS:
            codes, scale = codebook4_quantize(weight, config.format, config.group_size)
        else:
            scale = row_scale(weight, config.format)
            codes = fp4_cast(weight / scale, config.format)
        codes = unpack_nibbles(codes, self.in_features)
        return PackedFP4Linear.from_parts(codes, scale, self.bias, config, global_scale).train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear with the quantised weight."""
        return self.to_linear(self.quantised_weight())


class PackedFP4Linear(PackedModule):
    """Packed form: 4-bit codes in tiles, one op a call.

    Buffers: weight int32 [ceil(n/16), ceil(k/8), 16]; scale [n, groups], float32, or uint8 for "mxfp4" (E8M0) and
    "nvfp4" (E4M3); global_scale float32 [] for "nvfp4"; bias float32 [n].
    """

    config: FP4Config
    kernel = "fp4_linear"
    weight: Tensor
    scale: Tensor
    global_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: FP4Config | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else FP4Config()
        self.in_features, self.out_features = in_features, out_features
        blocks = self.config.format in ("mxfp4", "nvfp4")
        self._format = "e2m1" if blocks else self.config.format

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        group_size = self.config.group_size
        groups = ceil_div(in_features, group_size) if group_size else 1
        self.register_buffers(
            weight=zeros(*tile_shape(out_features, in_features, 4), dtype=torch.int32),
            scale=zeros(out_features, groups, dtype=torch.uint8 if blocks else torch.float32),
            global_scale=zeros() if self.config.format == "nvfp4" else None,
            bias=zeros(out_features) if bias else None,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: FP4Config | None = None) -> PackedFP4Linear:
        """Cast and pack an nn.Linear."""
        return FP4Linear.from_linear(linear, config).pack()

    @classmethod
    @torch.no_grad()
    def from_parts(
        cls,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        config: FP4Config,
        global_scale: Tensor | None = None,
    ) -> PackedFP4Linear:
        """Pack codes uint8 [n, k] that exist already, with their scales; `validate` checks them."""
        n, k = codes.shape
        packed = cls(k, n, bias is not None, config, device="meta")
        packed.weight = tile_pack(codes, 4)
        packed.scale, packed.global_scale = scale, global_scale
        packed.bias = None if bias is None else bias.detach().float().clone()
        return packed

    def arguments(self) -> dict[str, int | bool]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        require_width("PackedFP4Linear", x, self.in_features)
        config = self.config
        return torch.ops.bitmill.fp4_linear.default(
            x,
            self.weight,
            self.scale,
            self.bias,
            self._format,
            config.group_size,
            None,
            config.activations,
            self.global_scale,
        )

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the quantised weight."""
        n, k = self.weight_shape()
        dense = fp4_weight(
            self.weight,
            self.scale,
            n,
            k,
            self._format,
            self.config.group_size,
            global_scale=self.global_scale,
        )
        return linear_from(dense, self.bias, torch.float32, self.training)

    @torch.no_grad()
    def validate(self) -> None:
        check_padding("weight", self.weight, self.out_features, 4 * self.in_features)
        # No rows: the checks are all that runs.
        fp4_linear(
            torch.zeros(0, self.in_features, device=self.weight.device),
            self.weight,
            self.scale,
            self.bias,
            self._format,
            self.config.group_size,
            activations=self.config.activations,
            global_scale=self.global_scale,
        )
        if not scale_values(self.scale, self.global_scale).isfinite().all():
            raise ValueError("scale: every scale must be finite, got NaN or infinity; the layer is corrupt")
