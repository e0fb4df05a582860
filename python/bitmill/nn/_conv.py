# SPDX-License-Identifier: Apache-2.0
"""What the two forms of a binary convolution share: its configuration, its shape, and the scales of its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..binarize import ActivationRule, method
from ..binarize.conv import ConvGeometry
from ..config import BinaryConfig
from ..ops.bitpack import mean_by_halves

MAX_MAP = 2000  # learned scales of rows and of columns, as many as the published code has


def conv_activation_rule(config: BinaryConfig) -> ActivationRule:
    """The image's rule, or the empty rule if images stay floats."""
    return method(config.method).conv_activation_rule(config.act_bits)


def conv_config(layer: str, config: BinaryConfig | None) -> BinaryConfig:
    """The configuration, if a convolution can have it.

    Raises:
        ValueError: for anything but a BinaryConfig, grouped scales, int8 images, or images of more bits than one.
    """
    config = BinaryConfig() if config is None else config
    if not isinstance(config, BinaryConfig):
        raise ValueError(f"{layer}: config must be a BinaryConfig, got {type(config).__name__}")
    for field, valid, expected in (
        ("group_size", config.group_size is None, "None"),
        ("activations", config.activations == "float", "'float'"),
        ("act_bits", config.act_bits in (1, 32), "1 or 32"),
        ("method", conv_activation_rule(config).scale in ("none", "learned"), "one whose 1-bit images are signs"),
    ):
        if not valid:
            raise ValueError(f"{layer}: {field} must be {expected} for a convolution, got {getattr(config, field)!r}")
    return config


def conv_arguments(module: Any) -> dict[str, Any]:
    """Keyword arguments that build a convolution of this shape, as plain data."""
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": list(module.kernel_size),
        "stride": list(module.stride),
        "padding": module.padding if isinstance(module.padding, str) else list(module.padding),
        "dilation": list(module.dilation),
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "bias": module.bias is not None,
    }


def border_of(module: Any) -> list[int]:
    """Pixels around the image, as torch.nn.functional.pad counts them: left, right, top, bottom."""
    if module.padding == "valid":
        return [0, 0, 0, 0]
    border: list[int] = []
    for axis in (1, 0):
        if module.padding == "same":
            around = module.dilation[axis] * (module.kernel_size[axis] - 1)
            border += [around // 2, around - around // 2]
        else:
            border += [module.padding[axis]] * 2
    return border


def geometry_of(module: Any) -> ConvGeometry:
    """How the kernel passes over the image that `bordered` answers."""
    left, right, top, bottom = border_of(module) if module.padding_mode == "zeros" else [0, 0, 0, 0]
    return ConvGeometry(list(module.stride), [top, bottom, left, right], list(module.dilation), module.groups)


def bordered(module: Any, x: Tensor) -> Tensor:
    """The image with the border of padding modes that copy pixels; zeros are added after the sign, so not here."""
    return x if module.padding_mode == "zeros" else pad(x, border_of(module), module.padding_mode)


def require_image(layer: str, x: Tensor, channels: int) -> None:
    """One clear error for the commonest mistake; the op checks the rest."""
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"{layer}: x must have shape [batch, {channels}, height, width] or [{channels}, height, width],"
            f" got {list(x.shape)}"
        )


def output_size(module: Any, x: Tensor) -> list[int]:
    """Height and width of the result for the image that `bordered` answers.

    Raises:
        ValueError: if the kernel is larger than the image.
    """
    _, padding, _, _ = geometry_of(module)
    sizes = []
    for axis, name in ((0, "high"), (1, "wide")):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        size = x.shape[2 + axis] + padding[2 * axis] + padding[2 * axis + 1]
        if size < reach:
            raise ValueError(
                f"{type(module).__name__}: x must be at least as {name} as the kernel with its dilation ({reach}),"
                f" padding included, got {size}"
            )
        sizes.append((size - reach) // module.stride[axis] + 1)
    return sizes


def sample_scale(x: Tensor, size: list[int]) -> Tensor:
    """XNOR-Net's mean |x| of each sample, for every position [batch, height, width] of the result."""
    return mean_by_halves(x.detach().float().abs().flatten(1)).view(-1, 1, 1).expand(-1, *size)


def map_scale(rows: Tensor, columns: Tensor, batch: int, size: list[int]) -> Tensor:
    """XNOR-Net++'s scales of the output's rows and columns, multiplied: [batch, height, width]; missing ones are 1."""
    if max(size) > MAX_MAP:
        raise ValueError(f"BinaryConv2d: the result of learned map scales must be at most {MAX_MAP} a side, got {size}")

    def first(t: Tensor, count: int) -> Tensor:
        return pad(t[:count].float(), (0, max(count - len(t), 0)), value=1.0)

    return (first(rows, size[0]).unsqueeze(1) * first(columns, size[1])).expand(batch, -1, -1)
