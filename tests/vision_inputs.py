# SPDX-License-Identifier: Apache-2.0
"""Small images on disk and a small ViT of transformers, for the tests of vision."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_idx(path: Path, values: Tensor) -> None:
    header = struct.pack(f">{values.dim() + 1}i", 0x800 + values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


def write_images(folder: Path) -> Path:
    """40 images of 8 x 8 pixels to train on and 12 to test on, of four classes."""
    folder.mkdir()
    for split, count in (("train", 40), ("t10k", 12)):
        pixels = torch.randint(256, (count, 8, 8), dtype=torch.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8) % 4)
    return folder


def vit(**changes: Any) -> Any:
    """Of 8 x 8 images in four classes; transformers has to be installed."""
    import transformers

    values = dict(image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2, num_labels=4)
    values |= dict(num_attention_heads=2, intermediate_size=48)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**(values | changes)))
