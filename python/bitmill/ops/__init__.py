# SPDX-License-Identifier: Apache-2.0
"""Functional forms of every op; each is also `torch.ops.bitmill.<name>`."""

from . import _library, _machine
from .binary_matmul import binary_linear, binary_matmul, binary_weight_linear
from .bitpack import bitpack, bitunpack, tile_pack, tile_unpack

_library.load()

__all__ = [
    "binary_linear",
    "binary_matmul",
    "binary_weight_linear",
    "bitpack",
    "bitunpack",
    "tile_pack",
    "tile_unpack",
]
