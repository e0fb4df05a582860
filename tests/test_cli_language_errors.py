# SPDX-License-Identifier: Apache-2.0
"""`bitmill quantize`, `eval` and `generate` on wrong numbers, and on texts, models and folders that are damaged."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bitmill import strict_json
from language_inputs import WORDS, write_model, write_text

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
tokenizers = pytest.importorskip("tokenizers")

from bitmill.recipes.scripts import language_table  # noqa: E402

Run = Callable[..., dict[str, Any]]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", tie_word_embeddings=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def test_wrong_input_is_one_sentence(
    model: Path, text: Path, tmp_path: Path, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    start = ["quantize", model, "--out", out]
    assert "a calibration text must be given for method 'pb-llm', got none" in complaint(*start)
    assert not out.exists()
    assert "fraction must be a number in [0, 1], got 2.0" in complaint(*start, "--salient", 2, "--calibration", text)
    assert "No such file" in complaint(*start, "--calibration", tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("the cat")
    short = complaint(*start, "--calibration", tmp_path / "short.txt")
    assert "at least 32 tokens, got [2]; take more text or shorter windows" in short
    assert "at least 32 tokens, got [2]" in complaint("eval", model, "--text", tmp_path / "short.txt")
    assert "must be a folder with config.json and safetensors, or a .gguf file" in complaint(
        "eval", tmp_path / "nothing", "--text", text
    )
    assert "the text must have from 1 to 32 tokens, got 45" in complaint(
        "generate", model, "--prompt", "the cat saw the dog", "--tokens", 40
    )
    assert not out.exists()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "needs accelerate, which is not installed: pip install accelerate" in complaint(
        "eval", tmp_path / "m.gguf", "--text", text
    )


def test_folders_in_a_wrong_state_are_one_sentence(
    model: Path, text: Path, run: Run, tmp_path: Path, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    start = ["quantize", model, "--out", out, "--method", "fp4"]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("bitmill.integrations.language.save", fail)
        assert "No space left on device" in complaint(*start)
    assert "packed.safetensors is missing; run `bitmill quantize` to its end" in complaint("eval", out, "--text", text)
    run(*start)  # the same again goes on
    assert f"{out} holds a run with another format; take another folder" in complaint(*start, "--format", "e3m0")
    assert f"{model} holds a model already" in complaint("quantize", model, "--out", model, "--method", "fp4")
    assert "must not be quantised yet" in complaint("quantize", out, "--out", other, "--method", "fp4")
    packed = out / "packed.safetensors"
    packed.write_bytes(packed.read_bytes()[:-100])
    assert "cannot be loaded" in complaint("eval", out, "--text", text)
    (out / "config.json").write_text("{")
    assert f"{out} cannot be read as a model" in complaint("eval", out, "--text", text)
    (model / "tokenizer.json").unlink()
    assert "(1)" in (said := complaint("eval", model, "--text", text)) and "(2)" in said  # a reason of several lines


def test_a_damaged_run_is_one_sentence(model: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    for i, written in enumerate(("x", "[]", "null", "{}", '{"settings": 3}')):
        (out := tmp_path / f"run-{i}").mkdir()
        (out / "run.json").write_text(written)
        said = complaint("quantize", model, "--method", "fp4", "--out", out)
        assert said.startswith(f"bitmill quantize: {out / 'run.json'} must say what the folder is of, it is damaged")
    (out / "run.json").write_text('{"settings": {}, "new": 1}')
    said = complaint("quantize", model, "--method", "fp4", "--out", out)
    assert f"{out} holds a run with another model, " in said and ", new; take another folder" in said


def test_a_folder_knows_the_contents_that_it_was_made_of(
    model: Path, text: Path, run: Run, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    out, file = tmp_path / "out", model / "model.safetensors"
    start = ["quantize", model, "--out", out, "--method", "arb-rc", "--windows", 2, "--calibration", text]
    result, weights, words = run(*start), file.read_bytes(), text.read_text()
    file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert complaint(*start).endswith(f"{out} holds a run with another model; take another folder")
    file.write_bytes(weights)
    text.write_text(f"{words}the dog")
    assert complaint(*start).endswith(f"{out} holds a run with another calibration; take another folder")
    text.write_text(words)
    assert run(*start) == result
    known = strict_json.read(out / "run.json")
    strict_json.write(out / "run.json", {key: value for key, value in known.items() if not key.endswith("_digest")})
    file.write_bytes(b"")
    assert run(*start) == result  # a folder of an earlier version, without digests


def test_an_infinite_perplexity_is_kept_as_json(
    model: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"] *= 1e6
    save_file(state, model / "model.safetensors", {"format": "pt"})
    assert run("eval", model, "--text", text)["perplexity"] == math.inf
    places = {"model": model, "calibration": text, "text": text, "out": tmp_path / "table"}
    arguments = [word for key, value in places.items() for word in (f"--{key}", str(value))]
    arguments += ["--rows", "float32", "fp4", "--length", "16", "--eval-windows", "5"]
    printed = []
    for _ in range(2):
        assert language_table.main(arguments) == 0
        printed.append(capsys.readouterr().out)
        monkeypatch.setattr(language_table, "evaluate_folder", None)  # the second time all is read from files
    assert printed[0] == printed[1] and printed[0].count("|        inf |") == 4
    for file in (tmp_path / "table").glob("*.json"):
        assert json.loads(file.read_text(), parse_constant=pytest.fail)["perplexity"] == "Infinity"


def test_places_are_looked_at_before_the_model_is_read(
    text: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    start = ["quantize", tmp_path / "nothing", "--calibration", text, "--out"]
    assert complaint(*start, text) == f"bitmill quantize: out must be a folder, got the file {text}"
    for device in ("nowhere", "meta"):
        said = complaint(*start, tmp_path / "out", "--device", device)
        assert f"device must be one to compute on here, got {device!r}: " in said
    start[3] = tmp_path / "none"
    assert complaint(*start, tmp_path / "out") == f"bitmill quantize: {start[3]}: No such file or directory"


def test_models_that_cannot_be_quantised_are_one_sentence(
    text: Path, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    model = write_model(tmp_path / "model")
    file = model / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(state, file, {"format": "pt"})
    arguments = ["quantize", model, "--out", tmp_path / "out", "--calibration", text, "--windows", 2]
    assert "model.layers.1.mlp" in (said := complaint(*arguments)) and "finite" in said
    assert "model.layers.1.mlp.up_proj" in complaint("quantize", model, "--out", tmp_path / "b", "--method", "fp4")
    config = transformers.MambaConfig(vocab_size=len(WORDS), hidden_size=16, state_size=4, num_hidden_layers=0)
    bare = write_model(tmp_path / "bare")
    transformers.MambaForCausalLM(config).save_pretrained(bare)
    assert "must keep blocks with nn.Linear layers in one nn.ModuleList" in complaint(
        "quantize", bare, "--out", tmp_path / "c", "--method", "fp4"
    )
