# SPDX-License-Identifier: Apache-2.0
"""The shapes of tests/problems.py, the one list for tests and benchmarks (found by its path: tests is no package)."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from problems import (  # noqa: E402
    ATTENTION,
    CONVS,
    GPU_CALLS,
    GPU_PRODUCTS,
    HEADLINE,
    MODELS,
    OUT_OF_CACHE,
    Problem,
)

__all__ = [
    "ATTENTION",
    "CONVS",
    "GPU_CALLS",
    "GPU_PRODUCTS",
    "HEADLINE",
    "MODELS",
    "OTHERS",
    "OUT_OF_CACHE",
    "REPOSITORY",
    "Problem",
    "select",
]

OTHERS = (*ATTENTION, *CONVS, OUT_OF_CACHE)  # problems of families that are not about a linear layer


def select(model: str | None, shape: tuple[int, int, int] | None) -> tuple[Problem, ...]:
    """The problems of the models whose name contains `model`, or of one shape, named if it is known; else the headline.

    Raises:
        ValueError: if no model has that name.
    """
    known = {problem.name.lower(): problem for problem in (*MODELS, *HEADLINE, *OTHERS)}
    if shape is not None:
        named = (problem for problem in known.values() if problem[1:] == shape)
        return (next(named, Problem("given", *shape)),)
    if model is None:
        return HEADLINE
    found = tuple(problem for name, problem in known.items() if model.lower() in name)
    if not found:
        raise ValueError(f"no model's name contains {model!r}; known: {', '.join(p.name for p in known.values())}")
    return found
