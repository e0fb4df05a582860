# SPDX-License-Identifier: Apache-2.0
"""Swapping layers in place: nn.Linear to training form, training form to packed form, and either back.

Every function builds all replacements first and swaps then, so an error leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .config import BinaryConfig, Config, FP4Config, SalientConfig
from .nn import (
    BinaryEmbedding,
    BinaryLinear,
    FP4Linear,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedFP4Linear,
    PackedSalientLinear,
    SalientLinear,
)

LATENT = (BinaryLinear, BinaryEmbedding, SalientLinear, FP4Linear)
PACKED = (PackedBinaryLinear, PackedBinaryEmbedding, PackedSalientLinear, PackedFP4Linear)

Filter = Callable[[nn.Module, str], bool]


def quantize_(model: nn.Module, config: Config, filter_fn: Filter | None = None) -> list[str]:
    """Swap the model's nn.Linear layers for the training form that `config` describes, in place.

    Parameters are shared, not copied, so an optimizer made before still sees them and tied weights stay tied. A
    subclass of nn.Linear is left alone, because its forward may differ. BinaryConfig(embeddings=True) swaps
    nn.Embedding too.

    Args:
        model: any module; a module that occurs under several names is swapped under all of them.
        config: BinaryConfig, SalientConfig or FP4Config.
        filter_fn: called with (module, name) for every candidate; a false answer leaves it alone.
    Returns:
        The names that were swapped; empty if every candidate had been swapped before.
    Raises:
        ValueError: if nothing matches (the classes seen are named), or a layer cannot be swapped.
    """
    layers = {BinaryConfig: BinaryLinear, SalientConfig: SalientLinear, FP4Config: FP4Linear}
    layer = layers.get(type(config))
    if layer is None:
        raise ValueError(f"quantize_: config must be a BinaryConfig, SalientConfig or FP4Config, got {config!r}")
    embeddings = isinstance(config, BinaryConfig) and config.embeddings

    def build(module: nn.Module, name: str) -> nn.Module | None:
        is_linear, is_table = type(module) is nn.Linear, embeddings and type(module) is nn.Embedding
        if not (is_linear or is_table) or (filter_fn is not None and not filter_fn(module, name)):
            return None
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            raise ValueError(f"quantize_: {name} has hooks, which a swap would drop; remove them first")
        return layer.from_linear(module, config) if is_linear else BinaryEmbedding.from_embedding(module, config)

    wanted = "nn.Linear or nn.Embedding" if embeddings else "nn.Linear"
    return _swap(model, build, done=LATENT + PACKED, function="quantize_", wanted=wanted)


def pack_(model: nn.Module) -> list[str]:
    """Swap every training form of the model for its packed form, in place.

    Returns:
        The names that were packed; empty if they had been packed before.
    Raises:
        ValueError: if the model has no bitmill layer, or a layer cannot be packed (its name comes first).
    """
    return _swap(
        model,
        lambda module, name: module.pack() if isinstance(module, LATENT) else None,
        done=PACKED,
        function="pack_",
        wanted="bitmill training layers (call quantize_ first)",
    )


def dequantize_(model: nn.Module) -> list[str]:
    """Swap every bitmill layer, packed or not, for an nn.Linear or nn.Embedding with the quantised weight, in place.

    Activations are no longer quantised: the result is a weight-only model in float.

    Returns:
        The names that were swapped.
    Raises:
        ValueError: if the model has no bitmill layer.
    """
    return _swap(
        model,
        lambda module, name: module.dequantize() if isinstance(module, LATENT + PACKED) else None,
        done=(),
        function="dequantize_",
        wanted="bitmill layers",
    )


def _swap(
    model: nn.Module,
    build: Callable[[nn.Module, str], nn.Module | None],
    done: tuple[type, ...],
    function: str,
    wanted: str,
) -> list[str]:
    replacements: dict[nn.Module, nn.Module] = {}
    names: list[str] = []
    seen: set[str] = set()
    already_done = False
    for name, module in model.named_modules(remove_duplicate=False):
        seen.add(type(module).__name__)
        already_done = already_done or isinstance(module, done)
        if module not in replacements:
            try:
                replacement = build(module, name)
            except ValueError as error:
                raise ValueError(f"{function}: {name or 'the model'}: {error}") from None
            if replacement is None:
                continue
            replacements[module] = replacement
        if not name:
            raise ValueError(f"{function}: the model itself is a {type(module).__name__}; use its own method instead")
        names.append(name)
    if not names and not already_done:
        classes = ", ".join(sorted(seen))
        raise ValueError(f"{function}: the model must contain {wanted} that the filter accepts, got only {classes}")
    replace_modules(model, replacements)
    return names


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement where its key is, under every name that it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
