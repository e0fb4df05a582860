# SPDX-License-Identifier: Apache-2.0
"""Functional forms of every op; each is also `torch.ops.bitmill.<name>`."""

from . import _library
from . import _machine as _machine  # defines an op
from ._block_arguments import LayerNormArguments, MlpArguments, SelfAttentionArguments
from .binary_attention import binary_attention
from .binary_attention_bits import binary_attention_bits
from .binary_bits import BitRanges, binary_matmul_bits, binary_matmul_floats, bit_ranges
from .binary_blocks import binary_mlp, binary_self_attention
from .binary_conv import binary_conv2d
from .binary_embedding import binary_embedding, binary_embedding_norm
from .binary_encoder import BinaryEncoder, EncoderLayerArguments, binary_encoder
from .binary_matmul import binary_linear, binary_matmul, binary_weight_linear
from .bitpack import bitpack, bitunpack, tile_pack, tile_unpack
from .codebook4 import codebook4_dequantize, codebook4_fake_quant, codebook4_quantize
from .decode_attention import decode_attention, prompt_attention
from .fp4 import (
    code_values,
    e8m0_cast,
    e8m0_uncast,
    fp4_cast,
    fp4_uncast,
    mxfp4_dequantize,
    mxfp4_quantize,
)
from .fp4_activations import fp4_activations, fp4_activations_fake_quant, fp4_fp4_linear
from .fp4_embedding import fp4_embedding
from .fp4_fake_quant import fp4_fake_quant, mxfp4_fake_quant
from .fp4_linear import fp4_linear, fp4_weight
from .fpq import fpq_bias, fpq_dequantize, fpq_quantize, fpq_scale, fpq_shift
from .int8 import int8_fake_quant, int8_quantize
from .integer_linear import integer_linear
from .layer_norm import layer_norm
from .nested_scales import nested_dequantize, nested_map, nested_quantize
from .nvfp4 import e4m3_cast, e4m3_uncast, nvfp4_dequantize, nvfp4_fake_quant, nvfp4_global_scale, nvfp4_quantize
from .salient_scatter import salient_linear, salient_weight
from .zoned import zoned_linear, zoned_weight

_library.load()

__all__ = [
    "BinaryEncoder",
    "BitRanges",
    "EncoderLayerArguments",
    "LayerNormArguments",
    "MlpArguments",
    "SelfAttentionArguments",
    "binary_attention",
    "binary_attention_bits",
    "binary_conv2d",
    "binary_embedding",
    "binary_embedding_norm",
    "binary_encoder",
    "binary_linear",
    "binary_matmul",
    "binary_matmul_bits",
    "binary_matmul_floats",
    "binary_mlp",
    "binary_self_attention",
    "binary_weight_linear",
    "bit_ranges",
    "bitpack",
    "bitunpack",
    "code_values",
    "codebook4_dequantize",
    "codebook4_fake_quant",
    "codebook4_quantize",
    "decode_attention",
    "e4m3_cast",
    "e4m3_uncast",
    "e8m0_cast",
    "e8m0_uncast",
    "fp4_activations",
    "fp4_activations_fake_quant",
    "fp4_cast",
    "fp4_embedding",
    "fp4_fake_quant",
    "fp4_fp4_linear",
    "fp4_linear",
    "fp4_uncast",
    "fp4_weight",
    "fpq_bias",
    "fpq_dequantize",
    "fpq_quantize",
    "fpq_scale",
    "fpq_shift",
    "int8_fake_quant",
    "int8_quantize",
    "integer_linear",
    "layer_norm",
    "mxfp4_dequantize",
    "mxfp4_fake_quant",
    "mxfp4_quantize",
    "nested_dequantize",
    "nested_map",
    "nested_quantize",
    "nvfp4_dequantize",
    "nvfp4_fake_quant",
    "nvfp4_global_scale",
    "nvfp4_quantize",
    "prompt_attention",
    "salient_linear",
    "salient_weight",
    "tile_pack",
    "tile_unpack",
    "zoned_linear",
    "zoned_weight",
]
