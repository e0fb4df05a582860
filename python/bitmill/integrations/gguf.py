# SPDX-License-Identifier: Apache-2.0
"""MXFP4 tensors of GGUF files, taken and written as they are, bit for bit.

A row of ggml's MXFP4 is one block after another, each of 17 bytes for 32 columns: the E8M0 scale, and 16 bytes whose
low nibbles are columns 0 ... 15 and whose high nibbles are columns 16 ... 31. Codes and scales mean what they do in
`ops.mxfp4_quantize`, but for the scale 255, which is NaN here and 2^128 in ggml.

`language.read_pretrained` makes floats of a GGUF file instead, of any of its types.

Source: ggml (the blocks), llama.cpp's gguf package (the file).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..convert import Filter
from ..ops._checks import require
from ..ops.fp4 import MX_BLOCK, pack_nibbles, unpack_nibbles
from ._fp4_files import (
    Builder,
    FP4Weight,
    bytes_of,
    damaged,
    fp4_layers,
    import_linears,
    mxfp4_layers,
    rows_of,
    whole_blocks,
)

try:
    import gguf
except ImportError:
    raise ImportError("bitmill.integrations.gguf needs gguf, which is not installed: pip install gguf") from None

BLOCK_BYTES = 17
WEIGHT, BIAS = ".weight", ".bias"


def from_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ggml's MXFP4 blocks as `ops.mxfp4_quantize` has them.

    Args:
        blocks: uint8 [..., 17 groups].
    Returns:
        packed uint8 [..., 16 groups] and scale uint8 [..., groups], of 32 groups columns.
    Raises:
        ValueError: for another dtype, or rows that are not whole blocks.
    """
    blocks = bytes_of("from_blocks", "blocks", blocks)
    require(
        blocks.dim() >= 1 and blocks.shape[-1] % BLOCK_BYTES == 0,
        f"from_blocks: blocks must have rows of a multiple of 17 bytes, got shape {list(blocks.shape)}; k must be a"
        " multiple of 32",
    )
    scale, halves = blocks.unflatten(-1, (blocks.shape[-1] // BLOCK_BYTES, BLOCK_BYTES)).split([1, BLOCK_BYTES - 1], -1)
    codes = torch.cat([halves & 15, halves >> 4], -1)
    return pack_nibbles(codes.flatten(-2)), scale.squeeze(-1).contiguous()


def to_blocks(packed: Tensor, scale: Tensor) -> Tensor:
    """Undo `from_blocks`: uint8 [..., 17 groups].

    Raises:
        ValueError: for other dtypes or shapes, such as those of a k that is no multiple of 32.
    """
    packed, scale = whole_blocks("to_blocks", packed, scale)
    low, high = unpack_nibbles(packed, MX_BLOCK).split(MX_BLOCK // 2, -1)
    return torch.cat([scale.unsqueeze(-1), low | high << 4], -1).flatten(-2)


def read(path: str | os.PathLike[str]) -> dict[str, FP4Weight]:
    """Every MXFP4 tensor of a GGUF file by its name, [rows, columns] or [experts, rows, columns].

    Raises:
        ValueError: for a damaged file.
        OSError: if it cannot be read.
    """
    return {
        tensor.name: FP4Weight("mxfp4", *from_blocks(torch.from_numpy(tensor.data.copy())))
        for tensor in _tensors(path)
        if tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
    }


@torch.no_grad()
def import_(
    model: nn.Module,
    path: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
    activations: str = "float",
    filter_fn: Filter | None = None,
) -> list[str]:
    """Put packed layers with a file's MXFP4 weights in the place of nn.Linear layers, with its biases of any type.

    What else the file holds is left alone. Rows come in the order of the file, and llama.cpp's converters permute those
    of LLaMA's q and k: undo it with `read`, for such a model.

    Args:
        names: the module for each tensor, such as {"blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj"}; None for all
            MXFP4 tensors NAME.weight to go to NAME. A tensor of 3 dimensions goes into the layers of an nn.ModuleList.
        activations: "float" or "int8" (`FP4Config`).
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: for a damaged file, or one that does not fit the model or the names. The model is unchanged then.
        OSError: if it cannot be read.
    """
    tensors = {tensor.name: tensor for tensor in _tensors(path)}
    weights = read(path)
    if names is None:
        names = {name: name.removesuffix(WEIGHT) for name in weights}
    layers: dict[str, Builder] = {}
    for name, module in names.items():
        got = tensors[name].tensor_type.name if name in tensors else "none of that name"
        require(name in weights, f"import_: {name} must be an MXFP4 tensor of the file, got {got}; correct names")
        other = tensors.get(name.removesuffix(WEIGHT) + BIAS)
        bias = None
        if other is not None:
            with _reading(path):
                bias = torch.from_numpy(gguf.quants.dequantize(other.data, other.tensor_type))
        layers |= fp4_layers(module, weights[name], bias, activations)
    return import_linears(model, layers, filter_fn)


@torch.no_grad()
def export(model: nn.Module, writer: gguf.GGUFWriter, names: Mapping[str, str] | None = None) -> list[str]:
    """Add every packed MXFP4 layer of the model to a file in the making: its blocks, and its bias in float32.

    Args:
        writer: whoever calls writes everything else, and the file.
        names: the tensor for each module, such as {"model.layers.0.mlp.up_proj": "blk.0.ffn_up.weight"}; None for
            NAME.weight. With it, modules that it does not name are left out.
    Returns:
        The names of the layers.
    Raises:
        ValueError: for a layer whose in_features is no multiple of 32, or a name that is no such layer.
    """
    packed = mxfp4_layers(model)
    if names is None:
        names = {name: name + WEIGHT for name in packed}
    blocks = {}
    for name in names:
        require(name in packed, f"export: {name} must be a packed MXFP4 layer of the model; correct names")
        try:
            blocks[name] = to_blocks(rows_of(packed[name]), packed[name].scale)
        except ValueError as error:
            raise ValueError(f"export: {name}: {error}") from None
    for name, rows in blocks.items():
        writer.add_tensor(names[name], rows.cpu().numpy(), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        bias = packed[name].bias
        if bias is not None:
            writer.add_tensor(names[name].removesuffix(WEIGHT) + BIAS, bias.cpu().numpy())
    return list(names)


def _tensors(path: str | os.PathLike[str]) -> list[gguf.ReaderTensor]:
    """What the file lists, mapped into memory."""
    with _reading(path):
        return gguf.GGUFReader(path).tensors


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged file makes of numpy and gguf
        raise damaged(path, "GGUF", error) from None
