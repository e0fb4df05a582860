# SPDX-License-Identifier: Apache-2.0
"""Variants of convolutions: images in and out, packing of the image included."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from bitmill import BinaryConfig
from bitmill.bench.layers import buffer_bytes
from bitmill.nn import BinaryConv2d

from .runner import Case, Prepared, Unfit, Variant, layer_copies
from .shapes import CONVS


def image_and_conv(case: Case) -> tuple[Tensor, nn.Conv2d]:
    """The problem's image [1, channels, height, width] and an nn.Conv2d over it."""
    if case.problem not in CONVS:
        raise Unfit("its image is not known")
    size, kernel, stride, padding = CONVS[case.problem]
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(size[0], case.n, kernel, stride, padding).requires_grad_(False).eval()
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) / case.k**0.5)
    conv.bias.copy_(torch.randn(case.n, generator=generator))
    return torch.randn(1, *size, generator=generator), conv


def binary(name: str, config: BinaryConfig, layout: torch.memory_format = torch.contiguous_format) -> Variant:
    """A packed convolution, compared with its training form exactly."""

    def build(case: Case) -> Prepared:
        x, conv = image_and_conv(case)
        training = BinaryConv2d.from_conv(conv, config)
        packed = training.pack()
        x = x.contiguous(memory_format=layout)
        return layer_copies(packed, x, training(x), 0.0, buffer_bytes(packed), "popcount")

    return Variant(name, build)


def torch_conv(dtype: torch.dtype, baseline: str) -> Variant:
    def build(case: Case) -> Prepared:
        x, conv = image_and_conv(case)
        expected = conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)
        x, tolerance = x.to(dtype), 1e-5 if dtype == torch.float32 else 2e-2

        def prepared() -> Prepared:
            own = conv.weight.to(dtype, copy=True), conv.bias.to(dtype)

            def call() -> Tensor:
                return conv2d(x, *own, conv.stride, conv.padding)

            return Prepared(call, expected, tolerance, x.nbytes, own[0].nbytes, prepared, baseline)

        return prepared()

    return Variant(f"torch {baseline}", build, "torch", baseline)


VARIANTS = (
    binary("binary", BinaryConfig("sign")),
    binary("binary, zero=plus", BinaryConfig("sign", zero="plus")),
    binary("binary, channels_last", BinaryConfig("sign"), torch.channels_last),
    torch_conv(torch.float32, "fp32"),
    torch_conv(torch.bfloat16, "bf16"),
)
