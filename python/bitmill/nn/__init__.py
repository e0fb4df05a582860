# SPDX-License-Identifier: Apache-2.0
"""Layers, each in a training form (latent weight, straight-through gradient) and a packed form (buffers, one op)."""

from .attention import BinaryAttention
from .binary import BinaryLinear
from .conv import BinaryConv2d, PackedBinaryConv2d
from .embedding import BinaryEmbedding, PackedBinaryEmbedding
from .fp4 import FP4Linear, PackedFP4Linear
from .fp4_embedding import FP4Embedding, PackedFP4Embedding
from .int8 import PackedInt8Embedding, PackedInt8Linear
from .onebit import OneBitLinear, PackedOneBitLinear
from .packed_binary import PackedBinaryLinear
from .packed_salient import PackedSalientLinear
from .salient import SalientLinear
from .zoned import PackedZonedLinear

__all__ = [
    "BinaryAttention",
    "BinaryConv2d",
    "BinaryEmbedding",
    "BinaryLinear",
    "FP4Embedding",
    "FP4Linear",
    "OneBitLinear",
    "PackedBinaryConv2d",
    "PackedBinaryEmbedding",
    "PackedBinaryLinear",
    "PackedFP4Embedding",
    "PackedFP4Linear",
    "PackedInt8Embedding",
    "PackedInt8Linear",
    "PackedOneBitLinear",
    "PackedSalientLinear",
    "PackedZonedLinear",
    "SalientLinear",
]
