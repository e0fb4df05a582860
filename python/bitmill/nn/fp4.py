# SPDX-License-Identifier: Apache-2.0
"""FP4Linear: a linear layer with 4-bit floating-point weights and activations that are floats, int8 or 4 bits too.

Formats "e2m1", "e1m2" and "e3m0" have one float32 scale an output channel, amax / largest value; "nf4" and "bnb-fp4"
one for a group of columns; "mxfp4" has E2M1 codes and one E8M0 scale for 32 columns, "nvfp4" one E4M3 scale for 16 and
a float32 scale of the whole weight. Activations of 4 bits are those of ops/fp4_activations.py. Training form and packed
form hold the same weight bit for bit; their outputs differ by summation order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import FP4Config
from ..ops import (
    code_values,
    codebook4_fake_quant,
    codebook4_quantize,
    fp4_activations_fake_quant,
    fp4_cast,
    fp4_fake_quant,
    fp4_fp4_linear,
    fp4_weight,
    int8_fake_quant,
    mxfp4_fake_quant,
    mxfp4_quantize,
    nvfp4_fake_quant,
    nvfp4_global_scale,
    nvfp4_quantize,
    tile_pack,
)
from ..ops._checks import ceil_div, check_tensor, tile_shape
from ..ops._fp4_arguments import INTEGER_FORMATS
from ..ops._library import without_autocast
from ..ops.fp4 import CODEBOOKS, unpack_nibbles
from ..ops.fp4_linear import scale_values
from ..ops.fpq import fpq_bias, fpq_scale, fpq_shift, largest_shift
from ._module import LatentLinear, PackedModule, as_float32, linear_from, require_finite, require_width
from .binary import check_padding

_fp4_linear = torch.ops.bitmill.fp4_linear.default  # the op itself: a small layer costs little more than its call


def row_scale(weight: Tensor, format: str) -> Tensor:
    """The scale float32 [n, 1] that takes a row's largest magnitude to the format's; 1 for a row of zeros."""
    magnitude = weight.detach().float().abs()
    if weight.shape[1] == 0:
        return magnitude.new_ones(weight.shape[0], 1)
    scale = magnitude.amax(1, keepdim=True) / max(code_values(format))
    return torch.where(scale == 0, 1.0, scale)


class FP4Linear(LatentLinear):
    """Training form: latent weight [out_features, in_features], straight-through gradient.

    The scales follow the weight in every forward and carry no gradient. Unless activations are "float", the input is
    quantised and back first, with a straight-through gradient. A NaN or an infinity in the weight makes what shares its
    scale NaN. Output dtype = input dtype; the arithmetic is float32, also under autocast.

    With static activations (`FP4Config.STATIC`) the layer has buffers input_scale float32 [] and input_shift uint8 [k],
    which `calibrate` sets; until then input_scale is NaN, and so is the output.
    """

    config_class: ClassVar = FP4Config
    config: FP4Config
    input_scale: Tensor | None
    input_shift: Tensor | None

    def create_state(self, device: torch.device, dtype: torch.dtype) -> None:
        scale = shift = None
        if self.config.static_activations:
            scale = torch.full((), torch.nan, device=device)
            shift = torch.zeros(self.in_features, dtype=torch.uint8, device=device)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_shift", shift)

    @torch.no_grad()
    def calibrate(self, amax: Tensor) -> None:
        """Set the scale and the shifts of static activations from each input channel's largest magnitude, [k].

        The scale takes the largest channel to the format's largest value; a smaller one is shifted as far as its
        exponent bias, rounded, lies above the largest channel's, and as the format allows.
        """
        if self.input_scale is None or self.input_shift is None:
            raise ValueError(
                f"FP4Linear: activations must be one of {', '.join(FP4Config.STATIC)} to be calibrated, got"
                f" {self.config.activations!r}"
            )
        if amax.shape != (self.in_features,) or not (amax.isfinite() & (amax >= 0)).all():
            raise ValueError(
                f"FP4Linear: amax must be finite magnitudes of shape [{self.in_features}], got {list(amax.shape)}"
            )
        format = self.config.activations
        rho = fpq_bias(amax.max(), format) if amax.any() else amax.new_zeros(())
        self.input_scale.copy_(fpq_scale(rho, format))
        self.input_shift.copy_(fpq_shift(fpq_bias(amax, format), rho, format))

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
        activations = self.config.activations
        with without_autocast(x):
            values = x.float()
            if activations == "int8":
                values = int8_fake_quant(values)
            elif activations != "float":
                scale, shift = as_float32(self.input_scale), self.input_shift
                values = fp4_activations_fake_quant(values, activations, scale, shift, self.config.scale_rule)
            return nn.functional.linear(values, self.quantised_weight(), as_float32(self.bias)).to(x.dtype)

    @torch.no_grad()
    def pack(self) -> PackedFP4Linear:
        """The packed form, from the expressions that trained.

        Raises:
            ValueError: for a weight with NaN or infinity, one that is too large for its block scales, or static
                activations without a scale.
        """
        require_finite("FP4Linear", self.weight)
        if self.input_scale is not None and not self.input_scale.isfinite():
            raise ValueError(
                f"FP4Linear: input_scale must be finite to be packed, got {self.input_scale.item()}; call calibrate, or"
                " recipes.llm_fp4.calibrate_ on the model, first"
            )
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
        state = (global_scale, as_float32(self.input_scale), self.input_shift)
        return PackedFP4Linear.from_parts(codes, scale, self.bias, config, *state).train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear with the quantised weight."""
        return self.to_linear(self.quantised_weight())


def _kernel_of(config: FP4Config) -> str:
    return "fp4_fp4_linear" if config.activations in INTEGER_FORMATS else "fp4_linear"


class PackedFP4Linear(PackedModule):
    """Packed form: 4-bit codes in tiles, one op a call.

    Buffers: weight int32 [ceil(n/16), ceil(k/8), 16]; scale [n, groups], float32, or uint8 for "mxfp4" (E8M0) and
    "nvfp4" (E4M3); global_scale float32 [] for "nvfp4"; input_scale float32 [] and input_shift uint8 [k] for static
    activations; bias float32 [n].
    """

    config: FP4Config
    weight: Tensor
    scale: Tensor
    global_scale: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
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
        self.kernel = _kernel_of(self.config)
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
            input_scale=zeros() if self.config.static_activations else None,
            input_shift=zeros(in_features, dtype=torch.uint8) if self.config.static_activations else None,
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
        input_scale: Tensor | None = None,
        input_shift: Tensor | None = None,
    ) -> PackedFP4Linear:
        """Pack codes uint8 [n, k] that exist already, with their scales; `validate` checks them."""
        n, k = codes.shape
        packed = cls(k, n, bias is not None, config, device="meta")
        packed.weight = tile_pack(codes, 4)
        packed.scale, packed.global_scale = scale, global_scale
        if input_scale is not None and input_shift is not None:
            packed.input_scale, packed.input_shift = input_scale.clone(), input_shift.clone()
        packed.bias = None if bias is None else bias.detach().float().clone()
        return packed

    def set_activations(self, activations: str) -> None:
        super().set_activations(activations)
        self.kernel = _kernel_of(self.config)
        if not self.config.static_activations:
            self.input_scale = self.input_shift = None

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
        activations = self.config.activations
        if self.kernel == "fp4_fp4_linear":
            settings = (activations, self.input_scale, self.input_shift, self.config.scale_rule)
            return fp4_fp4_linear(x, *self._weight(), *settings)
        weight, scale, bias, format, group_size, global_scale = self._weight()
        if activations != "e3m0":
            return _fp4_linear(x, weight, scale, bias, format, group_size, None, activations, global_scale)
        # Its integers are too large for int8.
        values = fp4_activations_fake_quant(x.float(), activations, self.input_scale, self.input_shift)
        return _fp4_linear(values, weight, scale, bias, format, group_size, None, "float", global_scale).to(x.dtype)

    def _weight(self) -> tuple[Tensor, Tensor, Tensor | None, str, int, Tensor | None]:
        own: dict[str, Any] = self._buffers  # ten times faster than attributes
        return own["weight"], own["scale"], own["bias"], self._format, self.config.group_size, own["global_scale"]

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the quantised weight."""
        weight, scale, _, format, group_size, global_scale = self._weight()
        dense = fp4_weight(weight, scale, *self.weight_shape(), format, group_size, global_scale=global_scale)
        return linear_from(dense, self.bias, torch.float32, self.training)

    @torch.no_grad()
    def validate(self) -> None:
        check_padding("weight", self.weight, self.out_features, 4 * self.in_features)
        self(torch.zeros(0, self.in_features, device=self.weight.device))  # no rows: the checks are all that runs
        if not scale_values(self.scale, self.global_scale).isfinite().all():
            raise ValueError("scale: every scale must be finite, got NaN or infinity; the layer is corrupt")
        if self.input_scale is None or self.input_shift is None:
            return
        name = type(self).__name__
        check_tensor(name, "input_scale", self.input_scale, torch.float32, [], self.weight)
        check_tensor(name, "input_shift", self.input_shift, torch.uint8, [self.in_features], self.weight)
        if not 0 < self.input_scale.item() < torch.inf:
            raise ValueError(
                f"input_scale: it must be positive and finite, got {self.input_scale.item()}; the layer is corrupt"
            )
        most = largest_shift(self.config.activations)
        if (self.input_shift > most).any():
            raise ValueError(f"input_shift: every shift must be at most {most}, got more; the layer is corrupt")
