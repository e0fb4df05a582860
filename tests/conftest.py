# SPDX-License-Identifier: Apache-2.0
"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import problems
from bitmill import cli, strict_json
from vision_inputs import write_images


def pytest_configure(config: pytest.Config) -> None:
    """Processes of pytest-xdist, and what they start, share the cores instead of each taking all."""
    problems.DEVICE = config.getoption("--device")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parent / "golden"
    parser.addoption("--device", help="where ops with compiled kernels are compared with their default, too: cuda")
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What a command of bitmill prints with --json."""

    def call(*arguments: object) -> dict[str, Any]:
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return strict_json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a failure of a command prints."""

    def call(*arguments: object) -> str:
        assert cli.main([*map(str, arguments)]) == 1
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if line.startswith("bitmill ")]
        assert len(said) == 1 and lines[-1] == said[0], lines
        return said[0]

    return call
