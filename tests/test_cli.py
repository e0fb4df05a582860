# SPDX-License-Identifier: Apache-2.0
"""The command line: what a person sees, what a machine reads, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitmill
from bitmill import cli
from bitmill.ops import _library


def test_info_prints_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"bitmill          {bitmill.__version__}" in text
    for op in _library.op_names():
        assert op in text or op == "instruction_set"
    assert "_ops_cpu       loaded" in text


def test_info_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["libraries"]["_C"] is None and facts["libraries"]["_ops_cpu"] is None
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert facts["ops"]["binary_linear"] == facts["instruction_set"]


def test_info_says_why_a_library_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_library._failure, "_ops_cpu", "ImportError: no such file")
    assert cli.main(["info"]) == 0
    assert "_ops_cpu       ImportError: no such file" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--tokens", "many"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: bitmill" in capsys.readouterr().err


def test_demo_json_saves_and_plots(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot, folder = tmp_path / "demo.png", tmp_path / "models"
    assert cli.main(["demo", "--json", "--tokens", "600", "--plot", str(plot), "--save", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in result["rows"]]
    assert names == ["fp32", "FP4 e2m1", "MXFP4", "salient 30 %", "salient 10 %", "binary"]
    perplexity = {row["name"]: row["perplexity"] for row in result["rows"]}
    assert perplexity["fp32"] < perplexity["FP4 e2m1"] < perplexity["salient 30 %"] < perplexity["salient 10 %"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*.safetensors"))) == 6


def test_demo_failure_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["demo", "--tokens", "600", "--save", str(blocked / "below")]) == 1
    assert capsys.readouterr().err.startswith("bitmill demo: ")


WRONG = {
    **{f"--threads={n}": f"expected a whole number from 1 to 1024, got {n!r}" for n in ("0", "-1", "100000000", "two")},
    **{f"--seed={n}": f"expected a whole number of 64 bits, got {n!r}" for n in (str(2**64), "1.5")},
}


@pytest.mark.parametrize("option", WRONG)
def test_numbers_that_cannot_be_are_wrong_usage(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [["quantize", "m", "--out", "o"], ["generate", "m", "--prompt", "p"], ["eval", "m", "--text", "t"]]
    for command in commands[:2] if "seed" in option else commands:
        with pytest.raises(SystemExit) as end:
            cli.main([*command, option])
        assert end.value.code == 2
        assert WRONG[option] in capsys.readouterr().err
