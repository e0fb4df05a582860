# SPDX-License-Identifier: Apache-2.0
"""FP4 tensors in the files of other projects: what their importers and exporters share.

Everything a file holds is checked here or by the importer before a model changes. The common form is that of ops.fp4:
rows of codes uint8 [..., k / 2], the first in the low nibble, and a row of scales.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from ..config import FP4Config, shorten
from ..convert import Filter, replace_modules, require_bare
from ..nn import PackedFP4Linear
from ..ops import mxfp4_dequantize, nvfp4_dequantize, tile_unpack
from ..ops._checks import FLOATS, check_one_of, require, short_name
from ..ops.fp4 import MX_BLOCK, pack_nibbles, unpack_nibbles
from ..ops.fp4_linear import scale_values
from ..ops.nvfp4 import NV_BLOCK

NIBBLE_ORDERS = ("low", "high")
BLOCKS = {"mxfp4": MX_BLOCK, "nvfp4": NV_BLOCK}
Builder = Callable[[nn.Linear], nn.Module]
Source = Mapping[str, Tensor] | str | os.PathLike[str]


class FP4Weight(NamedTuple):
    """A weight of a file in the layout of ops.

    format "mxfp4": packed uint8 [..., k / 2] and scale uint8 [..., k / 32], E8M0, as of `ops.mxfp4_quantize`.
    format "nvfp4": scale uint8 [..., k / 16], E4M3, as of `ops.nvfp4_quantize`, and what decoded values are multiplied
    with besides, or None for 1. It has double precision, so that also its reciprocal is that of the file.
    """

    format: str
    packed: Tensor
    scale: Tensor
    global_scale: float | None = None

    def multiplier(self) -> Tensor:
        """The global scale as the ops take it, float32 []."""
        value = 1.0 if self.global_scale is None else self.global_scale
        return torch.tensor(value, dtype=torch.float32, device=self.scale.device)

    def dequantize(self) -> Tensor:
        """float32 [..., k]; a block whose scale is NaN is NaN."""
        k = 2 * self.packed.shape[-1]
        if self.format == "mxfp4":
            return mxfp4_dequantize(self.packed, self.scale, k)
        return nvfp4_dequantize(self.packed, self.scale, k, self.multiplier())


def read_tensors(source: Source) -> Mapping[str, Tensor]:
    """A mapping as it is; else the tensors of a safetensors file, or of all such files in a folder.

    Raises:
        ValueError: if there is no such file, one is damaged, or two have a tensor of the same name.
    """
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    there = bool(files) and all(file.is_file() for file in files)
    require(there, f"{path} must be a safetensors file or a folder of them, got neither")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what a damaged header makes of safetensors and torch
            raise damaged(file, "safetensors", error) from None
        twice = sorted(found.keys() & tensors.keys())
        require(not twice, f"{path} must hold every tensor once, got {shorten(twice[0]) if twice else ''} twice")
        tensors.update(found)
    return tensors


def damaged(path: str | os.PathLike[str], kind: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{os.fspath(path)} cannot be read as a {kind} file: {reason}; copy it again")


def bytes_of(op: str, name: str, t: Tensor, *aliases: str) -> Tensor:
    """uint8, or one of torch's dtypes `aliases` (by name; older releases lack some), as uint8; flat for wider ones.

    Raises:
        ValueError: for another dtype or layout.
    """
    allowed = [torch.uint8, *(getattr(torch, alias) for alias in aliases if hasattr(torch, alias))]
    fits = isinstance(t, Tensor) and t.dtype in allowed and t.layout == torch.strided
    require(
        fits,
        f"{op}: {name} must be {' or '.join(map(short_name, allowed))}, got"
        f" {short_name(t.dtype) if isinstance(t, Tensor) else type(t).__name__}; load the tensor as the file has it",
    )
    t = t if t.element_size() == 1 else t.contiguous().flatten()
    return t.view(torch.uint8).contiguous()


def reorder(op: str, codes: Tensor, nibble_order: str) -> Tensor:
    """Bytes whose first code is in the low nibble from ones that have it in `nibble_order`, and back."""
    check_one_of(op, "nibble_order", nibble_order, NIBBLE_ORDERS)
    return codes if nibble_order == "low" else codes << 4 | codes >> 4


def whole_blocks(op: str, packed: Tensor, scale: Tensor, block: int = MX_BLOCK) -> tuple[Tensor, Tensor]:
    """What the ops answer, for rows without a partial block: packed uint8 [..., groups, block / 2] and the scale.

    Raises:
        ValueError: for other dtypes or shapes.
    """
    packed, scale = bytes_of(op, "packed", packed), bytes_of(op, "scale", scale)
    require(packed.dim() >= 1 and scale.dim() >= 1, f"{op}: packed and scale must have rows, got a scalar")
    *rows, groups = scale.shape
    expected = [*rows, groups * block // 2]
    require(
        list(packed.shape) == expected,
        f"{op}: packed must have shape {expected} for these scales, got {list(packed.shape)}; the format has no partial"
        f" blocks, so k must be a multiple of {block}",
    )
    return packed.unflatten(-1, (groups, block // 2)), scale


def packed_layers(model: nn.Module, *formats: str) -> dict[str, PackedFP4Linear]:
    """The packed FP4 layers of a model that have one of these formats, under all their names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedFP4Linear) and module.config.format in formats
    }


def rows_of(layer: PackedFP4Linear) -> Tensor:
    """The codes of a packed layer, two a byte, uint8 [n, ceil(k / 2)]."""
    return pack_nibbles(tile_unpack(layer.weight, *layer.weight_shape(), 4).int())


def require_fit(linear: nn.Linear, n: int, k: int, bias: Tensor | None) -> None:
    """That a weight [n, k] and a bias of a file are as large as the model's."""
    expected = [linear.out_features, linear.in_features]
    require([n, k] == expected, f"the weight must have shape {expected} as in the model, got {[n, k]} in the file")
    require(
        (bias is None) == (linear.bias is None)
        and (bias is None or (list(bias.shape) == [n] and bias.dtype in FLOATS)),
        f"the bias must be {'absent' if linear.bias is None else f'of floats {[n]}'} as in the model, got"
        f" {'none' if bias is None else f'{short_name(bias.dtype)} {list(bias.shape)}'} in the file",
    )


def require_finite_scales(values: Tensor, block: int) -> None:
    """That none of the scales [n, groups] is NaN or infinite."""
    bad = ~values.isfinite()
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the scales must be finite, row {row} has {values[row, group].item()} for columns {block * group} to"
            f" {block * (group + 1) - 1}; quantise the weight again without NaN and infinity"
        )


def fp4_layer(linear: nn.Linear, weight: FP4Weight, bias: Tensor | None, activations: str) -> PackedFP4Linear:
    """The packed form of `linear` with the weight and the bias of a file.

    Raises:
        ValueError: for another size than the layer's, and a block whose scale is NaN.
    """
    k = 2 * weight.packed.shape[1]
    require_fit(linear, weight.packed.shape[0], k, bias)
    global_scale = weight.multiplier() if weight.format == "nvfp4" else None
    require_finite_scales(scale_values(weight.scale, global_scale), BLOCKS[weight.format])
    config = FP4Config(weight.format, activations=activations)
    codes = unpack_nibbles(weight.packed, k)
    packed = PackedFP4Linear.from_parts(codes, weight.scale.clone(), bias, config, global_scale)
    return packed.train(linear.training)


def fp4_layers(module: str, weight: FP4Weight, bias: Tensor | None, activations: str) -> dict[str, Builder]:
    """What `import_linears` takes for a weight [n, k], or [experts, n, k] for the layers of an nn.ModuleList."""
    dims = weight.packed.dim()
    if dims == 2:
        return {module: partial(fp4_layer, weight=weight, bias=bias, activations=activations)}
    experts = weight.packed.shape[0]
    require(
        dims == 3 and (bias is None or (bias.dim() == 2 and len(bias) == experts)),
        f"import_: {module} must have a weight of 2 dimensions, or one of 3 and a bias of 2 for a list of layers, got a"
        f" weight of {dims}" + ("" if bias is None else f" and a bias of shape {list(bias.shape)}"),
    )
    layers: dict[str, Builder] = {}
    for expert in range(experts):
        part = weight._replace(packed=weight.packed[expert], scale=weight.scale[expert])
        own = None if bias is None else bias[expert]
        layers[f"{module}.{expert}"] = partial(fp4_layer, weight=part, bias=own, activations=activations)
    return layers


def import_linears(model: nn.Module, layers: Mapping[str, Builder], filter_fn: Filter | None) -> list[str]:
    """Put layers[name](linear) in the place of the nn.Linear of that name, for all names, or leave the model unchanged.

    Returns:
        The names, under which `layers` has them.
    Raises:
        ValueError: if there is no such nn.Linear, or as a layer's function raises it, with the name.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    present = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    names = []
    for name, packed in layers.items():
        linear = present.get(name)
        if filter_fn is not None and linear is not None and not filter_fn(linear, name):
            continue
        if type(linear) is not nn.Linear:
            got = "none of that name" if linear is None else type(linear).__name__
            raise ValueError(f"import_: {name!r} must be a torch.nn.Linear of the model, got {got}; take its own model")
        try:
            require_bare(linear)
            layer = packed(linear)
        except ValueError as error:
            raise ValueError(f"import_: {name}: {error}") from None
        device = linear.weight.device
        replacements[linear] = layer if device.type == "meta" else layer.to(device)
        names.append(name)
    require(bool(names), "import_: there must be a layer in this format that filter_fn accepts, got none")
    replace_modules(model, replacements)
    return names
