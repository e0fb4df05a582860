# SPDX-License-Identifier: Apache-2.0
"""Options and fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vision_inputs import write_images


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


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Pictures of 8 x 8 in four classes, in the files of MNIST: 40 to train, 12 to test."""
    return write_images(tmp_path / "images")
