# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4 checkpoints as compressed-tensors and ModelOpt write them, bit for bit.

  compressed-tensors             ModelOpt
  NAME.weight_packed             NAME.weight           uint8 [n, k / 2], the first of two codes in the low nibble
  NAME.weight_scale              NAME.weight_scale     float8_e4m3fn [n, k / 16] for NVFP4; for MXFP4 uint8 [n, k / 32]
  NAME.weight_global_scale       NAME.weight_scale_2   float32 [1] or [], for NVFP4 only

The two have opposite global scales, and a number does not say which: compressed-tensors divides by its one, 2688 / amax
("divisor"), ModelOpt multiplies with its one, amax / 2688 ("multiplier"). Taken for the other, weights are off by many
orders of magnitude, so the convention is an argument everywhere.

Sources: vllm-project/compressed-tensors; NVIDIA's Model Optimizer (the second convention, which torchao shares).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..convert import Filter
from ..nn import PackedFP4Linear
from ..ops._checks import FLOATS, check_one_of, require, short_name
from ._fp4_files import (
    BLOCKS,
    Builder,
    FP4Weight,
    Source,
    bytes_of,
    fp4_layers,
    import_linears,
    packed_layers,
    read_tensors,
    reorder,
    rows_of,
    whole_blocks,
)

GLOBAL_SCALES = ("divisor", "multiplier", "none")
PACKED, SCALE, GLOBAL_SCALE = "weight_packed", "weight_scale", "weight_global_scale"
MODELOPT_PACKED, MODELOPT_GLOBAL_SCALE = "weight", "weight_scale_2"


def from_tensors(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None = None,
    convention: str = "divisor",
    nibble_order: str = "low",
) -> FP4Weight:
    """A weight of a checkpoint in the layout of `ops.mxfp4_quantize` or `ops.nvfp4_quantize`, bit for bit.

    Args:
        packed: uint8 (or float4_e2m1fn_x2) [..., k / 2].
        scale: float8_e4m3fn [..., k / 16], which makes it NVFP4, or uint8 (or float8_e8m0fnu) [..., k / 32] for MXFP4.
        global_scale: of one element, for NVFP4: what decoded values are divided by ("divisor") or multiplied with
            ("multiplier"); None for "none", which is 1.
        nibble_order: where the first of two codes is, "low" or "high" (older checkpoints of torchao).
    Raises:
        ValueError: for other dtypes or shapes, and for a global scale that is missing, not positive, or on the side of
            1 where no weights below 2688 are: it is of the other convention then.
    """
    op = "from_tensors"
    check_one_of(op, "convention", convention, GLOBAL_SCALES)
    packed = bytes_of(op, "packed", packed, "float4_e2m1fn_x2")
    nvfp4 = isinstance(scale, Tensor) and scale.dtype == torch.float8_e4m3fn
    bytes_of_scale = bytes_of(op, "scale", scale, "float8_e4m3fn", "float8_e8m0fnu")
    block = BLOCKS["nvfp4" if nvfp4 else "mxfp4"]
    require(packed.dim() >= 1, f"{op}: packed must have rows, got a scalar")
    k = 2 * packed.shape[-1]
    expected = [*packed.shape[:-1], k // block]
    require(
        k % block == 0 and list(scale.shape) == expected,
        f"{op}: scale must be float8_e4m3fn of 16 or uint8 of 32 columns a number, {expected}, and k a multiple"
        f" of {block}, got {list(scale.shape)} and k = {k}",
    )
    multiplier = _multiplier(global_scale, convention) if nvfp4 else None
    return FP4Weight("nvfp4" if nvfp4 else "mxfp4", reorder(op, packed, nibble_order), bytes_of_scale, multiplier)


def _multiplier(number: Tensor | None, convention: str) -> float | None:
    """What decoded values are multiplied with, in double precision, so that its reciprocal rounds to the file's."""
    if convention == "none":
        require(
            number is None,
            'from_tensors: global_scale must be absent with convention="none", got one; pass "divisor" or "multiplier"',
        )
        return None
    require(
        number is not None,
        f'from_tensors: global_scale must be there with convention="{convention}", got none; the weight is off by a'
        ' factor without it, so find it, or pass "none" if the file was made without one',
    )
    assert number is not None
    require(
        number.dtype in FLOATS and number.numel() == 1,
        f"from_tensors: global_scale must be one float32, got {short_name(number.dtype)} {list(number.shape)}",
    )
    value = number.item()
    require(0 < value < math.inf, f"from_tensors: global_scale must be positive and finite, got {value}")
    other, inverted = ("multiplier", value < 1) if convention == "divisor" else ("divisor", value > 1)
    require(
        not inverted,
        f"from_tensors: global_scale must be {'at least' if convention == 'divisor' else 'at most'} 1 with"
        f' convention="{convention}", as for all weights below 2688, got {value:.6g}; pass "{other}"',
    )
    return 1 / value if convention == "divisor" else value


def to_tensors(
    weight: FP4Weight, convention: str = "divisor", nibble_order: str = "low"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `from_tensors`: packed, scale (of its dtype there) and global_scale, float32 [1] or None.

    With the convention that the weight came with, all three are the checkpoint's, bit for bit. For NVFP4, "none" takes
    weights without a global scale only.

    Raises:
        ValueError: for shapes of a k that is no multiple of the block, or a convention that does not fit.
    """
    op = "to_tensors"
    check_one_of(op, "convention", convention, GLOBAL_SCALES)
    nvfp4 = weight.format == "nvfp4"
    whole_blocks(op, weight.packed, weight.scale, BLOCKS[weight.format])
    packed = reorder(op, weight.packed, nibble_order)
    if not nvfp4:
        return packed, weight.scale, None
    multiplier = weight.global_scale
    require(
        convention != "none" or multiplier in (None, 1.0),
        'to_tensors: convention must be "divisor" or "multiplier" for a weight with a global scale, got "none"',
    )
    scale = weight.scale.view(torch.float8_e4m3fn)
    if convention == "none":
        return packed, scale, None
    multiplier = 1.0 if multiplier is None else multiplier
    return packed, scale, torch.tensor([1 / multiplier if convention == "divisor" else multiplier])


def _weight(layer: PackedFP4Linear) -> FP4Weight:
    global_scale = None if layer.global_scale is None else layer.global_scale.item()
    return FP4Weight(layer.config.format, rows_of(layer), layer.scale, global_scale)


def read(source: Source, convention: str = "divisor", nibble_order: str = "low") -> dict[str, FP4Weight]:
    """Every MXFP4 and NVFP4 weight of a checkpoint by its NAME.

    Args:
        source: tensors by name, or the path of a safetensors file or of a folder of them.
    Raises:
        ValueError: for a damaged file, a weight that is not complete, or as `from_tensors`, the name first.
    """
    tensors = read_tensors(source)
    weights: dict[str, FP4Weight] = {}
    for name, packed, global_scale in _names(tensors):
        scale = tensors.get(f"{name}.{SCALE}")
        require(
            scale is not None, f"read: the file must hold {name}.{SCALE} beside {packed}; take the whole checkpoint"
        )
        assert scale is not None
        try:
            weights[name] = from_tensors(tensors[packed], scale, tensors.get(global_scale), convention, nibble_order)
        except ValueError as error:
            raise ValueError(f"read: {name}: {error}") from None
    return weights


def _names(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """NAME, the name of the packed tensor and that of the global scale, of both projects' weights."""
    for key in tensors:
        name, _, last = key.rpartition(".")
        if last == PACKED:
            yield name, key, f"{name}.{GLOBAL_SCALE}"
        if last == MODELOPT_PACKED and f"{name}.{SCALE}" in tensors and tensors[key].dtype == torch.uint8:
            yield name, key, f"{name}.{MODELOPT_GLOBAL_SCALE}"


@torch.no_grad()
def import_(
    model: nn.Module,
    source: Source,
    convention: str = "divisor",
    activations: str = "float",
    filter_fn: Filter | None = None,
    nibble_order: str = "low",
) -> list[str]:
    """Put packed layers with a checkpoint's codes, scales and biases in the place of nn.Linear layers.

    All other tensors, those of activations' scales included, are left alone; the dense ones are
    `model.load_state_dict(tensors, strict=False)`.

    Args:
        source: as for `read`; NAME is the name of an nn.Linear of the model.
        convention: what NVFP4's global scales are: "divisor", "multiplier" or "none".
        activations: "float" or "int8" (`FP4Config`).
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: for a checkpoint that does not fit the model, the layer's name first. The model is unchanged then.
    """
    tensors = read_tensors(source)
    layers: dict[str, Builder] = {}
    for name, weight in read(tensors, convention, nibble_order).items():
        layers |= fp4_layers(name, weight, tensors.get(f"{name}.bias"), activations)
    return import_linears(model, layers, filter_fn)


@torch.no_grad()
def export(model: nn.Module, convention: str = "divisor", nibble_order: str = "low") -> dict[str, Tensor]:
    """The model's state_dict with the tensors of this format for every packed MXFP4 or NVFP4 layer: those of ModelOpt
    with "multiplier", else those of compressed-tensors. Ready for `safetensors.torch.save_file` and for `import_`.

    A layer keeps a multiplier: with "divisor" its reciprocal is rounded, to within the last bit of what was imported.

    Raises:
        ValueError: for a layer whose in_features is no multiple of the block, the name first.
    """
    state = dict(model.state_dict())
    for name, layer in packed_layers(model, *BLOCKS).items():
        try:
            packed, scale, global_scale = to_tensors(_weight(layer), convention, nibble_order)
        except ValueError as error:
            raise ValueError(f"export: {name}: {error}") from None
        for buffer in ("weight", "scale", "global_scale"):
            state.pop(f"{name}.{buffer}", None)
        modelopt = convention == "multiplier"
        state[f"{name}.{MODELOPT_PACKED if modelopt else PACKED}"] = packed
        state[f"{name}.{SCALE}"] = scale
        if global_scale is not None:
            state[f"{name}.{MODELOPT_GLOBAL_SCALE if modelopt else GLOBAL_SCALE}"] = global_scale
    return state
