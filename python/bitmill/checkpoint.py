# SPDX-License-Identifier: Apache-2.0
"""`save` and `load`: one safetensors file with one JSON metadata key, "bitmill", that says which layers to build.

The metadata carries a SHA-256 over itself and every tensor. `load` checks everything (structure, versions, sizes,
dtypes, digest, the packed arrays themselves) before it changes the model; any failure is one ValueError.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import Config
from .convert import LATENT, PACKED, replace_modules
from .nn import BinaryEmbedding
from .nn._module import LatentLinear, PackedModule

FORMAT_VERSION = 1
KEY = "bitmill"
KINDS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in LATENT + PACKED}
SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim")


class _Plan(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's state, packed layers as they are, to a safetensors file.

    A tensor that occurs under several names (tied weights) is stored once. The file appears whole or not at all.

    Raises:
        ValueError: for state that is not a tensor, or lies on the meta device.
        OSError: if the file cannot be written.
    """
    plan = _plan(model)
    tensors = {name: t.detach().cpu().contiguous() for name, t in plan.tensors.items()}
    metadata = {**plan.metadata, "sha256": _digest(plan.metadata, tensors)}
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=target.name, suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        safetensors.torch.save_file(tensors, temporary, {KEY: _canonical(metadata)})
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def load(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a file written by `save` into a fresh model of the same architecture, in place.

    The layers named in the file take the place of the model's nn.Linear, nn.Embedding or bitmill layers of the same
    size; all other parameters and buffers are filled. The model may be on the meta device.

    Args:
        model: same architecture as the saved model, with or without quantised layers.
        path: the file.
    Returns:
        Names of the bitmill layers.
    Raises:
        ValueError: for a truncated, altered, foreign or newer file, or one that does not fit the model. The model is
            unchanged then.
        OSError: if the file cannot be read.
    """
    metadata, tensors = _read(Path(path))
    shared = metadata["shared"]
    tensors.update({name: tensors[kept] for name, kept in shared.items()})
    present = dict(model.named_modules(remove_duplicate=False))
    layers: dict[nn.Module, nn.Module] = {}
    for name, entry in metadata["modules"].items():
        if name not in present:
            raise _error(path, f"it has a layer {name!r}, and the model has none of that name")
        layers[present[name]] = _build(path, name, entry, metadata["configs"], present[name])

    expected = _expected_state(present, layers)
    _compare(path, expected, tensors)
    for name in metadata["modules"]:
        layer = layers[present[name]]
        device = _device_of(present[name])
        own = {key: tensors[f"{name}.{key}"].to(device) for key in layer.state_dict(keep_vars=True)}
        layer.load_state_dict(own, assign=True)
        layer.requires_grad_(not isinstance(layer, PackedModule)).train(present[name].training)
        if isinstance(layer, PackedModule):
            try:
                layer.validate()
            except ValueError as error:
                raise _error(path, f"{name}: {error}") from None

    replace_modules(model, layers)
    _fill(model, tensors, {f"{name}." for name in metadata["modules"]})
    return list(metadata["modules"])


def file_size(model: nn.Module) -> int:
    """Bytes of the file that `save` would write, names and metadata included."""
    plan = _plan(model)
    header: dict[str, Any] = {"__metadata__": {KEY: _canonical({**plan.metadata, "sha256": "0" * 64})}}
    offset = 0
    for name, t in sorted(plan.tensors.items()):
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": _file_dtype(t.dtype), "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


def _plan(model: nn.Module) -> _Plan:
    """What a file of this model holds, without the digest."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if not isinstance(t, Tensor):
            raise ValueError(f"save: {name} must be a tensor, got {type(t).__name__}; remove the extra state")
        if t.is_meta:
            raise ValueError(f"save: {name} is on the meta device and has no values; load or initialise the model first")
        place = (t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.dtype, tuple(t.shape), t.stride())
        if t.numel() and place in first:
            shared[name] = first[place]
            continue
        first[place] = name
        tensors[name] = t
    configs: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in KINDS.values():
            continue
        config = module.config.to_dict()
        if config not in configs:
            configs.append(config)
        modules[name] = {
            "kind": type(module).__name__,
            "config": configs.index(config),
            "arguments": _arguments(module),
        }
    if "" in modules:
        raise ValueError("save: the model itself is a bitmill layer; put it into a module, such as nn.Sequential")
    return _Plan(
        tensors, {"format_version": FORMAT_VERSION, "configs": configs, "modules": modules, "shared": shared}
    )


def _arguments(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, PackedModule):
        return module.arguments()
    if isinstance(module, BinaryEmbedding):
        names = ("num_embeddings", "embedding_dim", "padding_idx")
        return {name: getattr(module, name) for name in names}
    assert isinstance(module, LatentLinear)
    features = {"in_features": module.in_features, "out_features": module.out_features}
    return {**features, "bias": module.bias is not None}


def _canonical(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"))


def _digest(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical(metadata).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy() if t.numel() else b"")
    return digest.hexdigest()


def _error(path: str | os.PathLike[str], reason: str) -> ValueError:
    return ValueError(f"load: {os.fspath(path)} cannot be loaded: {reason}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            if KEY not in texts:
                raise _error(path, "it was not written by bitmill; for a plain state_dict use safetensors.torch.load_file")
            metadata = _parse(path, texts[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except safetensors.SafetensorError as error:
        raise _error(path, f"it is not a whole safetensors file ({error})") from None
    claimed = metadata.pop("sha256")
    if _digest(metadata, tensors) != claimed:
        raise _error(path, "its contents do not match its checksum, so it was altered or damaged; copy it again")
    unknown = sorted(set(metadata["shared"].values()) - set(tensors))
    if unknown or set(metadata["shared"]) & set(tensors):
        raise _error(path, "its list of shared tensors does not fit its tensors")
    return metadata, tensors


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        raise _error(path, "its bitmill metadata is not JSON") from None
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise _error(path, f"it has format version {version}, and this bitmill reads up to {FORMAT_VERSION}; upgrade it")
    kinds = {"format_version": int, "configs": list, "modules": dict, "shared": dict, "sha256": str}
    if version != FORMAT_VERSION or any(not isinstance(metadata.get(key), kind) for key, kind in kinds.items()):
        raise _error(path, "its bitmill metadata has not the expected fields")
    if not all(isinstance(kept, str) for kept in metadata["shared"].values()):
        raise _error(path, "its list of shared tensors is not a list of names")
    return metadata


def _build(path: Any, name: str, entry: Any, configs: list[Any], present: nn.Module) -> nn.Module:
    """An empty layer on the meta device, of the size that the model has there."""
    try:
        cls, arguments = KINDS[entry["kind"]], dict(entry["arguments"])
        config = Config.from_dict(configs[entry["config"]])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise _error(path, f"the description of layer {name!r} is not valid ({error})") from None
    for size in SIZES:
        if size in arguments and arguments[size] != getattr(present, size, None):
            got = getattr(present, size, "none")
            raise _error(path, f"{name}: {size} is {arguments[size]} in the file and {got} in the model")
    if not any(size in arguments for size in SIZES) or not all(type(v) in (int, bool, type(None)) for v in arguments.values()):
        raise _error(path, f"the description of layer {name!r} is not valid (its sizes are missing or not numbers)")
    try:
        return cls(**arguments, config=config, device="meta")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _error(path, f"the description of layer {name!r} is not valid ({str(error).splitlines()[0]})") from None


def _expected_state(present: dict[str, nn.Module], layers: dict[nn.Module, nn.Module]) -> dict[str, Tensor]:
    """The state_dict that the model will have, with meta tensors for the layers that are built."""
    expected: dict[str, Tensor] = {}
    covered = tuple(f"{name}." for name, module in present.items() if module in layers)
    for name, t in present[""].state_dict(keep_vars=True).items():
        if not (covered and name.startswith(covered)):
            expected[name] = t
    for name, module in present.items():
        if module in layers:
            expected.update({f"{name}.{key}": t for key, t in layers[module].state_dict(keep_vars=True).items()})
    return expected


def _compare(path: Any, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        parts = [f"{word} {', '.join(names[:3])}" + (" ..." if len(names) > 3 else "")
                 for word, names in (("it lacks", missing), ("the model has no", extra)) if names]
        raise _error(path, "; ".join(parts))
    for name, t in expected.items():
        got = tensors[name]
        if got.shape != t.shape:
            raise _error(path, f"{name} has shape {list(got.shape)} in the file and {list(t.shape)} in the model")
        floats = t.is_floating_point() and got.is_floating_point()
        if got.dtype != t.dtype and not (floats and t.is_meta):
            raise _error(
                path, f"{name} is {got.dtype} in the file and {t.dtype} in the model; convert the model with .to() first"
            )


def _device_of(module: nn.Module) -> torch.device:
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None or tensor.is_meta else tensor.device


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], loaded: set[str]) -> None:
    """Copy into the tensors that exist; give meta tensors their values, once for each tensor that is shared."""
    made: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if f"{prefix}." in loaded:
            continue
        for registry in (module._parameters, module._buffers):
            for name, t in registry.items():
                value = tensors.get(f"{prefix}.{name}" if prefix else name)
                if t is None or value is None:
                    continue
                if not t.is_meta:
                    t.copy_(value)
                    continue
                if id(t) not in made:
                    made[id(t)] = nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value
                registry[name] = made[id(t)]


def _file_dtype(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "BF16", torch.bool: "BOOL"}
    return names.get(dtype) or f"{'F' if dtype.is_floating_point else 'U' if dtype == torch.uint8 else 'I'}{dtype.itemsize * 8}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
