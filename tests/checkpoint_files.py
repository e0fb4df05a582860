# SPDX-License-Identifier: Apache-2.0
"""Files of the checkpoint tests: good ones, and ones that say whatever a test wants them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bitmill import BinaryConfig, checkpoint, save
from bitmill._checkpoint_file import digest
from checkpoint_models import (
    KINDS,
    quantised,
)


def good_files(folder: Path) -> dict[str, Path]:
    """One good file of each kind."""
    torch.manual_seed(0)
    for config in KINDS:
        for packed in (False, True):
            name = f"{type(config).__name__}-{config.embeddings if isinstance(config, BinaryConfig) else ''}-{packed}"
            save(quantised(config, packed), folder / name)
    return {path.name: path for path in sorted(folder.iterdir())}


def craft(path: Path, metadata: Any, tensors: dict[str, Tensor]) -> None:
    """Write a file whose digest fits, whatever it says."""
    if isinstance(metadata, dict):
        metadata = {key: value for key, value in metadata.items() if key != "sha256"}
        metadata = {**metadata, "sha256": digest(metadata, tensors)}
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    safetensors.torch.save_file(tensors, path, {checkpoint.KEY: text})


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()[checkpoint.KEY]), tensors
