# SPDX-License-Identifier: Apache-2.0
"""What the ops that have a compiled kernel for the CPU, but none for CUDA, do there.

They run their default kernel, out of torch's own kernels and of ops that have compiled ones: COMPOSED says of what, and
why that is enough.
"""

from __future__ import annotations

from . import _library as library

_CONVERSION = "a conversion, once for a weight"
COMPOSED = {
    "bitunpack": _CONVERSION,
    "tile_pack": _CONVERSION,
    "tile_unpack": _CONVERSION,
    "fp4_weight": _CONVERSION,
    "salient_weight": _CONVERSION,
    "zoned_weight": _CONVERSION,
    "int8_quantize": "elementwise kernels; products with int8 activations raise",
    "layer_norm": "torch's own kernel, whose bits it has",
    "binary_embedding": "a gather of packed rows, and elementwise kernels",
    "binary_embedding_norm": "a gather of packed rows, and torch's own kernels",
    "binary_conv2d": "torch's convolution of the levels, which is exact in TF32 too",
    "binary_mlp": "ops with kernels, which hand each other bits",
    "binary_self_attention": "ops with kernels, which hand each other bits",
    "binary_encoder": "ops with kernels, which hand each other bits",
    "decode_attention": "a dozen of torch's kernels a layer",
    "prompt_attention": "a dozen of torch's kernels a layer",
}


def kernel_on_cuda(name: str) -> str:
    """What runs an op on a GPU: "cuda" or "torch"."""
    return "cuda" if library.has_compiled_kernel(library.MADE_OF.get(name, name), "CUDA") else "torch"
