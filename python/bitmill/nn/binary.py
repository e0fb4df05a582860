# SPDX-License-Identifier: Apache-2.0
"""BinaryLinear: a linear layer with 1-bit weights and, unless act_bits is 32, 1-bit activations.

Training form and packed form. With 1-bit and int8 activations both compute the exact integer product and the canonical
epilogue, so their float32 outputs are equal bit for bit; with float activations they differ by summation order.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..binarize import ActivationRule, binarize_weight, elastic, elastic_alpha, exact_linear, method, sign, weight_scale
from ..binarize.functions import ALPHA_FLOOR
from ..config import BinaryConfig
from ..ops import int8_fake_quant, int8_quantize, tile_pack
from ..ops._checks import TILE_ROWS, ceil_div, tile_shape
from ..ops._groups import columns_of_groups
from ..ops._library import without_autocast
from ..ops.binary_matmul import unpack_signs
from ..ops.bitpack import mean_by_halves
from ._module import LatentLinear, PackedModule, as_float32, linear_from, require_finite, require_width

_binary_linear = torch.ops.bitmill.binary_linear.default
_binary_weight_linear = torch.ops.bitmill.binary_weight_linear.default


def activation_rule(config: BinaryConfig) -> ActivationRule:
    """The activation's rule, or the empty rule if activations stay floats."""
    return method(config.method).activation if config.act_bits != 32 else ActivationRule()


class BinaryLinear(LatentLinear):
    """Training form: latent weight [out_features, in_features], straight-through gradients of the named method.

    Parameters that a method adds: `shift` [in_features] (BiT's move), `alpha` [] (BiT's elastic step; set from the
    first training batch), `weight_scale` [out_features, 1] (BiViT's parameterized scales). Output dtype = input dtype;
    the arithmetic is float32, also under autocast.
    """

    config_class: ClassVar = BinaryConfig
    config: BinaryConfig
    shift: Tensor | None
    alpha: Tensor | None
    alpha_ready: Tensor | None
    weight_scale: Tensor | None

    def create_state(self, device: torch.device, dtype: torch.dtype) -> None:
        activation, rule = activation_rule(self.config), method(self.config.method).weight
        shift = alpha = ready = scale = None
        if activation.shift != "none":
            shift = nn.Parameter(torch.zeros(self.in_features, device=device, dtype=dtype))
        if activation.scale == "learned":
            alpha = nn.Parameter(torch.ones((), device=device, dtype=dtype))
            ready = torch.zeros((), device=device, dtype=torch.bool)
        if rule.scale == "learned":
            scale = nn.Parameter(weight_scale(self.weight.detach(), rule).to(device=device, dtype=dtype))
        self.register_parameter("shift", shift)
        self.register_parameter("alpha", alpha)
        self.register_buffer("alpha_ready", ready)
        self.register_parameter("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        require_width("BinaryLinear", x, self.in_features)
        with without_autocast(x):
            return self._forward(x.float()).to(x.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        config, activation = self.config, activation_rule(self.config)
        weight = binarize_weight(self.weight, method(config.method).weight, config.group_size, self.weight_scale)
        bias = as_float32(self.bias)
        if config.act_bits == 32 and config.activations == "int8":
            q, scale = int8_quantize(x.detach())
            value, rows = int8_fake_quant(x), scale.unsqueeze(-1)
            return exact_linear(value, weight, bias, rows=rows, group_size=config.group_size, level=q)
        if config.act_bits == 32:
            return nn.functional.linear(x, weight.value, bias)
        unshifted, group_size = x, config.group_size
        if self.shift is not None:
            x = x + self.shift
        if activation.scale == "learned":
            alpha = self._step(x)
            value = elastic(x, alpha, config.act_bits, config.signed, config.zero)
            if config.act_bits > 1:
                return nn.functional.linear(value, weight.value, bias)
            return exact_linear(value, weight, bias, step=alpha.clamp_min(ALPHA_FLOOR), group_size=group_size)
        if activation.shift == "gradient":
            level = sign(x, activation.surrogate, config.zero)
            level = level + (sign(unshifted, zero=config.zero) - level).detach()
            return exact_linear(level, weight, bias, group_size=group_size)
        mean = mean_by_halves(x.detach().abs()).unsqueeze(-1) if activation.scale == "row_mean" else None
        return exact_linear(
            x, weight, bias, rows=mean, group_size=group_size, surrogate=activation.surrogate, zero=config.zero
        )

    def _step(self, x: Tensor) -> Tensor:
        """alpha; before the first training batch the value that the first-use rule gives for this input."""
        alpha, ready = self.alpha, self.alpha_ready
        assert alpha is not None and ready is not None
        if x.numel() == 0:  # an empty batch has no mean
            return alpha.float()
        first = elastic_alpha(x.detach(), self.config.act_bits, self.config.signed)
        value = torch.where(ready, alpha.detach().float(), first)
        if not self.training:
            return value
        with torch.no_grad():
            alpha.copy_(value)
            ready.fill_(True)
        return alpha.float()

    @torch.no_grad()
    def pack(self) -> PackedBinaryLinear:
        """The packed form. Sign and scale come from the expressions that trained.

        Raises:
            ValueError: for a weight with NaN or infinity, or an elastic step that no training batch has set.
        """
        config, rule = self.config, method(self.config.method).weight
        require_finite("BinaryLinear", self.weight)
        weight = binarize_weight(self.weight, rule, config.group_size, self.weight_scale)
        signs, scale = weight.signs, weight.scale.clone()
        zeros = signs == 0
        if zeros.any():  # a group of zeros only is a scale of 0; scattered zeros need their own plane
            width = config.group_size or max(self.in_features, 1)
            empty = torch.stack([part.all(1) for part in zeros.split(width, 1)], 1)
            scale[empty] = 0
            zeros = zeros & ~columns_of_groups(empty, self.in_features, width)
        packed = PackedBinaryLinear(
            self.in_features, self.out_features, self.bias is not None, config, bool(zeros.any()), device="meta"
        )
        if self.alpha is not None:
            if not self.alpha_ready:
                raise ValueError(
                    "BinaryLinear: alpha is not set, so it cannot be packed; run one batch in training mode first"
                )
            packed.alpha = self.alpha.float().clamp_min(ALPHA_FLOOR)
            scale = packed.alpha * scale if config.act_bits == 1 else scale
        packed.weight = tile_pack((signs > 0).to(torch.uint8), 1)
        packed.weight_nonzero = tile_pack((~zeros).to(torch.uint8), 1) if packed.weight_zeros else None
        packed.scale = scale
        packed.bias = None if self.bias is None else self.bias.detach().float().clone()
        if packed.shift is not None and self.shift is not None:
            packed.shift = self.shift.detach().float().clone()
        return packed.train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear with the binarised weight; activations are no longer binarised."""
        rule = method(self.config.method).weight
        return self.to_linear(binarize_weight(self.weight, rule, self.config.group_size, self.weight_scale).value)


class PackedBinaryLinear(PackedModule):
    """Packed form: 1-bit weights in tiles, one op a call.

    Buffers: weight int32 [ceil(n/16), ceil(k/32), 16]; weight_nonzero the same, where weights are exactly 0; scale
    float32 [n, groups], alpha included; bias [n]; shift [k]; alpha [].
    """

    config: BinaryConfig
    weight: Tensor
    weight_nonzero: Tensor | None
    scale: Tensor
    bias: Tensor | None
    shift: Tensor | None
    alpha: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: BinaryConfig | None = None,
        weight_zeros: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else BinaryConfig()
        self.kernel = "binary_linear" if self.config.act_bits == 1 else "binary_weight_linear"
        self.in_features, self.out_features, self.weight_zeros = in_features, out_features, weight_zeros
        activation = activation_rule(self.config)
        groups = ceil_div(in_features, self.config.group_size) if self.config.group_size else 1
        elastic_step = activation.scale == "learned"

        def words() -> Tensor:
            return torch.zeros(tile_shape(out_features, in_features), dtype=torch.int32, device=device)

        self.register_buffers(
            weight=words(),
            weight_nonzero=words() if weight_zeros else None,
            scale=torch.zeros(out_features, groups, device=device),
            bias=torch.zeros(out_features, device=device) if bias else None,
            shift=torch.zeros(in_features, device=device) if activation.shift == "added" else None,
            alpha=torch.ones((), device=device) if elastic_step else None,
        )
        self._width, self._group = (in_features,), self.config.group_size or 0
        self._row_scale = activation.scale == "row_mean"
        self._levels = "bool" if not self.config.signed else "sign" if self.config.zero == "torch" else "plus"
        self._surrogate = "unit" if not self.config.signed else activation.surrogate

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: BinaryConfig | None = None) -> PackedBinaryLinear:
        """Binarise and pack an nn.Linear (methods without a learned activation step)."""
        return BinaryLinear.from_linear(linear, config).pack()

    def arguments(self) -> dict[str, int | bool]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "weight_zeros": self.weight_zeros,
        }

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self._width:
            require_width("PackedBinaryLinear", x, self.in_features)
        tensors, config = self._buffers, self.config  # a look into _buffers is ten times faster than an attribute
        weight, nonzero, scale, bias = (tensors[name] for name in ("weight", "weight_nonzero", "scale", "bias"))
        if config.act_bits == 1:
            shift, alpha = tensors["shift"], tensors["alpha"]
            return _binary_linear(
                x,
                weight,
                scale,
                bias,
                nonzero,
                shift,
                alpha,
                self._levels,
                self._row_scale,
                self._group,
                self._surrogate,
            )
        if config.act_bits == 32:
            return _binary_weight_linear(x, weight, scale, bias, nonzero, self._group, config.activations)
        assert self.shift is not None and self.alpha is not None
        value = elastic(x.float() + self.shift, self.alpha, config.act_bits, config.signed)  # quantised in torch
        return _binary_weight_linear(value, weight, scale, bias, nonzero, self._group, "float").to(x.dtype)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the binarised weight; activations are no longer binarised."""
        k, group_size = self.in_features, self.config.group_size
        scale = self.scale
        if self.alpha is not None and self.config.act_bits == 1:
            scale = scale / self.alpha
        columns = columns_of_groups(scale, k, group_size)
        signs = unpack_signs(self.weight, self.weight_nonzero, self.out_features, k)
        return linear_from(signs * columns, self.bias, torch.float32, self.training)

    def validate(self) -> None:
        check_padding("weight", self.weight, self.out_features, self.in_features)
        check_padding("weight_nonzero", self.weight_nonzero, self.out_features, self.in_features)


def check_padding(name: str, tiles: Tensor | None, n: int, k: int) -> None:
    """Everything past n or k must be 0 in a plane of bits."""
    if tiles is None:
        return
    rows = tiles.transpose(1, 2).flatten(0, 1)
    past_columns = k % 32 and bool((rows[:, -1] >> (k % 32) & ((1 << (32 - k % 32)) - 1)).any())
    if past_columns or (n % TILE_ROWS and bool(rows[n:].any())):
        raise ValueError(f"{name}: bits past the last row or column must be 0, got 1; the plane is corrupt")
