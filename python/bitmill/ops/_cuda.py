# SPDX-License-Identifier: Apache-2.0
"""What the ops that have a compiled kernel for the CPU, but none for CUDA, do there.

Most run their default kernel, out of torch's own kernels and of ops that have compiled ones: COMPOSED says of what, and
why that is enough. The others, CPU_ONLY, raise ValueError with a sentence, since their default kernel would be slow in
silence.
"""

from __future__ import annotations

from typing import Any

import torch

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
}
CPU_ONLY = {
    "zoned_linear": "its default kernel would unpack the weight in every call; move the layer and its input to the CPU,"
    " or unpack it once with bitmill.dequantize_",
}


def register() -> None:
    """Make the ops of CPU_ONLY raise on CUDA."""
    for name, reason in CPU_ONLY.items():
        torch.library.impl(f"bitmill::{name}", "CUDA", _raising(name, reason))


def _raising(name: str, reason: str) -> Any:
    def kernel(*_: Any, **__: Any) -> Any:
        raise ValueError(f"{name}: there is no CUDA kernel, and {reason}")

    return kernel


def kernel_on_cuda(name: str) -> str:
    """What runs an op on a GPU: "cuda", "torch" or "none (CPU only)"."""
    if name in CPU_ONLY:
        return "none (CPU only)"
    return "cuda" if library.has_compiled_kernel(library.MADE_OF.get(name, name), "CUDA") else "torch"
