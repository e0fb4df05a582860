# SPDX-License-Identifier: Apache-2.0
"""Layer normalisation over the last dimension, with the bits of torch's.

(x - mean) / sqrt(variance + eps) * weight + bias: Ba et al., "Layer Normalization", 2016, equation 4. The compiled
kernel follows the order of operations of torch's (and asks torch where, tried once, its bits are others), so that a
block can normalise inside and change nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._block_arguments import LayerNormArguments, check_floats

library.define("layer_norm", "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")


@library.default("layer_norm")
def _layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _check(x, weight, bias, eps)
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _check(x: Tensor, *arguments: Any) -> None:
    check_floats("layer_norm", x)
    LayerNormArguments(*arguments).check("layer_norm", x)


@torch.library.register_fake("bitmill::layer_norm")
def _(x, weight, bias, eps):
    _check(x, weight, bias, eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch.layer_norm over the last dimension, bit for bit, for inference.

    Args:
        x: float32 [..., n].
        weight, bias: float32 [n].
        eps: added to the variance.
    Returns:
        float32 [..., n].
    Raises:
        ValueError: for wrong shapes or dtypes.
    """
    return torch.ops.bitmill.layer_norm.default(x, weight, bias, eps)
