# SPDX-License-Identifier: Apache-2.0
"""PackedBinaryConv2d: planes of 1-bit filters in tiles, and the state that binarises its images.

1-bit images are one op, `binary_conv2d`. Float images are multiplied by the filters as floats, decoded for the call;
or, where patches do not overlap (patch embeddings), they are rows already, which `binary_weight_linear` multiplies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.modules.utils import _pair

from ..binarize import method
from ..config import BinaryConfig
from ..ops._checks import tile_shape
from ..ops.binary_conv import conv_kernels, pad_image
from ..ops.binary_matmul import unpack_signs
from ._conv import (
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
from ._module import PackedModule
from .packed_binary import check_padding

_binary_conv2d = torch.ops.bitmill.binary_conv2d.default
_binary_weight_linear = torch.ops.bitmill.binary_weight_linear.default


class PackedBinaryConv2d(PackedModule):
    """Packed form of BinaryConv2d.

    Buffers, with k = kernel height * kernel width * in_channels / groups: weight int32 [ceil(n/16), ceil(k/32), 16], or
    [planes, ...] for more planes than one; weight_nonzero the same, where weights are exactly 0; scale float32
    [n, planes], alpha included for 1-bit images; bias [n]; shift [in_channels]; alpha []; row_scale and column_scale,
    the learned scales of the output's map up to the last one that is not 1.
    """

    config: BinaryConfig
    weight: Tensor
    weight_nonzero: Tensor | None
    scale: Tensor
    bias: Tensor | None
    shift: Tensor | None
    alpha: Tensor | None
    row_scale: Tensor | None
    column_scale: Tensor | None

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
        padding_mode: str = "zeros",
        config: BinaryConfig | None = None,
        weight_zeros: bool = False,
        map_rows: int = 0,
        map_columns: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config = self.config = conv_config("PackedBinaryConv2d", config)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = (tuple(_pair(t)) for t in (kernel_size, stride, dilation))
        self.padding = padding if isinstance(padding, str) else tuple(_pair(padding))
        self.padding_mode, self.weight_zeros = padding_mode, weight_zeros
        binarizer, rule = method(config.method), conv_activation_rule(config)
        self._planes = binarizer.conv_weight_rule(config.weight_bits).planes
        if not self._planes:
            raise ValueError(
                f"PackedBinaryConv2d: weight_bits={config.weight_bits} of {config.method!r} is no plane of signs"
            )
        self._is_patches = (
            config.act_bits == 32
            and self._planes == groups == 1
            and self.kernel_size == self.stride
            and self.dilation == (1, 1)
            and self.padding in ((0, 0), "valid")
        )
        one_bit = config.act_bits == 1
        self.kernel = "binary_conv2d" if one_bit else "binary_weight_linear" if self._is_patches else "tile_unpack"
        has_map = binarizer.conv.map_scales

        def words() -> Tensor:
            planes = [self._planes] if self._planes > 1 else []
            return torch.zeros([*planes, *tile_shape(*self.weight_shape())], dtype=torch.int32, device=device)

        def ones(count: int) -> Tensor:
            return torch.ones(count, device=device)

        self.register_buffers(
            weight=words(),
            weight_nonzero=words() if weight_zeros else None,
            scale=torch.zeros(out_channels, self._planes, device=device),
            bias=torch.zeros(out_channels, device=device) if bias else None,
            shift=torch.zeros(in_channels, device=device) if rule.shift == "added" else None,
            alpha=torch.ones((), device=device) if rule.scale == "learned" else None,
            row_scale=ones(map_rows) if has_map else None,
            column_scale=ones(map_columns) if has_map else None,
        )
        self._sample_scale = one_bit and binarizer.has_sample_scale
        self._levels = "bool" if not config.signed else "sign" if config.zero == "torch" else "plus"
        self._surrogate = "unit" if not config.signed else rule.surrogate

    def arguments(self) -> dict[str, Any]:
        arguments = {**conv_arguments(self), "weight_zeros": self.weight_zeros}
        if self.row_scale is not None and self.column_scale is not None:
            arguments |= {"map_rows": len(self.row_scale), "map_columns": len(self.column_scale)}
        return arguments

    def weight_shape(self) -> tuple[int, int]:
        return self.out_channels, math.prod(self.kernel_size) * (self.in_channels // self.groups)

    def forward(self, x: Tensor) -> Tensor:
        require_image("PackedBinaryConv2d", x, self.in_channels)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        image = bordered(self, x)
        if self.config.act_bits == 32:
            return self._of_floats(image)
        rows = None
        if self._sample_scale:
            seen = x if self.shift is None else x.float() + self.shift.view(-1, 1, 1)
            rows = sample_scale(seen, output_size(self, image))
        if self.row_scale is not None and self.column_scale is not None:
            learned = map_scale(self.row_scale, self.column_scale, x.shape[0], output_size(self, image))
            rows = learned if rows is None else rows * learned
        stride, padding, dilation, groups = geometry_of(self)
        return _binary_conv2d(
            image,
            self.weight,
            self.scale[:, 0],
            self.bias,
            self.weight_nonzero,
            self.shift,
            self.alpha,
            rows,
            list(self.kernel_size),
            stride,
            padding,
            dilation,
            groups,
            self._levels,
            self._surrogate,
        )

    def _of_floats(self, x: Tensor) -> Tensor:
        height, width = output_size(self, x)
        if self._is_patches and self.row_scale is None:
            kernel_height, kernel_width = self.kernel_size
            patches = x[..., : height * kernel_height, : width * kernel_width]
            patches = patches.unflatten(3, (width, kernel_width)).unflatten(2, (height, kernel_height))
            rows = patches.permute(0, 2, 4, 3, 5, 1).flatten(3)
            out = _binary_weight_linear(rows, self.weight, self.scale, self.bias, self.weight_nonzero, 0, "float")
            return out.permute(0, 3, 1, 2)
        stride, padding, dilation, groups = geometry_of(self)
        out = conv2d(pad_image(x.float(), padding), self._dense(self.scale), None, stride, 0, dilation, groups)
        if self.row_scale is not None and self.column_scale is not None:
            out = out * map_scale(self.row_scale, self.column_scale, x.shape[0], [height, width]).unsqueeze(1)
        return (out if self.bias is None else out + self.bias.view(-1, 1, 1)).to(x.dtype)

    def _dense(self, scale: Tensor) -> Tensor:
        """The filters [n, in_channels / groups, height, width] as floats."""
        n, k = self.weight_shape()
        dense = scale.new_zeros(n, k)
        for p in range(self._planes):
            plane, nonzero = self._plane("weight", p), self._plane("weight_nonzero", p)
            assert plane is not None
            dense = dense + scale[:, p : p + 1] * unpack_signs(plane, nonzero, n, k)
        return conv_kernels(dense, self.kernel_size)

    def _plane(self, name: str, p: int) -> Tensor | None:
        tiles: Tensor | None = getattr(self, name)
        return tiles if tiles is None or self._planes == 1 else tiles[p]

    @torch.no_grad()
    def dequantize(self) -> nn.Conv2d:
        """An nn.Conv2d (float32) with the binarised filters; images are no longer binarised.

        Raises:
            ValueError: for learned scales of the output's map, which an nn.Conv2d does not have.
        """
        scale = self.scale if self.alpha is None else self.scale / self.alpha
        return conv_from(self, self._dense(scale), self.bias, torch.float32)

    def validate(self) -> None:
        for name in ("weight", "weight_nonzero"):
            for p in range(self._planes):
                check_padding(name, self._plane(name, p), *self.weight_shape())


def conv_from(layer: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Conv2d:
    """An nn.Conv2d of the layer's shape that owns copies of weight and bias."""
    if layer.row_scale is not None:
        raise ValueError(f"{type(layer).__name__}: learned scales of the output's map have no place in an nn.Conv2d")
    conv = nn.Conv2d(**conv_arguments(layer), device="meta")
    conv.weight = nn.Parameter(weight.detach().to(dtype, memory_format=torch.contiguous_format, copy=True))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    return conv.train(layer.training)
