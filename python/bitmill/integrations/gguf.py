# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4 tensors of GGUF files, taken and written as they are, bit for bit.

A row of ggml's MXFP4 is one block after another, each of 17 bytes for 32 columns: the E8M0 scale, and 16 bytes whose
low nibbles are columns 0 ... 15 and whose high nibbles are columns 16 ... 31. A block of NVFP4 is 36 bytes for 64
columns: 4 E4M3 scales, and for each 8 bytes with its columns 0 ... 7 low and 8 ... 15 high; the global scale, which
values are multiplied with, is the tensor NAME.scale, if there is one. Codes and scales mean what they do in ops. Scales
that are NaN, 255 and 127, are 2^128 and 0 in ggml, which also ignores the sign of an E4M3 scale.

`language.read_pretrained` makes floats of a GGUF file instead, of any of its types.

Source: ggml (the blocks), llama.cpp's gguf package (the file).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..convert import Filter
from ..ops._checks import check_one_of, require
from ..ops.fp4 import pack_nibbles, unpack_nibbles
from ._fp4_files import (
    BLOCKS,
    Builder,
    FP4Weight,
    bytes_of,
    damaged,
    fp4_layers,
    import_linears,
    packed_layers,
    rows_of,
    whole_blocks,
)

try:
    import gguf
except ImportError:
    raise ImportError("bitmill.integrations.gguf needs gguf, which is not installed: pip install gguf") from None

SCALES = {"mxfp4": 1, "nvfp4": 4}  # of a block
KINDS = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType if kind.name.lower() in SCALES}
WEIGHT, BIAS, GLOBAL_SCALE = ".weight", ".bias", ".scale"


def from_blocks(blocks: Tensor, format: str = "mxfp4") -> tuple[Tensor, Tensor]:
    """Rows of ggml's blocks as `ops.mxfp4_quantize` or `ops.nvfp4_quantize` has them.

    Args:
        blocks: uint8 [..., 17 groups] for "mxfp4", [..., 36 groups] for "nvfp4".
    Returns:
        packed uint8 [..., k / 2] and scale uint8 [..., k / 32] or [..., k / 16].
    Raises:
        ValueError: for another dtype or format, or rows that are not whole blocks.
    """
    check_one_of("from_blocks", "format", format, tuple(SCALES))
    blocks = bytes_of("from_blocks", "blocks", blocks)
    count, half = SCALES[format], BLOCKS[format] // 2
    size = count * (1 + half)
    require(
        blocks.dim() >= 1 and blocks.shape[-1] % size == 0,
        f"from_blocks: blocks must have rows of a multiple of {size} bytes, got shape {list(blocks.shape)}; k must be a"
        f" multiple of {2 * half * count}",
    )
    scale, halves = blocks.unflatten(-1, (blocks.shape[-1] // size, size)).split([count, count * half], -1)
    halves = halves.unflatten(-1, (count, half))
    codes = torch.cat([halves & 15, halves >> 4], -1)
    return pack_nibbles(codes.flatten(-3)), scale.flatten(-2)


def to_blocks(packed: Tensor, scale: Tensor, format: str = "mxfp4") -> Tensor:
    """Undo `from_blocks`.

    Raises:
        ValueError: for other dtypes or shapes, such as those of a k that is no multiple of a block's columns.
    """
    check_one_of("to_blocks", "format", format, tuple(SCALES))
    count, width = SCALES[format], BLOCKS[format]
    packed, scale = whole_blocks("to_blocks", packed, scale, width)
    groups = scale.shape[-1] // count
    require(
        scale.shape[-1] % count == 0,
        f"to_blocks: scale must have a multiple of {count} columns for {format!r}, got {list(scale.shape)}; the format"
        f" has no partial blocks, so k must be a multiple of {width * count}",
    )
    low, high = unpack_nibbles(packed, width).split(width // 2, -1)
    halves = (low | high << 4).unflatten(-2, (groups, count)).flatten(-2)
    return torch.cat([scale.unflatten(-1, (groups, count)), halves], -1).flatten(-2)


def read(path: str | os.PathLike[str]) -> dict[str, FP4Weight]:
    """Every MXFP4 and NVFP4 tensor of a GGUF file by its name, [rows, columns] or [experts, rows, columns].

    Raises:
        ValueError: for a damaged file, or a global scale that is not one positive and finite number.
        OSError: if it cannot be read.
    """
    return _read(_tensors(path))


def _read(tensors: Mapping[str, gguf.ReaderTensor]) -> dict[str, FP4Weight]:
    weights: dict[str, FP4Weight] = {}
    for name, tensor in tensors.items():
        for format, kind in KINDS.items():
            if tensor.tensor_type == kind:
                parts = from_blocks(torch.from_numpy(tensor.data.copy()), format)
                number = tensors.get(name.removesuffix(WEIGHT) + GLOBAL_SCALE) if format == "nvfp4" else None
                weights[name] = FP4Weight(format, *parts, None if number is None else _global_scale(number))
    return weights


def _global_scale(tensor: gguf.ReaderTensor) -> float:
    values = tensor.data.flatten().tolist()
    valid = tensor.tensor_type == gguf.GGMLQuantizationType.F32 and len(values) == 1 and 0 < values[0] < math.inf
    require(
        valid,
        f"read: {tensor.name} must be one positive and finite F32, got {len(values)} of {tensor.tensor_type.name}"
        f" {values[:1]}",
    )
    return values[0]


@torch.no_grad()
def import_(
    model: nn.Module,
    path: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
    activations: str = "float",
    filter_fn: Filter | None = None,
) -> list[str]:
    """Put packed layers with a file's MXFP4 and NVFP4 weights in the place of nn.Linear layers.

    Their biases may have any type; what else the file holds is left alone. Rows come in the order of the file, and
    llama.cpp's converters permute those of LLaMA's q and k: undo it with `read`, for such a model.

    Args:
        names: the module for each tensor, such as {"blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj"}; None for all
            such tensors NAME.weight to go to NAME. One of 3 dimensions goes into the layers of an nn.ModuleList.
        activations: "float" or "int8" (`FP4Config`).
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: for a damaged file, or one that does not fit the model or the names. The model is unchanged then.
        OSError: if it cannot be read.
    """
    tensors = _tensors(path)
    weights = _read(tensors)
    if names is None:
        names = {name: name.removesuffix(WEIGHT) for name in weights}
    layers: dict[str, Builder] = {}
    for name, module in names.items():
        got = tensors[name].tensor_type.name if name in tensors else "none of that name"
        require(
            name in weights, f"import_: {name} must be an MXFP4 or NVFP4 tensor of the file, got {got}; correct names"
        )
        other = tensors.get(name.removesuffix(WEIGHT) + BIAS)
        bias = None
        if other is not None:
            with _reading(path):
                bias = torch.from_numpy(gguf.quants.dequantize(other.data, other.tensor_type).copy())
        layers |= fp4_layers(module, weights[name], bias, activations)
    return import_linears(model, layers, filter_fn)


@torch.no_grad()
def export(model: nn.Module, writer: gguf.GGUFWriter, names: Mapping[str, str] | None = None) -> list[str]:
    """Add every packed MXFP4 and NVFP4 layer of the model to a file in the making: its blocks, and in float32 its bias
    and its global scale.

    Args:
        writer: whoever calls writes everything else, and the file.
        names: the tensor for each module, such as {"model.layers.0.mlp.up_proj": "blk.0.ffn_up.weight"}; None for
            NAME.weight. With it, modules that it does not name are left out.
    Returns:
        The names of the layers.
    Raises:
        ValueError: for a layer whose in_features is no multiple of 32 (MXFP4) or 64, or a name that is no such layer.
    """
    layers = packed_layers(model, *KINDS)
    if names is None:
        names = {name: name + WEIGHT for name in layers}
    blocks = {}
    for name in names:
        require(name in layers, f"export: {name} must be a packed MXFP4 or NVFP4 layer of the model; correct names")
        layer = layers[name]
        try:
            blocks[name] = to_blocks(rows_of(layer), layer.scale, layer.config.format)
        except ValueError as error:
            raise ValueError(f"export: {name}: {error}") from None
    for name, rows in blocks.items():
        layer, tensor = layers[name], names[name].removesuffix(WEIGHT)
        writer.add_tensor(names[name], rows.cpu().numpy(), raw_dtype=KINDS[layer.config.format])
        if layer.global_scale is not None:
            writer.add_tensor(tensor + GLOBAL_SCALE, layer.global_scale.reshape(1).cpu().numpy())
        if layer.bias is not None:
            writer.add_tensor(tensor + BIAS, layer.bias.cpu().numpy())
    return list(names)


def _tensors(path: str | os.PathLike[str]) -> dict[str, gguf.ReaderTensor]:
    """What the file lists, mapped into memory."""
    with _reading(path):
        return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged file makes of numpy and gguf
        raise damaged(path, "GGUF", error) from None
