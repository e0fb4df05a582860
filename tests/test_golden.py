# SPDX-License-Identifier: Apache-2.0
"""Golden vectors: numbers recorded from the published implementations, compared with the library's public API.

`pytest tests/test_golden.py --golden DIR` takes another folder of vectors of any shapes. Each file is one case; a case
without a comparison is listed as not covered, never as passed. Definitions and tolerances: tests/golden/README.md. The
comparisons: golden_cases/.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from golden_cases import bibench, bibert, billm, bipft, bit, bivit, convs, fp4, multibit, onebit, pbllm, sparsifiner
from golden_cases.common import Case

SYSTEMS = (bibert, billm, bipft, bit, bivit, bibench, convs, fp4, multibit, onebit, pbllm, sparsifiner)
COMPARISONS = {case: compare for system in SYSTEMS for case, compare in system.COMPARISONS.items()}


def case_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem.rpartition('-')[0]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden"))
    files = sorted(folder.glob("*/*.npz"))
    if "covered_file" in metafunc.fixturenames:
        covered = [path for path in files if case_of(path) in COMPARISONS]
        metafunc.parametrize("covered_file", covered, ids=[f"{p.parent.name}/{p.stem}" for p in covered])


def test_golden(covered_file: Path) -> None:
    COMPARISONS[case_of(covered_file)](Case(covered_file))


def test_every_case_has_one_comparison() -> None:
    names = [case for system in SYSTEMS for case in system.COMPARISONS]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_golden_folder_has_vectors(golden_folder: Path) -> None:
    assert any(case_of(path) in COMPARISONS for path in golden_folder.glob("*/*.npz")), f"no vectors in {golden_folder}"


def test_golden_cases_not_covered(golden_folder: Path) -> None:
    """One counted line with the names of the cases that have no comparison yet."""
    missing = sorted({case_of(path) for path in golden_folder.glob("*/*.npz")} - set(COMPARISONS))
    if missing:
        pytest.skip(f"{len(missing)} golden cases have no comparison yet: {', '.join(missing)}")
