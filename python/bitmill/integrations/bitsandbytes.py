# SPDX-License-Identifier: Apache-2.0
"""4-bit state dicts of bitsandbytes, NF4 and its FP4, with one or two levels of scales, without loss.

For every layer NAME, Linear4bit writes beside its bias:

  NAME.weight                            uint8 [n k / 2, 1]: codes of the flattened weight, the first of two high
  NAME.weight.absmax                     float32 [blocks]: what the values of `blocksize` codes are multiplied with
  NAME.weight.quant_map                  float32 [16]: the values of codes
  NAME.weight.quant_state.bitsandbytes__nf4 (or __fp4)   uint8: JSON with the kind, the blocksize and the shape

With double quantisation absmax is uint8, codes of NAME.weight.nested_quant_map, float32 [256], and
absmax = fl(fl(map[code] nested_absmax[block]) + offset), with blocks of nested_blocksize codes and the offset in the
JSON. The packed layer keeps absmax itself, float32.

Blocks run over the flattened weight. A layer has scales for groups of columns, so a block that goes beyond its row
becomes groups of gcd(k, blocksize) columns, which have its scale. (Where k is no multiple of blocksize, the CPU kernels
of bitsandbytes 0.50.2 take scales of other blocks than its quantiser wrote; its definition is followed here.)

Source: bitsandbytes 0.50 (functional.QuantState, nn.Linear4bit).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..config import FP4Config, shorten
from ..convert import Filter
from ..nn import PackedFP4Linear
from ..ops import code_values, codebook4_dequantize
from ..ops._checks import ceil_div, require, short_name
from ..ops.fp4 import unpack_nibbles
from ._fp4_files import (
    Builder,
    Source,
    bytes_of,
    import_linears,
    packed_layers,
    read_tensors,
    reorder,
    require_finite_scales,
    require_fit,
    rows_of,
)

FORMATS = {"nf4": "nf4", "fp4": "bnb-fp4"}  # of ops.code_values
STATE = ".weight.quant_state.bitsandbytes__"
STORAGES = ("bfloat16", "float16", "float32")  # of quant_storage besides uint8
MAX_STATE = 1 << 16  # bytes of the JSON, which takes about 200


class Codebook4Weight(NamedTuple):
    """A weight [n, k] as `ops.codebook4_dequantize` takes it: packed uint8 [n, k / 2], scale float32 [n, groups]."""

    packed: Tensor
    scale: Tensor
    codebook: str
    k: int
    group_size: int

    def dequantize(self) -> Tensor:
        """float32 [n, k]; what bitsandbytes' dequantize_4bit answers for float32, bit for bit."""
        return codebook4_dequantize(*self)


class _State(NamedTuple):
    """What the JSON says, checked."""

    blocksize: int
    n: int
    k: int
    nested_blocksize: int
    nested_offset: float


def _state(kind: str, t: Tensor, nested: bool) -> _State:
    data = bytes_of("read", "quant_state", t)
    try:
        values = json.loads(bytes(data.flatten().tolist())) if data.numel() <= MAX_STATE else None
    except (ValueError, RecursionError):
        values = None

    def whole(value: Any) -> TypeGuard[int]:
        return type(value) is int and 1 <= value <= 1 << 40

    if not isinstance(values, dict):
        raise ValueError("quant_state must be a JSON object of a sensible size; the file is damaged")
    shape, blocksize = values.get("shape"), values.get("blocksize")
    require(
        values.get("quant_type") == kind,
        f"quant_type must be {kind!r} as in the name, got {shorten(values.get('quant_type'))}",
    )
    if not whole(blocksize):
        raise ValueError(f"blocksize must be a positive number, got {shorten(blocksize)}")
    if not (type(shape) is list and len(shape) == 2 and all(whole(size) for size in shape)):
        raise ValueError(f"shape must be [n, k], got {shorten(shape)}")
    nested_blocksize, offset = values.get("nested_blocksize", 1), values.get("nested_offset", 0.0)
    if nested:
        require(whole(nested_blocksize), f"nested_blocksize must be a positive number, got {shorten(nested_blocksize)}")
        fits = type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
        require(fits, f"nested_offset must be a finite float32, got {shorten(offset)}")
    return _State(blocksize, shape[0], shape[1], nested_blocksize, offset)


def _part(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype, size: int) -> Tensor:
    """A tensor of the state dict, flat."""
    t = tensors.get(key)
    require(t is not None, f"{key} must be there, got none; take the whole checkpoint")
    assert t is not None
    require(
        t.dtype == dtype and t.numel() == size,
        f"{key} must be {short_name(dtype)} of {size} elements, got {short_name(t.dtype)} {list(t.shape)}",
    )
    return t.flatten()


def _absmax(tensors: Mapping[str, Tensor], weight: str, state: _State, nested: bool) -> Tensor:
    """float32 [blocks]."""
    blocks = ceil_div(state.n * state.k, state.blocksize)
    if not nested:
        return _part(tensors, f"{weight}.absmax", torch.float32, blocks)
    codes = _part(tensors, f"{weight}.absmax", torch.uint8, blocks)
    values = _part(tensors, f"{weight}.nested_quant_map", torch.float32, 256)
    size = state.nested_blocksize
    scales = _part(tensors, f"{weight}.nested_absmax", torch.float32, ceil_div(blocks, size))
    return values[codes.int()] * scales[torch.arange(blocks, device=scales.device) // size] + state.nested_offset


def _weight(tensors: Mapping[str, Tensor], name: str, kind: str) -> Codebook4Weight:
    weight = f"{name}.weight"
    nested = f"{weight}.nested_absmax" in tensors
    state = _state(kind, tensors[f"{name}{STATE}{kind}"], nested)
    n, k = state.n, state.k
    require(weight in tensors, f"{weight} must be there, got none; take the whole checkpoint")
    data = bytes_of("read", weight, tensors[weight], *STORAGES).flatten()
    require(
        data.numel() == ceil_div(n * k, 2),
        f"{weight} must have {ceil_div(n * k, 2)} bytes for shape {[n, k]}, got {data.numel()}; the file is truncated",
    )
    values = _part(tensors, f"{weight}.quant_map", torch.float32, 16)
    table = torch.tensor(code_values(FORMATS[kind]), device=values.device)
    require(torch.equal(values, table), f"{weight}.quant_map must be the table of {kind!r}, got another one")
    group = math.gcd(k, state.blocksize)
    require(
        group % 8 == 0,
        f"k and blocksize must share a factor of 8, got k = {k} and blocksize = {state.blocksize}, whose blocks end"
        " in the middle of rows; dequantise this layer",
    )
    absmax = _absmax(tensors, weight, state, nested)
    first = torch.arange(0, n * k, group, device=absmax.device)
    scale = absmax[first // state.blocksize].view(n, k // group)
    return Codebook4Weight(reorder("read", data, "high").view(n, k // 2), scale, FORMATS[kind], k, group)


def read(source: Source) -> dict[str, Codebook4Weight]:
    """Every 4-bit weight of a state dict by the NAME of its layer.

    Args:
        source: tensors by name, or the path of a safetensors file or of a folder of them.
    Raises:
        ValueError: for a damaged file, tensors that are missing or contradict each other, another table than that of
            the kind, or blocks that end in the middle of rows but for multiples of 8 columns; the name first.
    """
    tensors = read_tensors(source)
    weights: dict[str, Codebook4Weight] = {}
    for key in tensors:
        name, found, kind = key.rpartition(STATE)
        if found:
            require(kind in FORMATS, f"read: {name}: the kind must be nf4 or fp4, got {shorten(kind)}")
            try:
                weights[name] = _weight(tensors, name, kind)
            except ValueError as error:
                raise ValueError(f"read: {name}: {error}") from None
    return weights


def _layer(linear: nn.Linear, weight: Codebook4Weight, bias: Tensor | None) -> PackedFP4Linear:
    require_fit(linear, weight.packed.shape[0], weight.k, bias)
    require_finite_scales(weight.scale, weight.group_size)
    config = FP4Config(weight.codebook, group_size=weight.group_size)
    codes = unpack_nibbles(weight.packed, weight.k)
    return PackedFP4Linear.from_parts(codes, weight.scale, bias, config).train(linear.training)


@torch.no_grad()
def import_(model: nn.Module, source: Source, filter_fn: Filter | None = None) -> list[str]:
    """Put packed layers with a state dict's codes, scales and biases in the place of nn.Linear layers.

    All other tensors are left to `model.load_state_dict(tensors, strict=False)`.

    Args:
        source: as for `read`; NAME is the name of an nn.Linear of the model (transformers makes one with
            `AutoModelForCausalLM.from_config`).
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: for a state dict that does not fit the model, the layer's name first, or groups of 8 columns, which
            layers do not take. The model is unchanged then.
    """
    tensors = read_tensors(source)
    layers: dict[str, Builder] = {
        name: partial(_layer, weight=weight, bias=tensors.get(f"{name}.bias")) for name, weight in read(tensors).items()
    }
    return import_linears(model, layers, filter_fn)


@torch.no_grad()
def export(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict with bitsandbytes' tensors for every packed layer of format "nf4" or "bnb-fp4", with one
    level of scales: ready for `safetensors.torch.save_file`, for `import_` and for bitsandbytes.

    Raises:
        ValueError: for a layer whose in_features is no multiple of its group_size, the name first.
    """
    state = dict(model.state_dict())
    kinds = {format: kind for kind, format in FORMATS.items()}
    for name, layer in packed_layers(model, *kinds).items():
        kind, k = kinds[layer.config.format], layer.in_features
        size = layer.config.group_size or k
        require(
            k % size == 0,
            f"export: {name}: in_features must be a multiple of group_size = {size}, got {k}; blocks of bitsandbytes"
            " run over the flattened weight",
        )
        facts = {"quant_type": kind, "blocksize": size, "dtype": "float32", "shape": list(layer.weight_shape())}
        weight = f"{name}.weight"
        state[weight] = reorder("export", rows_of(layer), "high").view(-1, 1)
        state[f"{weight}.absmax"] = state.pop(f"{name}.scale").flatten()
        state[f"{weight}.quant_map"] = torch.tensor(code_values(layer.config.format))
        state[f"{name}{STATE}{kind}"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return state
