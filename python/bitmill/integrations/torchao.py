# SPDX-License-Identifier: Apache-2.0
"""Models that torchao quantised to NVFP4 or MXFP4, packed without loss.

torchao keeps nn.Linear and puts a tensor of a class of its own in the place of the weight, NVFP4Tensor or MXTensor, of
codes (`qdata`), block scales (`scale`) and a global scale that multiplies (`per_tensor_scale`). For the tensor cores of
GPUs the scales may be swizzled: tiles of 128 rows and 4 columns, padded with zeros, one tile after another; row r and
column c of a tile is byte 16 (r % 32) + 4 (r // 32) + c.

Source: torchao 0.18 (prototype.mx_formats), NVIDIA's cuBLAS documentation (block scaling factors layout).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import Filter
from ..ops._checks import ceil_div, require
from ._fp4_files import BLOCKS, Builder, FP4Weight, bytes_of, fp4_layer, import_linears
from .compressed_tensors import from_tensors

FORMATS = {"NVFP4Tensor": "nvfp4", "MXTensor": "mxfp4"}
TILE_ROWS, TILE_COLUMNS = 128, 4


def unswizzle(scale: Tensor, n: int, groups: int) -> Tensor:
    """Rows [n, groups] of swizzled scales: bytes of any shape, as many as there are in whole tiles.

    Raises:
        ValueError: for another number of them.
    """
    rows, columns = ceil_div(n, TILE_ROWS), ceil_div(groups, TILE_COLUMNS)
    size = rows * columns * TILE_ROWS * TILE_COLUMNS
    require(
        scale.numel() == size,
        f"unswizzle: scale must have {size} elements, tiles of 128 x 4 for {[n, groups]}, got {list(scale.shape)}",
    )
    tiles = scale.reshape(rows, columns, 32, TILE_ROWS // 32, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows * TILE_ROWS, columns * TILE_COLUMNS)[:n, :groups].contiguous()


def from_tensor(t: Any, nibble_order: str = "low") -> FP4Weight:
    """An NVFP4Tensor, or an MXTensor of 4 bits, [n, k], in the layout of ops, bit for bit.

    Args:
        nibble_order: "high" for checkpoints of torchao before October 2025.
    Raises:
        ValueError: for another class, element, block size or number of dimensions, or a transposed tensor.
    """
    format = FORMATS.get(type(t).__name__)
    if format is None:
        raise ValueError(f"from_tensor: t must be an NVFP4Tensor or an MXTensor of torchao, got {type(t).__name__}")
    four_bit = format == "nvfp4" or t.elem_dtype == torch.float4_e2m1fn_x2
    require(four_bit, f"from_tensor: t must have elements float4_e2m1fn_x2, got {getattr(t, 'elem_dtype', None)}")
    block = BLOCKS[format]
    require(t.block_size == block, f"from_tensor: t must have blocks of {block} for {format!r}, got {t.block_size}")
    packed = bytes_of("from_tensor", "qdata", t.qdata, "float4_e2m1fn_x2")
    require(
        packed.dim() == 2 and t.qdata.is_contiguous(),
        f"from_tensor: t must be a weight [n, k], got {list(t.shape)}, or a transposed one; transpose it",
    )
    scale = t.scale
    if t.is_swizzled_scales:
        n, k = packed.shape[0], 2 * packed.shape[1]
        scale = unswizzle(scale.view(torch.uint8), n, ceil_div(k, block)).view(scale.dtype)
    number = getattr(t, "per_tensor_scale", None)
    return from_tensors(packed, scale, number, "none" if number is None else "multiplier", nibble_order)


@torch.no_grad()
def import_(
    model: nn.Module, activations: str = "float", filter_fn: Filter | None = None, nibble_order: str = "low"
) -> list[str]:
    """Put packed layers in the place of the nn.Linear layers whose weight torchao quantised to 4-bit floats.

    Activations that torchao quantises on the way stay floats, or become int8.

    Args:
        activations: "float" or "int8" (`FP4Config`).
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: as `from_tensor`, the layer's name first. The model is unchanged then.
    """
    layers: dict[str, Builder] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and type(module.weight).__name__ in FORMATS:
            layers[name] = partial(_layer, activations=activations, nibble_order=nibble_order)
    return import_linears(model, layers, filter_fn)


def _layer(linear: nn.Linear, activations: str, nibble_order: str) -> nn.Module:
    return fp4_layer(linear, from_tensor(linear.weight, nibble_order), linear.bias, activations)
