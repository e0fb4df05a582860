# SPDX-License-Identifier: Apache-2.0
"""JSON that every reader takes: infinities and NaN, for which it has no number, are the strings that ProtoJSON writes.

`loads` turns "Infinity", "-Infinity" and "NaN" into floats again, and takes the bare words that Python's json writes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def dumps(value: Any, indent: int | None = None) -> str:
    """The text of plain data: None, bool, int, float, str, and lists, tuples and dicts of them.

    Raises:
        TypeError: for other data.
    """
    return json.dumps(_named(value), indent=indent, allow_nan=False)


def loads(text: str) -> Any:
    """The data of a text.

    Raises:
        ValueError: if it is not JSON.
    """
    return _unnamed(json.loads(text))


def read(path: Path) -> Any:
    """`loads` of a file."""
    return loads(path.read_text())


def write(path: Path, value: Any) -> None:
    """Write `dumps` to a file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(entry) for entry in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def _unnamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unnamed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unnamed(entry) for entry in value]
    return _FLOATS.get(value, value) if isinstance(value, str) else value
