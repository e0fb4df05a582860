# SPDX-License-Identifier: Apache-2.0
"""`save` and `load`: one safetensors file with one JSON metadata key, "bitmill", that says which layers to build.

The metadata carries a SHA-256 over itself and every tensor. `load` checks everything (structure, versions, sizes,
dtypes, digest, the packed arrays themselves) before it changes the model; any failure is one ValueError.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ._checkpoint_file import DTYPES, FORMAT_VERSION, KEY, as_bytes, canonical, digest, file_dtype, load_error, read
from .chained import chain_, unchain_
from .config import BinaryConfig, Config, FP4Config, Int8Config, OneBitConfig, SalientConfig, ZonedConfig, shorten
from .convert import LATENT, PACKED, replace_modules, require_bare
from .nn import (
    BinaryConv2d,
    BinaryEmbedding,
    FP4Embedding,
    PackedBinaryConv2d,
    PackedBinaryEmbedding,
    PackedFP4Embedding,
    PackedInt8Embedding,
)
from .nn._conv import conv_arguments
from .nn._module import LatentEmbedding, LatentLinear, PackedModule

KINDS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in LATENT + PACKED}
CONFIGS: dict[str, type[Config]] = {
    "Binary": BinaryConfig,
    "Salient": SalientConfig,
    "FP4": FP4Config,
    "Int8": Int8Config,
    "OneBit": OneBitConfig,
    "Zoned": ZonedConfig,
}
TABLES: tuple[type[nn.Module], ...] = (
    *(nn.Embedding, BinaryEmbedding, FP4Embedding),
    *(PackedBinaryEmbedding, PackedFP4Embedding, PackedInt8Embedding),
)
CONVS: tuple[type[nn.Module], ...] = (nn.Conv2d, BinaryConv2d, PackedBinaryConv2d)
LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, *(cls for cls in LATENT + PACKED if cls not in TABLES + CONVS))
SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx")
# Other arguments are true or false.
COUNTS = {"entries": int, "encoding": str, "map_rows": int, "map_columns": int, "dtype": str}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Slot(NamedTuple):
    """Where a module keeps a tensor."""

    owner: nn.Module
    key: str
    tensor: Tensor


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's state, packed layers as they are, to a safetensors file.

    A tensor that occurs under several names (tied weights) is stored once. The file appears whole or not at all.

    Raises:
        ValueError: for state that is not a plain tensor, or lies on the meta device.
        OSError: if the file cannot be written.
    """
    metadata, state = _plan(model)
    tensors: dict[str, Tensor] = {}
    pointers: set[int] = set()
    for name, t in state.items():
        t = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if t.data_ptr() in pointers or t.untyped_storage().nbytes() != t.nbytes:
            t = t.clone()  # safetensors refuses tensors that overlap
        pointers.add(t.data_ptr())
        tensors[name] = t
    text = canonical({**metadata, "sha256": digest(metadata, tensors)})
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        kind = IsADirectoryError if target.is_dir() else FileNotFoundError
        raise kind(f"save: {target} cannot be written: path must be a file in a folder that exists")
    temporary = target.parent / f".bitmill-{secrets.token_hex(8)}.part"
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode  # safetensors makes its files private
        safetensors.torch.save_file(tensors, temporary, {KEY: text})
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink()
        if isinstance(error, safetensors.SafetensorError):
            raise OSError(f"save: {target} cannot be written: {error}") from None
        raise


def load(model: nn.Module, path: str | os.PathLike[str], chain: bool = True) -> list[str]:
    """Load a file written by `save` into a fresh model of the same architecture, in place.

    The layers named in the file take the place of the model's nn.Linear, nn.Embedding or bitmill layers of the same
    size; all other parameters and buffers are filled. Parameters stay the same objects, so an optimizer made before
    still sees them. The model may be on the meta device, if its non-persistent buffers are not.

    Args:
        model: same architecture as the saved model, with or without quantised layers.
        path: the file.
        chain: connect packed layers by bits, as `pack_` does.
    Returns:
        Names of the bitmill layers.
    Raises:
        ValueError: for a truncated, altered, foreign or newer file, or one that does not fit the model. The model is
            unchanged then.
        OSError: if the file cannot be read.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"load: {path} cannot be read: path must be a file, got a folder")
    metadata, tensors = read(Path(path))
    try:
        _load(model, metadata, tensors)
    except ValueError as error:
        raise load_error(path, str(error)) from None
    del tensors  # and with it the mapped file, before chains take memory
    if chain:
        chain_(model)
    return list(metadata["modules"])


def _load(model: nn.Module, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Prepare everything, then change the model."""
    layers = _build_layers(model, metadata)
    built = {id(layer): module for module, layer in layers.items()}
    slots, source = _slots(model, layers), {**{name: name for name in tensors}, **metadata["shared"]}
    _require_state_dict(model)
    _compare(slots, {name: tensors[kept] for name, kept in source.items()})
    _join_tied(slots, source, tensors)

    ready: list[tuple[_Slot, Tensor]] = []
    made: dict[tuple[str, bool, torch.device], Tensor] = {}
    for name, slot in sorted(slots.items(), key=lambda item: not _is_writable(item[1].tensor)):
        t, value, is_parameter = slot.tensor, tensors[source[name]], isinstance(slot.tensor, nn.Parameter)
        device = _device_of(built.get(id(slot.owner), slot.owner)) if t.is_meta else t.device
        key = source[name], is_parameter, device
        if _is_writable(t):
            made.setdefault(key, t)
        elif key in made:
            value = made[key]
        else:
            value = value.to(device, copy=True)  # the file is only mapped into memory
            value = made[key] = nn.Parameter(value, t.requires_grad) if is_parameter else value
        ready.append((slot, value))
    for slot, value in ready:
        if id(slot.owner) in built and not _is_writable(slot.tensor):
            setattr(slot.owner, slot.key, value)
    for layer in layers.values():
        if isinstance(layer, PackedModule):
            try:
                layer.validate()
            except (ValueError, RuntimeError, IndexError) as error:
                name = next(name for name, module in model.named_modules() if module is built[id(layer)])
                raise ValueError(f"layer {name!r}: {error}") from None

    unchain_(model)
    with torch.no_grad():
        for slot, value in ready:
            if _is_writable(slot.tensor):
                slot.tensor.copy_(value)
            elif id(slot.owner) not in built:
                setattr(slot.owner, slot.key, value)
    replace_modules(model, layers)


def file_size(model: nn.Module) -> int:
    """Bytes of the file that `save` would write, names and metadata included."""
    metadata, state = _plan(model)
    header: dict[str, Any] = {"__metadata__": {KEY: canonical({**metadata, "sha256": "0" * 64})}}
    offset = 0
    for name, t in sorted(state.items(), key=lambda item: (-DTYPES.index(file_dtype(item[1])), item[0])):
        end = offset + t.numel() * t.dtype.itemsize
        header[name] = {"dtype": file_dtype(t), "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


def _plan(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of this model holds: the metadata without the digest, and the tensors."""
    if type(model) in KINDS.values():
        raise ValueError("save: the model itself is a bitmill layer; put it into a module, such as nn.Sequential")
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    _require_state_dict(model)
    for name, (_, _, t) in _slots(model).items():
        if t.is_meta:
            raise ValueError(f"save: {name} is on the meta device and has no values; load or initialise it first")
        if file_dtype(t) not in DTYPES or t.layout != torch.strided:
            raise ValueError(f"save: {name} must be a dense tensor of a common dtype, got {t.dtype}, {t.layout}")
        kept = first.setdefault(_identity(t), name)
        if kept == name:
            tensors[name] = t
        else:
            shared[name] = kept
    configs: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in KINDS.values():
            continue
        config = module.config.to_dict()
        if config not in configs:
            configs.append(config)
        kind = type(module).__name__
        modules[name] = {"kind": kind, "config": configs.index(config), "arguments": _arguments(module)}
    return {"format_version": FORMAT_VERSION, "configs": configs, "modules": modules, "shared": shared}, tensors


def _slots(model: nn.Module, layers: dict[nn.Module, nn.Module] | None = None) -> dict[str, _Slot]:
    """Every parameter and persistent buffer under each of its names, as if `layers` had replaced their keys."""
    slots: dict[str, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        owner = (layers or {}).get(module, module)
        for key, t in (*owner._parameters.items(), *owner._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            if t is None:
                continue
            if key in owner._non_persistent_buffers_set:
                if t.is_meta:
                    raise ValueError(f"{name} is non-persistent, so no file has it, and on the meta device; create it")
                continue
            if type(t) not in (Tensor, nn.Parameter):
                raise ValueError(f"{name} must be a plain tensor, got {type(t).__name__}")
            if name in slots or name == "__metadata__":
                raise ValueError(f"{name} is not a usable name for a tensor, or two tensors have it; rename one")
            slots[name] = _Slot(owner, key, t)
    return slots


def _require_state_dict(model: nn.Module) -> None:
    """State that lives outside the parameters and buffers, or is renamed on the way, cannot be restored from a file."""
    slots, state = _slots(model), model.state_dict(keep_vars=True)
    for name in (*state, *slots):
        if name not in slots or state.get(name) is not slots[name].tensor:
            raise ValueError(f"{name} in the model's state_dict is not simply a parameter or buffer; remove its hook")


def _identity(t: Tensor) -> Any:
    """Equal for tensors that are the same memory."""
    if t.is_meta or t.numel() == 0 or t.layout != torch.strided:
        return id(t)
    lazy = t.is_conj(), t.is_neg()
    return t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.dtype, t.shape, t.stride(), lazy


def _is_writable(t: Tensor) -> bool:
    """Whether `copy_` into this tensor works; others are replaced."""
    frozen = t.is_meta or (t.is_inference() and not torch.is_inference_mode_enabled())
    return not frozen and not any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape, strict=True))


def _arguments(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, PackedModule):
        return module.arguments()
    if isinstance(module, LatentEmbedding):
        names = ("num_embeddings", "embedding_dim", "padding_idx")
        return {name: getattr(module, name) for name in names}
    if isinstance(module, BinaryConv2d):
        return conv_arguments(module)
    assert isinstance(module, LatentLinear)
    features = {"in_features": module.in_features, "out_features": module.out_features}
    return {**features, "bias": module.bias is not None}


def _device_of(module: nn.Module) -> torch.device:
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None or tensor.is_meta else tensor.device


def _build_layers(model: nn.Module, metadata: dict[str, Any]) -> dict[nn.Module, nn.Module]:
    """The layers that the file describes, still without values, and the modules whose place they take."""
    present = dict(model.named_modules(remove_duplicate=False))
    entries: dict[nn.Module, Any] = {}
    layers: dict[nn.Module, nn.Module] = {}
    for name, entry in metadata["modules"].items():
        if not name or name not in present:
            raise ValueError(f"it has a layer {shorten(name)}, and the model has none of that name")
        module = present[name]
        try:
            if entries.setdefault(module, entry) != entry:
                raise ValueError("it is one module under two names in the model, and two different ones in the file")
            layers[module] = layers.get(module) or _build(entry, metadata["configs"], module)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    return layers


def _build(entry: dict[str, Any], configs: list[Any], present: nn.Module) -> nn.Module:
    """An empty layer of the size that the model has there, on the model's own Parameters where both have them."""
    kind, arguments = entry["kind"], entry["arguments"]
    if kind not in KINDS:
        raise ValueError(f"its kind {shorten(kind)} is unknown; a newer bitmill may have written the file")
    if type(present) not in next(kinds for kinds in (TABLES, CONVS, LINEARS) if KINDS[kind] in kinds):
        raise ValueError(f"it is a {kind} in the file, which cannot take the place of a {type(present).__name__}")
    require_bare(present)
    config_class = next(cls for prefix, cls in CONFIGS.items() if kind.removeprefix("Packed").startswith(prefix))
    config = config_class.from_dict(configs[entry["config"]])
    sizes = {key: getattr(present, key, None) for key in SIZES}
    if type(present) in CONVS:
        sizes = {key: value for key, value in conv_arguments(present).items() if key != "bias"}
    for key, value in arguments.items():
        if key in sizes and (value != sizes[key] or type(value) is not type(sizes[key])):
            raise ValueError(f"{key} is {shorten(value)} in the file and {shorten(sizes[key])} in the model")
        if key not in sizes and type(value) is not COUNTS.get(key, bool):
            raise ValueError(f"{shorten(value)} is not a value for its argument {shorten(key)}")
    try:
        layer = KINDS[kind](**arguments, config=config, device="meta")
    except Exception as error:  # an argument too many or too few, or a size that no tensor can have
        raise ValueError(f"its arguments are not valid ({(str(error).splitlines() or ['too large'])[0]})") from None
    if set(arguments) != set(_arguments(layer)):
        raise ValueError(f"its arguments must be {sorted(_arguments(layer))}, got {sorted(arguments)}")
    for key, t in layer.named_parameters():
        own = getattr(present, key, None)
        if isinstance(own, nn.Parameter) and own.shape == t.shape:
            layer.register_parameter(key, own)
        elif isinstance(present.weight, nn.Parameter):
            t.requires_grad_(present.weight.requires_grad)
    return layer.train(present.training)


def _compare(slots: dict[str, _Slot], tensors: dict[str, Tensor]) -> None:
    missing, extra = sorted(set(slots) - set(tensors)), sorted(set(tensors) - set(slots))
    if missing or extra:
        both = (("it lacks", missing), ("the model has no", extra))
        raise ValueError("; ".join(f"{word} {', '.join(map(shorten, names[:3]))}" for word, names in both if names))
    for name, (owner, _, t) in slots.items():
        got = tensors[name]
        # A new training layer, and a table of bits, take the file's dtype; a packed layer has none to choose.
        chooses = t.is_meta and (not isinstance(owner, PackedModule) or isinstance(owner, PackedBinaryEmbedding))
        if got.shape != t.shape:
            raise ValueError(f"{name} has shape {list(got.shape)} in the file and {list(t.shape)} in the model")
        if got.dtype != t.dtype and not (chooses and t.dtype in FLOATS and got.dtype in FLOATS):
            converts = got.dtype in FLOATS and t.dtype in FLOATS and not isinstance(owner, PackedModule)
            remedy = "; convert the model with .to() first" if converts else ""
            raise ValueError(f"{name} is {got.dtype} in the file and {t.dtype} in the model{remedy}")


def _join_tied(slots: dict[str, _Slot], source: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Let names that are one tensor in the model take their value from one tensor of the file."""
    first: dict[Any, str] = {}
    for name, slot in slots.items():
        kept = first.setdefault(_identity(slot.tensor), source[name])
        if kept != source[name] and not torch.equal(as_bytes(tensors[kept]), as_bytes(tensors[source[name]])):
            raise ValueError(f"{name} is tied to another tensor in the model, and has other values in the file")
        source[name] = kept
