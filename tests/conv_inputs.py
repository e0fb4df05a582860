# SPDX-License-Identifier: Apache-2.0
"""Inputs of the binary convolution for tests, in the order of the op's arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from binary_inputs import values
from bitmill import ops
from bitmill.ops.binary_conv import conv_columns


class Shape(NamedTuple):
    """An image, and a convolution over it; padding is top, bottom, left, right."""

    name: str
    x: tuple[int, int, int, int]
    n: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


SHAPES = (
    Shape("one pixel", (1, 1, 1, 1), 1, (1, 1), padding=(0, 0, 0, 0)),
    Shape("3x3", (2, 5, 6, 7), 7),
    Shape("whole words", (1, 64, 9, 5), 33),
    Shape("past a word", (2, 33, 5, 20), 17, stride=(2, 1)),
    Shape("patches", (2, 3, 32, 48), 40, (16, 16), (16, 16), (0, 0, 0, 0)),
    Shape("one side padded", (1, 4, 5, 6), 6, (2, 3), (1, 2), (0, 3, 2, 0)),
    Shape("more padding than kernel", (1, 2, 3, 3), 5, (2, 2), padding=(4, 3, 4, 5)),
    Shape("dilated", (2, 32, 9, 11), 16, (3, 2), (2, 1), (2, 2, 1, 3), (2, 3)),
    Shape("groups", (2, 12, 5, 5), 9, groups=3),
    Shape("groups of whole words", (1, 64, 6, 6), 40, groups=2),
    Shape("depthwise", (2, 19, 6, 4), 38, (3, 1), padding=(1, 1, 0, 0), groups=19),
    Shape("as wide as the image", (3, 7, 5, 18), 20, (5, 18), padding=(0, 0, 0, 0)),
    Shape("every pixel a patch", (2, 64, 9, 10), 20, (1, 1), padding=(0, 0, 0, 0)),
    Shape("empty batch", (0, 5, 4, 4), 3),
)


def conv_arguments(
    shape: Shape,
    levels: str = "sign",
    dtype: torch.dtype = torch.float32,
    zeros: bool = False,
    bias: bool = False,
    shift: bool = False,
    alpha: bool = False,
    row_scale: bool = False,
    surrogate: str = "clip",
) -> tuple[Any, ...]:
    """Arguments of binary_conv2d, in its order."""
    weight, nonzero = conv_tiles(kernel_signs(shape, zeros), zeros)
    return (
        values(*shape.x, dtype=dtype),
        weight,
        torch.randn(shape.n),
        torch.randn(shape.n) if bias else None,
        nonzero,
        values(shape.x[1]) if shift else None,
        torch.tensor(0.7) if alpha else None,
        torch.randn(shape.x[0], *outputs_of(shape)) if row_scale else None,
        list(shape.kernel),
        list(shape.stride),
        list(shape.padding),
        list(shape.dilation),
        shape.groups,
        levels,
        surrogate,
    )


def kernel_signs(shape: Shape, zeros: bool) -> Tensor:
    size = (shape.n, shape.x[1] // shape.groups, *shape.kernel)
    signs = torch.randint(2, size) * 2 - 1
    return signs * (torch.rand(size) < 0.8) if zeros else signs


def conv_tiles(signs: Tensor, zeros: bool) -> tuple[Tensor, Tensor | None]:
    planes = [ops.tile_pack(conv_columns(plane).to(torch.uint8), 1) for plane in (signs > 0, signs != 0)]
    return planes[0], planes[1] if zeros else None


def outputs_of(shape: Shape) -> tuple[int, int]:
    def along(i: int) -> int:
        around = shape.padding[2 * i] + shape.padding[2 * i + 1]
        return (shape.x[2 + i] + around - shape.dilation[i] * (shape.kernel[i] - 1) - 1) // shape.stride[i] + 1

    return along(0), along(1)
