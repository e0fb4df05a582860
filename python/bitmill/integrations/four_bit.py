# SPDX-License-Identifier: Apache-2.0
"""Folders of language models that other projects quantised to 4-bit floats, from the files' bits to packed layers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import shorten
from . import bitsandbytes, compressed_tensors, gpt_oss
from ._fp4_files import read_tensors
from .language import LanguageModel, empty_model, reading

Importer = Callable[[nn.Module, Mapping[str, Tensor], str], list[str]]


def _gpt_oss(model: nn.Module, tensors: Mapping[str, Tensor], activations: str) -> list[str]:
    gpt_oss.split_experts_(model)
    return gpt_oss.import_(model, tensors, activations)


def _compressed_tensors(model: nn.Module, tensors: Mapping[str, Tensor], activations: str) -> list[str]:
    return compressed_tensors.import_(model, tensors, "divisor", activations)


def _modelopt(model: nn.Module, tensors: Mapping[str, Tensor], activations: str) -> list[str]:
    return compressed_tensors.import_(model, tensors, "multiplier", activations)


def _bitsandbytes(model: nn.Module, tensors: Mapping[str, Tensor], activations: str) -> list[str]:
    if activations != "float":
        raise ValueError(
            f'activations must be "float" for bitsandbytes, whose values are no integers, got {activations!r}'
        )
    return bitsandbytes.import_(model, tensors)


METHODS: dict[str, Importer] = {  # by what config.json calls them
    "mxfp4": _gpt_oss,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
}


def is_four_bit(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is one for `read_four_bit`, by its config."""
    return _quant_method(Path(folder)) in METHODS


def _quant_method(folder: Path) -> str | None:
    """What config.json has as quantization_config.quant_method, if it has."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None


def read_four_bit(folder: str | os.PathLike[str], activations: str = "float") -> LanguageModel:
    """A folder as it is published, as a model whose packed layers hold the same weights; nothing is dequantised.

    config.json names the method in quantization_config.quant_method: "mxfp4" (gpt-oss), "compressed-tensors",
    "modelopt" or "bitsandbytes". What is not quantised keeps its dtype; activations that a method quantises stay
    floats.

    Args:
        activations: "float" or, but for bitsandbytes, "int8" (faster, less exact).
    Raises:
        ValueError: for a folder that is not complete or of another method, or whose files do not fit the model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"read_four_bit: {folder} must be a folder with config.json and safetensors; it has no config")
    method = _quant_method(folder)
    if method not in METHODS:
        raise ValueError(
            f"read_four_bit: {folder} must have a quant_method of {', '.join(METHODS)}, got {shorten(method)}; a model"
            " that is not quantised is for bitmill.integrations.language.read_pretrained"
        )
    model, tokenizer = empty_model(folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # packed layers say it themselves
    tensors = read_tensors(folder)
    try:
        names = METHODS[method](model, tensors, activations)
    except ValueError as error:
        raise ValueError(f"read_four_bit: {folder}: {error}") from None
    packed, wanted = tuple(f"{name}." for name in names), model.state_dict().keys()
    others = {key: t for key, t in tensors.items() if not key.startswith(packed)}
    left = [key for key in tensors if key.endswith(".pre_quant_scale")]
    left += [key for key in others if key.endswith(".weight_scale") and key.removesuffix("_scale") in others]
    left += [key for key, t in others.items() if key in wanted and t.element_size() == 1 and t.dtype != torch.bool]
    if left:
        raise ValueError(f"read_four_bit: {folder} must have 4-bit floats and no other numbers, got {shorten(left[0])}")
    dense = {key: t.clone() for key, t in others.items() if key in wanted}  # files are only mapped
    with reading(folder):
        model.load_state_dict(dense, strict=False, assign=True)
        model.tie_weights()
    missing = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if missing:
        raise ValueError(f"read_four_bit: {folder} must hold the whole model, {missing[0]} is missing; copy it again")
    return LanguageModel(model.eval(), tokenizer)
