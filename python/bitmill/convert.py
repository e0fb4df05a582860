# SPDX-License-Identifier: Apache-2.0
"""Swapping layers in place: nn.Linear to training form, training form to packed form, and either back.

Every function builds all replacements first and swaps then, so an error leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .chained import chain_, unchain_
from .config import BinaryConfig, Config, FP4Config, OneBitConfig, SalientConfig
from .nn import (
    BinaryConv2d,
    BinaryEmbedding,
    BinaryLinear,
    FP4Embedding,
    FP4Linear,
    OneBitLinear,
    PackedBinaryConv2d,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedFP4Embedding,
    PackedFP4Linear,
    PackedInt8Embedding,
    PackedInt8Linear,
    PackedOneBitLinear,
    PackedSalientLinear,
    PackedZonedLinear,
    SalientLinear,
)
from .nn._module import LatentEmbedding, LatentLinear

LATENT = (BinaryLinear, BinaryConv2d, BinaryEmbedding, SalientLinear, FP4Linear, FP4Embedding, OneBitLinear)
PACKED = (
    PackedBinaryLinear,
    PackedBinaryConv2d,
    PackedBinaryEmbedding,
    PackedSalientLinear,
    PackedFP4Linear,
    PackedFP4Embedding,
    PackedOneBitLinear,
    PackedZonedLinear,
    PackedInt8Embedding,
    PackedInt8Linear,
)
LAYERS: dict[type[Config], type[LatentLinear]] = {
    BinaryConfig: BinaryLinear,
    SalientConfig: SalientLinear,
    FP4Config: FP4Linear,
    OneBitConfig: OneBitLinear,
}
TABLES: dict[type[Config], type[LatentEmbedding]] = {BinaryConfig: BinaryEmbedding, FP4Config: FP4Embedding}

Filter = Callable[[nn.Module, str], bool]


def quantize_(model: nn.Module, config: Config, filter_fn: Filter | None = None) -> list[str]:
    """Swap the model's nn.Linear layers for the training form that `config` describes, in place.

    Parameters are shared, not copied, so an optimizer made before still sees them and tied weights stay tied. A
    subclass of nn.Linear is left alone, because its forward may differ, and so is the out_proj of
    nn.MultiheadAttention, which reads its weight and does not call it. BinaryConfig and FP4Config with embeddings=True
    swap nn.Embedding too, BinaryConfig(convs=True) nn.Conv2d.

    Args:
        model: any module; a module that occurs under several names is swapped under all of them.
        config: BinaryConfig, SalientConfig, FP4Config or OneBitConfig.
        filter_fn: called with (module, name) for every name of every candidate; a false answer leaves the module
            alone.
    Returns:
        The names that were swapped; empty if every candidate had been swapped before.
    Raises:
        ValueError: if nothing matches (the classes seen are named), or a layer cannot be swapped.
    """
    layer = LAYERS.get(type(config))
    if layer is None:
        known = ", ".join(kind.__name__ for kind in LAYERS)
        raise ValueError(f"quantize_: config must be one of {known}, got {config!r}")
    swaps: dict[type[nn.Module], Callable[[Any, Any], nn.Module]] = {nn.Linear: layer.from_linear}
    if isinstance(config, (BinaryConfig, FP4Config)) and config.embeddings:
        swaps[nn.Embedding] = TABLES[type(config)].from_embedding
    if isinstance(config, BinaryConfig) and config.convs:
        swaps[nn.Conv2d] = BinaryConv2d.from_conv

    read = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}

    def build(module: nn.Module, names: list[str]) -> nn.Module | None:
        swap = None if module in read else swaps.get(type(module))
        if swap is None or (filter_fn is not None and not all(filter_fn(module, n) for n in names)):
            return None
        require_bare(module)
        return swap(module, config)

    wanted = " or ".join(f"nn.{kind.__name__}" for kind in swaps)
    return _swap(model, build, done=LATENT + PACKED, function="quantize_", wanted=wanted)


def pack_(model: nn.Module, chain: bool = True) -> list[str]:
    """Swap every training form of the model for its packed form, in place.

    Args:
        chain: connect the packed layers of transformer blocks by bits, where a host knows how (`bitmill.chain`);
            `summary` says where. The results are the same either way, bit for bit, except that a BERT answers 0 at
            positions that a padding mask drops. What a connection was found from (scales, biases, batch
            normalisations) may change later: it is found again when it has, and after training at the latest by
            `model.eval()`.
    Returns:
        The names that were packed; empty if they had been packed before.
    Raises:
        ValueError: if the model has no bitmill layer, or a layer cannot be packed (its name comes first).
    """

    def build(module: nn.Module, names: list[str]) -> nn.Module | None:
        if not isinstance(module, LATENT):
            return None
        require_bare(module)
        _require_values(module)
        return module.pack()

    wanted = "bitmill training layers (call quantize_ first)"
    names = _swap(model, build, done=PACKED, function="pack_", wanted=wanted)
    unchain_(model)
    if chain:
        chain_(model)
    return names


def dequantize_(model: nn.Module) -> list[str]:
    """Swap every bitmill layer, packed or not, for an nn.Linear, nn.Embedding or nn.Conv2d with the quantised
    weight, in place; OneBit's for an nn.Sequential of an nn.Linear and an nn.LayerNorm.

    Activations are no longer quantised: the result is a weight-only model in float.

    Returns:
        The names that were swapped.
    Raises:
        ValueError: if the model has no bitmill layer.
    """

    def build(module: nn.Module, names: list[str]) -> nn.Module | None:
        if not isinstance(module, LATENT + PACKED):
            return None
        require_bare(module)
        _require_values(module)
        return module.dequantize()

    names = _swap(model, build, done=(), function="dequantize_", wanted="bitmill layers")
    unchain_(model)
    return names


def _swap(
    model: nn.Module,
    build: Callable[[nn.Module, list[str]], nn.Module | None],
    done: tuple[type, ...],
    function: str,
    wanted: str,
) -> list[str]:
    found = list(model.named_modules(remove_duplicate=False))
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in found:
        names_of.setdefault(module, []).append(name)
    replacements: dict[nn.Module, nn.Module] = {}
    for module, names in names_of.items():
        try:
            replacement = build(module, names)
        except ValueError as error:
            raise ValueError(f"{function}: {names[0] or 'the model'}: {error}") from None
        if replacement is not None:
            replacements[module] = replacement
    if model in replacements:
        raise ValueError(f"{function}: the model itself is a {type(model).__name__}; use its own method instead")
    if not replacements and not any(isinstance(module, done) for module in names_of):
        classes = ", ".join(sorted({type(module).__name__ for module in names_of}))
        raise ValueError(f"{function}: the model must contain {wanted} that the filter accepts, got only {classes}")
    replace_modules(model, replacements)
    return [name for name, module in found if module in replacements]


def _require_values(module: nn.Module) -> None:
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise ValueError("it is on the meta device and has no values; load or initialise the model first")


def require_bare(module: nn.Module) -> None:
    """Raise ValueError if a swap would drop something that a user attached to this layer."""
    hooks = any(value for key, value in vars(module).items() if key.endswith("_hooks"))
    if hooks or "forward" in vars(module):
        raise ValueError("it has hooks or a forward of its own, which a swap would drop; remove them first")
    parts = [*module._modules]
    if type(module) in (nn.Linear, nn.Embedding, nn.Conv2d):
        parts += [key for key in (*module._parameters, *module._buffers) if key not in ("weight", "bias")]
    if parts:
        raise ValueError(f"it has {parts[0]!r} attached, which a swap would drop; remove it first")


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement where its key is, under every name that it has. Cannot fail halfway."""
    bypassing: set[nn.Module] = set()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    bypassing.add(parent)
    # In eval mode these two of torch's own read linear1.weight and never call linear1, unless told not to.
    for module in model.modules():
        if module in bypassing:
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]
        if isinstance(module, nn.TransformerEncoder) and any(layer in bypassing for layer in module.layers):
            module.use_nested_tensor = False
