# SPDX-License-Identifier: Apache-2.0
"""PackedBinaryLinear: planes of 1-bit weights in tiles, and the state that quantises its activations.

1-bit activations on one plane are one op, `binary_linear`; activations of more bits, or more planes, are whole numbers
(`integer_linear`); float and int8 activations multiply each plane (`binary_weight_linear`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..binarize import ActivationRule, Thresholds, method, quantize_activation
from ..config import BinaryConfig
from ..ops._checks import TILE_ROWS, ceil_div, tile_shape
from ..ops._groups import columns_of_groups
from ..ops.binary_matmul import unpack_signs
from ._module import PackedModule, linear_from, require_width

_binary_linear = torch.ops.bitmill.binary_linear.default
_binary_weight_linear = torch.ops.bitmill.binary_weight_linear.default
_integer_linear = torch.ops.bitmill.integer_linear.default


def activation_rule(config: BinaryConfig) -> ActivationRule:
    """The activation's rule, or the empty rule if activations stay floats."""
    return method(config.method).activation_rule(config.act_bits)


def activation_state(config: BinaryConfig, k: int, device: Any = None, dtype: Any = None) -> dict[str, Tensor | None]:
    """What the rule of the activations learns, as it starts; None for what it does not have."""
    rule, top = activation_rule(config), (1 << config.act_bits) - 1

    def number(value: float) -> Tensor:
        return torch.full((), value, device=device, dtype=dtype)

    by_thresholds = rule.scale == "thresholds"
    return {
        "shift": torch.zeros(k, device=device, dtype=dtype) if rule.shift != "none" else None,
        "alpha": number(1.0) if rule.scale == "learned" else None,
        "widths": torch.full((top,), 2 / top, device=device, dtype=dtype) if by_thresholds else None,
        "start": number(0.0) if by_thresholds else None,
        "in_scale": number(1.0) if by_thresholds else None,
        "out_scale": number(1.0) if by_thresholds else None,
    }


def thresholds_of(module: Any) -> Thresholds | None:
    """The thresholds that a layer keeps, if its method has any."""
    if module.widths is None:
        return None
    return Thresholds(module.widths, module.start, module.in_scale, module.out_scale)


class PackedBinaryLinear(PackedModule):
    """Packed form: planes of 1-bit weights in tiles.

    Buffers: weight int32 [ceil(n/16), ceil(k/32), 16], or [planes, ...] for more planes than one; weight_nonzero the
    same, where weights are exactly 0; scale float32 [n, groups] or [n, planes], alpha included for
    1-bit activations; bias [n]; shift [k]; alpha []; widths [2^b - 1], start, in_scale and out_scale [].
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
        config = self.config = config if config is not None else BinaryConfig()
        self.in_features, self.out_features, self.weight_zeros = in_features, out_features, weight_zeros
        rule, self._planes = activation_rule(config), config.weight_rule.planes
        if not self._planes:
            raise ValueError(
                f"PackedBinaryLinear: weight_bits={config.weight_bits} of method {config.method!r} have no packed form"
            )
        signs = self._planes == 1 and config.act_bits == 1 and rule.scale in ("none", "row_mean", "learned")
        self.kernel = (
            "binary_weight_linear" if config.act_bits == 32 else "binary_linear" if signs else "integer_linear"
        )
        self.folds_alpha = signs and rule.scale == "learned"
        groups = ceil_div(in_features, config.group_size) if config.group_size else self._planes
        state = activation_state(config, in_features, device)
        state["shift"] = state["shift"] if rule.shift == "added" else None

        def words() -> Tensor:
            planes = [self._planes] if self._planes > 1 else []
            return torch.zeros([*planes, *tile_shape(out_features, in_features)], dtype=torch.int32, device=device)

        self.register_buffers(
            weight=words(),
            weight_nonzero=words() if weight_zeros else None,
            scale=torch.zeros(out_features, groups, device=device),
            bias=torch.zeros(out_features, device=device) if bias else None,
            **state,
        )
        self._width, self._group = (in_features,), config.group_size or 0
        self._row_scale = rule.scale == "row_mean"
        self._levels = "bool" if not config.signed else "sign" if config.zero == "torch" else "plus"
        self._surrogate = "unit" if not config.signed else rule.surrogate

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: BinaryConfig | None = None) -> PackedBinaryLinear:
        """Binarise and pack an nn.Linear (methods without a learned activation step)."""
        from .binary import BinaryLinear  # the training form imports this file

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
        if self.kernel == "binary_linear":
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
        if self.kernel == "binary_weight_linear" and self._planes == 1:
            return _binary_weight_linear(x, weight, scale, bias, nonzero, self._group, config.activations)
        if self.kernel == "binary_weight_linear":
            return self._sum_of_planes(x.float()).to(x.dtype)
        return self._integer(x.float()).to(x.dtype)

    def _planes_of(self, tiles: Tensor | None) -> Tensor | None:
        return tiles if tiles is None or self._planes > 1 else tiles.unsqueeze(0)

    def _sum_of_planes(self, x: Tensor) -> Tensor:
        y = self.scale.new_zeros(())
        for p in range(self._planes):
            nonzero = None if self.weight_nonzero is None else self.weight_nonzero[p]
            scale = self.scale[:, p : p + 1].contiguous()
            y = y + _binary_weight_linear(x, self.weight[p], scale, None, nonzero, 0, "float")
        return y if self.bias is None else y + self.bias

    def _integer(self, x: Tensor) -> Tensor:
        config = self.config
        q = quantize_activation(
            x,
            activation_rule(config),
            config.act_bits,
            config.signed,
            config.zero,
            self.shift,
            self.alpha,
            thresholds_of(self),
            with_value=torch.is_grad_enabled() and x.requires_grad,
        )
        step = self.scale.new_ones(()) if q.step is None else q.step
        weight, nonzero = self._planes_of(self.weight), self._planes_of(self.weight_nonzero)
        assert weight is not None
        return _integer_linear(q.value, q.code, weight, self.scale, self.bias, nonzero, step, q.offset, q.low, q.high)

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """An nn.Linear (float32) with the binarised weight; activations are no longer binarised."""
        n, k = self.out_features, self.in_features
        scale = self.scale / self.alpha if self.folds_alpha and self.alpha is not None else self.scale
        weight, nonzero = self._planes_of(self.weight), self._planes_of(self.weight_nonzero)
        assert weight is not None
        dense = self.scale.new_zeros(n, k)
        for p, plane in enumerate(weight):
            columns = scale[:, p : p + 1] if self._planes > 1 else columns_of_groups(scale, k, self.config.group_size)
            dense += columns * unpack_signs(plane, None if nonzero is None else nonzero[p], n, k)
        return linear_from(dense, self.bias, torch.float32, self.training)

    def validate(self) -> None:
        for name in ("weight", "weight_nonzero"):
            planes = self._planes_of(getattr(self, name))
            for plane in () if planes is None else planes:
                check_padding(name, plane, self.out_features, self.in_features)


def check_padding(name: str, tiles: Tensor | None, n: int, k: int) -> None:
    """Everything past n or k must be 0 in a plane of bits."""
    if tiles is None:
        return
    rows = tiles.transpose(1, 2).flatten(0, 1)
    past_columns = k % 32 and bool((rows[:, -1] >> (k % 32) & ((1 << (32 - k % 32)) - 1)).any())
    if past_columns or (n % TILE_ROWS and bool(rows[n:].any())):
        raise ValueError(f"{name}: bits past the last row or column must be 0, got 1; the plane is corrupt")
