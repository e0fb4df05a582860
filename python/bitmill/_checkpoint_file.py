# SPDX-License-Identifier: Apache-2.0
"""The file itself: safetensors with one metadata key, "bitmill", its JSON, and a SHA-256 over that and every tensor.

`read` trusts nothing: structure, version, sizes and digest are checked here, so that checkpoint.py can rely on them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

FORMAT_VERSION = 1
KEY = "bitmill"
MAX_METADATA = 1 << 24  # characters; the description of a layer takes about 150
FIELDS = {"format_version": int, "configs": list, "modules": dict, "shared": dict, "sha256": str}
ENTRY = {"kind": str, "config": int, "arguments": dict}
PAIRS = ("kernel_size", "stride", "padding", "dilation")  # arguments that are two whole numbers

# Dtypes in the order in which safetensors sorts tensors (the reverse of this one).
DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64")


def file_dtype(t: Tensor) -> str:
    """safetensors' name of the dtype."""
    name = str(t.dtype).removeprefix("torch.")
    short = {"bool": "BOOL", "bfloat16": "BF16", "complex64": "C64"}
    return short.get(name) or f"{name[0].upper()}{8 * t.dtype.itemsize}"


def canonical(metadata: dict[str, Any]) -> str:
    """The one spelling of the metadata, which the digest is taken of."""
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"))


def digest(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the metadata (without its digest) and of every name, dtype, shape and byte."""
    total = hashlib.sha256(canonical(metadata).encode())
    for name in sorted(tensors):
        t = tensors[name]
        total.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        if t.numel():
            total.update(as_bytes(t).numpy().data)
    return total.hexdigest()


def as_bytes(t: Tensor) -> Tensor:
    """A contiguous tensor as flat uint8."""
    return t.reshape(-1).view(torch.uint8)


def load_error(path: str | os.PathLike[str], reason: str) -> ValueError:
    """The one error of `load`: one line that fits on a screen."""
    line = " ".join(reason.splitlines())
    line = line if len(line) <= 500 else line[:497] + "..."
    return ValueError(f"load: {os.fspath(path)} cannot be loaded: {line}")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata (without its digest) and tensors of a file, mapped into memory, all checked. May raise load_error."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {} if text is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged header makes of safetensors and torch
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise load_error(path, f"it cannot be read as a safetensors file ({reason})") from None
    if text is None:
        raise load_error(path, "it was not written by bitmill; for a plain state_dict use safetensors.torch.load_file")
    metadata = _parse(path, text)
    claimed = metadata.pop("sha256")
    if digest(metadata, tensors) != claimed:
        raise load_error(path, "its contents do not match its checksum, so it was altered or damaged; copy it again")
    shared = metadata["shared"]
    if not set(shared.values()) <= set(tensors) or set(shared) & set(tensors):
        raise load_error(path, "its list of shared tensors does not fit its tensors")
    return metadata, tensors


def _parse(path: Path, text: str) -> dict[str, Any]:
    """The metadata, its structure checked: nothing in it is nested deeper than it should be."""
    try:
        metadata = json.loads(text) if len(text) <= MAX_METADATA else None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise load_error(path, "its bitmill metadata is not a JSON object of a sensible size")
    version = metadata.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise load_error(
            path, f"it has format version {version}, and this bitmill reads up to {FORMAT_VERSION}; update it"
        )

    def fits(value: Any, fields: dict[str, type]) -> bool:
        return type(value) is dict and {key: type(v) for key, v in value.items()} == fields

    def is_flat(value: Any) -> bool:
        if type(value) is not dict:
            return False
        lists = {key: v for key, v in value.items() if isinstance(v, (dict, list))}
        return all(key in PAIRS and type(v) is list and list(map(type, v)) == [int, int] for key, v in lists.items())

    if not (
        fits(metadata, FIELDS)
        and version == FORMAT_VERSION
        and all(isinstance(kept, str) for kept in metadata["shared"].values())
        and all(is_flat(config) for config in metadata["configs"])
        and all(fits(entry, ENTRY) and is_flat(entry["arguments"]) for entry in metadata["modules"].values())
        and all(0 <= entry["config"] < len(metadata["configs"]) for entry in metadata["modules"].values())
    ):
        raise load_error(path, "its bitmill metadata has not the expected fields")
    return metadata
