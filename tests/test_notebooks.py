# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from the first cell to the last, and what they show was really printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "python" / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[test]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[test]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[test]'")
    notebook = nbformat.read(path, as_version=4)
    stored = [_shown(cell) for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, before in zip(notebook.cells, stored, strict=True):
        if cell.cell_type == "code":
            assert _start(_shown(cell)) == _start(before), (
                f"an output is not what its cell prints, so run the notebook again: {before!r}"
            )


def _shown(cell: object) -> str:
    outputs = getattr(cell, "outputs", [])
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def _start(text: str) -> list[str]:
    """The first words, without numbers: what follows depends on the machine."""
    return re.sub(r"[\d.,]+", "#", text).split()[:2]
