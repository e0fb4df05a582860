# SPDX-License-Identifier: Apache-2.0
"""Models in folders: transformers' own, or a GGUF file, and packed ones that load with one call.

They are causal language models, or encoders of texts or images if their config names such a class. A packed folder
holds the config and the tokenizer as transformers writes them, and `packed.safetensors` of `bitmill.save`. It names no
other place, so it can be moved.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint import load, save
from ..config import Int8Config
from ..convert import replace_modules
from ..nn import PackedInt8Embedding, PackedInt8Linear
from ..nn._module import PackedModule
from ..ops.int8 import ACTIVATIONS
from .transformers import PreTrainedModel, transformers

PACKED_FILE = "packed.safetensors"


class LanguageModel(NamedTuple):
    """A transformers model in eval mode, and its tokenizer, None for a model of images."""

    model: Any
    tokenizer: Any


def takes_images(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    """Whether a model's input is images, not tokens."""
    return model.main_input_name == "pixel_values"


def is_causal(config: Any) -> bool:
    """Whether a config is that of a causal language model: its class says so, or it names none."""
    names = config.architectures or ["ForCausalLM"]
    return names[0].endswith(("ForCausalLM", "LMHeadModel"))


def _classes(config: Any) -> tuple[Any, Any]:
    """What makes the model that a config describes and, unless it takes images, its tokenizer."""
    if is_causal(config):
        return transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    kind = getattr(transformers, config.architectures[0])
    return kind, None if takes_images(kind) else transformers.AutoTokenizer


def read_pretrained(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model that is not quantised: a folder as transformers writes it, or a GGUF file, which is dequantised.

    GPT-2's Conv1D layers become the nn.Linear layers that they are.

    Raises:
        ValueError: if there is no such model, or transformers cannot read it.
        ImportError: if reading a GGUF file needs a package that is not installed.
    """
    path = Path(path)
    options: dict[str, Any] = {}
    folder = path
    if path.suffix == ".gguf" and path.is_file():
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError(f"{path} needs accelerate, which is not installed: pip install accelerate")
        folder, options["gguf_file"] = path.parent, path.name
    elif not (path / "config.json").is_file():
        raise ValueError(
            f"the model must be a folder with config.json and safetensors, or a .gguf file, got {path}; take one of"
            " those"
        )
    elif (path / PACKED_FILE).exists():
        raise ValueError(f"the model must not be quantised yet, {path} has a {PACKED_FILE}; take the original")
    with reading(path):
        kind, tokens = _classes(transformers.AutoConfig.from_pretrained(folder, **options))
        tokenizer = tokens and tokens.from_pretrained(folder, **options)
        # Newer transformers multiply with GGUF's blocks as they are, unless told not to.
        if options and hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = kind.from_pretrained(folder, dtype=dtype, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _conv1d_to_linear_(model)
    return LanguageModel(model.eval(), tokenizer)


def int8_tables_(model: PreTrainedModel, config: Int8Config) -> list[str]:
    """Swap the token embedding and the output head for 8-bit rows, in place; tied ones stay one.

    A table of another class than nn.Embedding, which may scale its rows, stays as it is, and so does a head tied to it.

    Returns:
        The names that were swapped.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    replacements: dict[nn.Module, nn.Module] = {}
    tied = head is not None and head.weight is table.weight
    if type(table) is nn.Embedding:
        replacements[table] = packed = PackedInt8Embedding.from_embedding(table, config)
        if tied:
            replacements[head] = packed.as_linear(head.bias)
    if type(head) is nn.Linear and not tied:
        replacements[head] = PackedInt8Linear.from_linear(head, config)
    names = [name for name, module in model.named_modules() if module in replacements]
    replace_modules(model, replacements)
    return names


def save_pretrained(model: PreTrainedModel, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a packed folder for `load_pretrained`. The weights come last and whole, so that a folder that has them
    is complete.

    Raises:
        OSError: if a file cannot be written.
        ValueError: as `bitmill.save`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:  # encoders have none
        model.generation_config.save_pretrained(folder)
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library has no exception of its own for a full disk
        raise OSError(f"the tokenizer cannot be written to {folder}: {_in_one_line(error)}") from None
    save(model, folder / PACKED_FILE)


def load_pretrained(folder: str | os.PathLike[str], activations: str | None = None) -> LanguageModel:
    """The model and the tokenizer of a packed folder.

    Args:
        activations: "float" or "int8" (faster, less exact) for every packed layer that has the choice, whatever the
            folder was made for; None for what it was made for. The buffers are the same either way: a folder that was
            made for int8 activations may store salient weights in the encoding that is faster with them.
    Raises:
        ValueError: for a folder that is not complete, or whose files were altered, or for activations that its layers
            do not take.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", PACKED_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} must hold a packed model, {missing[0]} is missing; run `bitmill quantize` to its end"
        )
    model, tokenizer = empty_model(folder)
    load(model, folder / PACKED_FILE)
    if activations is not None:
        _set_activations_(model, activations)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return LanguageModel(model.eval(), tokenizer)


def empty_model(folder: Path) -> LanguageModel:
    """The model that a folder's config describes, on the meta device but for tables that no file holds."""
    with reading(folder):
        config = transformers.AutoConfig.from_pretrained(folder)
        kind, tokens = _classes(config)
        tokenizer = tokens and tokens.from_pretrained(folder)
        with torch.device("meta"):
            make = kind.from_config if is_causal(config) else kind._from_config
            model = make(config, dtype=config.dtype)
    _conv1d_to_linear_(model)
    for module in model.modules():  # tables such as those of rotary embeddings
        for name in module._non_persistent_buffers_set:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if module._non_persistent_buffers_set:
            model._init_weights(module)
    return LanguageModel(model, tokenizer)


def _set_activations_(model: nn.Module, activations: str) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"load_pretrained: activations must be one of 'float', 'int8', got {activations!r}")
    layers = [module for module in model.modules() if isinstance(module, PackedModule)]
    choosing = [layer for layer in layers if layer.config.takes_activations(activations)]
    if not choosing:
        raise ValueError(
            f"load_pretrained: activations must be None for layers that have no choice of them, got {activations!r}"
        )
    for layer in choosing:
        layer.set_activations(activations)


def _conv1d_to_linear_(model: nn.Module) -> None:
    """y = x W + b with W [k, n] is nn.Linear with W^T."""
    from transformers.pytorch_utils import Conv1D

    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if type(module) is Conv1D:
            weight = module.get_parameter("weight")
            k, n = weight.shape
            linear = nn.Linear(k, n, device="meta")
            linear.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
            linear.bias = module.get_parameter("bias")
            replacements[module] = linear.train(module.training)
    replace_modules(model, replacements)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What transformers and its parts raise for a broken folder, as one sentence."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{path} needs a package that is not installed: {_in_one_line(error)}") from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a model: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")
