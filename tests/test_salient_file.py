# SPDX-License-Identifier: Apache-2.0
"""A stored file of salient weights, read with NumPy alone from the README's description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from bitmill import SalientConfig, pack_, quantize_, save

TYPES = {"I32": "<i4", "U8": "u1", "F16": "<f2", "F32": "<f4"}
PLACES = [
    *(pytest.param({"fraction": 0.05}, "list", id="list"), pytest.param({"fraction": 0.3}, "bitmap", id="bitmap")),
    pytest.param({"fraction": 0.2, "structure": "column"}, "columns", id="columns"),
    pytest.param({"fraction": 0.01}, "list", id="far apart"),
    pytest.param({"fraction": 1.0}, "bitmap", id="everything"),
    pytest.param({"fraction": 0.0}, "list", id="nothing"),
]


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """safetensors: the length of a JSON header in 8 bytes, the header, the tensors."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = json.loads(header.pop("__metadata__")["bitmill"])
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[end + first : end + last], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return metadata, tensors


def bit(words: np.ndarray, r: int, c: int) -> int:
    return int(words[r // 16, c // 32, r % 16]) >> c % 32 & 1


def entries(encoding: str, t: dict[str, np.ndarray], n: int, k: int) -> dict[tuple[int, int], int]:
    """Row and column of every salient weight, and the number of its value."""
    if encoding == "bitmap":
        found = {}
        for r in range(n):
            columns = [c for c in range(k) if bit(t["index"], r, c)]
            assert len(columns) == t["start"][r + 1] - t["start"][r]
            found |= {(r, c): int(t["start"][r]) + i for i, c in enumerate(columns)}
        return found
    found = {}
    for tile in range(-(-n // 16)):
        place = [-1] * 16
        for s in range(t["start"][tile], t["start"][tile + 1]):
            for lane in range(16):
                gap = int(t["index"][s, lane])
                place[lane] += 255 if gap == 255 else gap + 1
                if gap != 255:
                    found[16 * tile + lane, place[lane]] = 16 * s + lane
    return found


def weight_of(metadata: dict[str, Any], tensors: dict[str, np.ndarray], layer: str) -> np.ndarray:
    entry = metadata["modules"][layer]
    config, arguments = metadata["configs"][entry["config"]], entry["arguments"]
    t = {name.removeprefix(f"{layer}."): a for name, a in tensors.items() if name.startswith(f"{layer}.")}
    n, k, bits = arguments["out_features"], arguments["in_features"], config["bits"]
    w = np.empty((n, k), np.float32)
    for r in range(n):
        for c in range(k):
            group = c // config["group_size"] if config["group_size"] else 0
            mu = t["mu"][r, group] if config["centre"] else np.float32(0)
            w[r, c] = mu + t["alpha"][r, group] if bit(t["weight"], r, c) else mu - t["alpha"][r, group]

    def put(r: int, c: int, value: Any) -> None:
        w[r, c] = value if bits == 16 else t["value_scale"][r] * (np.float32(value) - t["value_zero"][r])

    if arguments["encoding"] == "columns":
        v = 32 // bits
        for j, c in enumerate(t["index"]):
            for r in range(n):
                value = int(t["value"][r // 16, j // v, r % 16]) >> bits * (j % v) & (1 << bits) - 1
                put(r, c, np.uint16(value).view(np.float16) if bits == 16 else value)
        return w
    flat = t["value"].ravel()
    for (r, c), i in entries(arguments["encoding"], t, n, k).items():
        put(r, c, flat[i] if bits != 4 else flat[i // 2] >> 4 * (i % 2) & 15)
    return w


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("values", "encoding"), PLACES)
def test_a_file_is_what_the_readme_says(values: dict[str, Any], encoding: str, bits: int, tmp_path: Path) -> None:
    for group_size, centre, (n, k) in ((None, True, (19, 333)), (64, False, (5, 70))):
        config = SalientConfig(**values, bits=bits, group_size=group_size, centre=centre)
        model = nn.Sequential(nn.Linear(k, n))
        quantize_(model, config)
        wanted = model[0].quantised_weight().detach().numpy()
        pack_(model)
        save(model, tmp_path / "model.safetensors")
        metadata, tensors = read_file(tmp_path / "model.safetensors")
        stored = metadata["modules"]["0"]["arguments"]["encoding"]
        assert stored == encoding or (n, k) == (5, 70)  # five rows of a tile of sixteen are no list
        assert np.array_equal(weight_of(metadata, tensors, "0"), wanted)


def test_codes_of_4_bits_take_half_a_byte(tmp_path: Path) -> None:
    sizes = {}
    for bits in (4, 8):
        model = nn.Sequential(nn.Linear(512, 256, bias=False))
        quantize_(model, SalientConfig(0.3, bits=bits))
        pack_(model)
        save(model, tmp_path / f"{bits}.safetensors")
        _, tensors = read_file(tmp_path / f"{bits}.safetensors")
        sizes[bits] = sum(t.nbytes for t in tensors.values())
    assert sizes[8] - sizes[4] == int(model[0].mask().sum()) // 2
