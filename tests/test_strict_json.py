# SPDX-License-Identifier: Apache-2.0
"""JSON with floats that JSON has no numbers for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bitmill import strict_json


def test_every_value_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "x", {"b": math.inf}], "c": {"d": [-math.inf]}, "e": 1e-300}
    for indent in (None, 1):
        text = strict_json.dumps(value, indent)
        assert strict_json.loads(text) == value
        named = json.loads(text, parse_constant=pytest.fail)
        assert named["a"][-1] == {"b": "Infinity"} and named["c"] == {"d": ["-Infinity"]}
    assert strict_json.dumps([math.nan, (1, math.nan)]) == '["NaN", [1, "NaN"]]'
    assert all(map(math.isnan, strict_json.loads('["NaN", NaN]')))  # and what Python's own json writes
    strict_json.write(tmp_path / "value.json", value)
    assert strict_json.read(tmp_path / "value.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    strict_json.write(file := tmp_path / "value.json", [1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        strict_json.write(file, [{1}])
    assert strict_json.read(file) == [1]
    for damaged in ("", "[1", "{'a': 1}"):
        with pytest.raises(ValueError):
            strict_json.loads(damaged)
