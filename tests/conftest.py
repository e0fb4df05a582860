# SPDX-License-Identifier: Apache-2.0
"""Options and fixtures of the whole suite."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parent / "golden"
    parser.addoption("--golden", default=str(default), help="folder of golden vectors for test_golden.py")


@pytest.fixture
def golden_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch's own kernels wait for each other longer than small tests run; on_every_machine sets its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _write_idx(path: Path, values: Tensor) -> None:
    header = struct.pack(f">{values.dim() + 1}i", 0x800 + values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Pictures of 8 x 8 in four classes, in the files of MNIST: 40 to train, 12 to test."""
    folder = tmp_path / "images"
    folder.mkdir()
    for split, count in (("train", 40), ("t10k", 12)):
        pixels = torch.randint(256, (count, 8, 8), dtype=torch.uint8)
        _write_idx(folder / f"{split}-images-idx3-ubyte.gz", pixels)
        _write_idx(folder / f"{split}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8) % 4)
    return folder
