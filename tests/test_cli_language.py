# SPDX-License-Identifier: Apache-2.0
"""`bitmill quantize`, `eval` and `generate` on language models of a few thousand parameters."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill import cli, strict_json, timing
from bitmill.nn import PackedFP4Linear, PackedInt8Embedding, PackedInt8Linear, PackedSalientLinear
from bitmill.nn._module import PackedModule
from language_inputs import WORDS, write_model, write_text

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
tokenizers = pytest.importorskip("tokenizers")

from bitmill.bench import folders, language  # noqa: E402
from bitmill.bench.memory import measure_folder  # noqa: E402
from bitmill.integrations.language import load_pretrained  # noqa: E402
from bitmill.recipes.language import perplexity, read_ids  # noqa: E402
from bitmill.recipes.language_folder import open_folder  # noqa: E402
from bitmill.recipes.scripts import language_table  # noqa: E402

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", tie_word_embeddings=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


MINMAX = ["--search", "minmax", "--format", "e1m2", "--no-shift"]
METHODS: dict[str, list[str]] = {
    "pb-llm": ["--salient", "0.3", "--windows", "4"],
    "pb-llm rtn": ["--rounding", "rtn", "--metric", "magnitude", "--bits", "4"],
    "billm": ["--windows", "4"],
    "arb-rc": ["--windows", "4"],
    "llm-fp4": ["--windows", "4", "--activations", "fp4"],
    "llm-fp4 weights": ["--windows", "4", "--search", "paper", "--error", "l1"],
    "llm-fp4 minmax": ["--windows", "4", "--activations", "fp4", *MINMAX],
    "fp4": ["--format", "mxfp4", "--activations", "int8"],
    "mxfp4 both": ["--activations", "fp4"],
    "nvfp4": ["--activations", "int8"],
    "nf4": [],
    "mxfp4": ["--scale-rule", "even"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_folder_evaluates_generates_and_moves(
    method: str, model: Path, text: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", model, "--out", out, "--method", method.split()[0], *METHODS[method]]
    if "--windows" in arguments:
        arguments += ["--calibration", text]
    result = run(*arguments)
    assert len(result["errors"]) == (14 if "--windows" in arguments else 0)
    assert result["file_bytes"] == (out / "packed.safetensors").stat().st_size and not (out / "blocks").exists()
    assert run(*arguments) == result  # nothing left to do

    before, after = (run("eval", folder, "--text", text) for folder in (model, out))
    assert after["perplexity"] != before["perplexity"]
    assert {**after, "perplexity": 0} == {**before, "perplexity": 0}
    assert after["windows"] == 22 and after["tokens"] == 22 * 31 and after["stride"] == after["length"] == 32
    shutil.rmtree(model)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(out, tmp_path / "elsewhere" / "moved")
    assert run("eval", moved, "--text", text)["perplexity"] == after["perplexity"]
    loaded, tokenizer = load_pretrained(moved)
    assert perplexity(loaded, read_ids(text, tokenizer), 32) == after["perplexity"]
    assert isinstance(loaded.lm_head, PackedInt8Linear) and loaded.lm_head.high is loaded.model.embed_tokens.high
    kinds = {type(module) for module in loaded.model.layers.modules()}
    assert (PackedSalientLinear in kinds) == method.startswith("pb-llm")

    assert cli.main(["generate", str(moved), "--prompt", "the cat", "--tokens", "5"]) == 0
    printed = capsys.readouterr()
    ids = loaded.generate(tokenizer("the cat", return_tensors="pt").input_ids, max_new_tokens=5, do_sample=False)
    assert printed.out.strip() == tokenizer.decode(ids[0]) and "tokens/s" in printed.err


@pytest.mark.parametrize(
    "method", [["fp4"], ["pb-llm", "--salient", "0.3", "--rounding", "rtn", "--metric", "magnitude"]]
)
def test_a_folder_loads_for_other_activations(
    method: list[str], model: Path, text: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.randint(len(WORDS), (1, 9))
    logits: dict[tuple[str, str | None], torch.Tensor] = {}
    for made in ("float", "int8"):
        out = tmp_path / made
        run("quantize", model, "--out", out, "--activations", made, "--method", *method)
        for wanted in (None, "float", "int8"):
            loaded = load_pretrained(out, wanted).model
            assert {m.config.activations for m in loaded.modules() if isinstance(m, PackedModule)} == {wanted or made}
            with torch.inference_mode():
                logits[made, wanted] = loaded(ids).logits
    for one, other in ((("float", None), ("int8", "float")), (("int8", None), ("float", "int8"))):
        assert torch.equal(logits[one], logits[other])
    assert not torch.equal(logits["float", None], logits["int8", None])
    with pytest.raises(ValueError, match="activations must be one of 'float', 'int8', got 'int4'"):
        load_pretrained(tmp_path / "float", "int4")
    evaluate = ["eval", tmp_path / "float", "--text", text, "--windows", 2]
    of_float, of_int8 = (run(*evaluate, *options)["perplexity"] for options in ([], ["--activations", "int8"]))
    assert of_float != of_int8 == run("eval", tmp_path / "int8", *evaluate[2:])["perplexity"]
    assert cli.main(["eval", str(model), "--text", str(text), "--activations", "int8"]) == 1
    assert "activations go with a packed folder, got 'int8'" in capsys.readouterr().err


def test_a_folder_of_four_bit_activations_loads_for_others(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    out, ids = tmp_path / "out", torch.randint(len(WORDS), (1, 9))
    options = ["--calibration", text, "--windows", 2, "--activations", "fp4"]
    run("quantize", model, "--out", out, "--method", "llm-fp4", *options)
    four, floats = load_pretrained(out).model, load_pretrained(out, "float").model
    layer = floats.model.layers[0].mlp.up_proj
    assert layer.config.activations == "float" and layer.input_scale is None
    assert four.lm_head.config.activations == "float"
    with torch.inference_mode():
        assert not torch.equal(four(ids).logits, floats(ids).logits)
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "x"), "--method", "nf4", "--activations", "fp4"])


def test_int8_activations_where_only_the_head_takes_them(model: Path, run: Run, tmp_path: Path) -> None:
    run("quantize", model, "--out", tmp_path / "out", "--method", "nf4")
    loaded = load_pretrained(tmp_path / "out", "int8").model
    kinds = {(type(m), m.config.activations) for m in loaded.modules() if isinstance(m, PackedModule)}
    assert kinds == {(PackedFP4Linear, "float"), (PackedInt8Embedding, "int8"), (PackedInt8Linear, "int8")}
    assert not folders.takes_int8(loaded)


def test_layers_without_a_choice_of_activations(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    arguments = ["--calibration", text, "--windows", 2, "--tables", "float", "--rounding", "rtn"]
    run("quantize", model, "--out", tmp_path / "out", "--method", "billm", *arguments)
    with pytest.raises(ValueError, match="activations must be None for layers that have no choice of them, got 'int8'"):
        load_pretrained(tmp_path / "out", "int8")


def test_eval_counts_as_its_help_says(model: Path, text: Path, run: Run) -> None:
    found = run("eval", model, "--text", text, "--length", 16, "--stride", 4, "--windows", 3, "--bos")
    assert (found["tokens"], found["windows"], found["bos"]) == (15 + 4 + 4, 3, True)
    assert run("eval", model, "--text", text, "--windows", 3)["tokens"] == 3 * 31


def test_untied_heads_and_gpt2(text: Path, run: Run, tmp_path: Path) -> None:
    for kind, options in (("llama", {"tie_word_embeddings": False}), ("gpt2", {})):
        model, out = write_model(tmp_path / kind, kind, **options), tmp_path / f"{kind}-out"
        result = run("quantize", model, "--out", out, "--calibration", text, "--windows", 2)
        assert len(result["errors"]) == (14 if kind == "llama" else 8)
        loaded, _ = load_pretrained(out)
        table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert isinstance(table, PackedInt8Embedding) and isinstance(head, PackedInt8Linear)
        assert (head.high is table.high) == (kind == "gpt2")
        assert run("eval", out, "--text", text)["windows"] == 22


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(
    kind: str, dtype: str, text: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_model(tmp_path / "model", kind), tmp_path / "out"
    simple = ["--method", "pb-llm", "--rounding", "rtn", "--metric", "magnitude", "--salient", "0.5"]
    run("quantize", model, "--out", out, "--dtype", dtype, *simple)
    loaded, _ = load_pretrained(out)
    assert loaded.get_input_embeddings()(torch.arange(3)).dtype == getattr(torch, dtype)
    assert run("eval", out, "--text", text)["windows"] == 22
    capsys.readouterr()
    assert cli.main(["generate", str(out), "--prompt", "the cat", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the cat")


def test_kill_and_again_gives_the_same_file(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    arguments = ["quantize", model, "--calibration", text, "--windows", "4", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*arguments, whole)
    # The process kills itself, as `kill -9` would, when the second block's first layer is done.
    code = (
        "import os, signal, sys; from bitmill import cli; from bitmill.recipes import pb_llm; n = 0\n"
        "def packed(*arguments, original=pb_llm._packed):\n"
        "    global n; n += 1\n"
        "    return original(*arguments) if n < 9 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "pb_llm._packed = packed; cli.main(sys.argv[1:])"
    )
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments), str(killed)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (killed / "blocks" / "block-000.safetensors").exists() and not (killed / "packed.safetensors").exists()
    run(*arguments, killed)
    assert (killed / "packed.safetensors").read_bytes() == (whole / "packed.safetensors").read_bytes()


@pytest.fixture
def table(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The lines that `language_table` prints last."""
    places = {"model": model, "calibration": text, "text": text, "out": tmp_path / "table"}
    sizes = {"windows": 2, "length": 16, "eval-windows": 5, "prompt": 9}
    arguments = [word for key, value in {**places, **sizes}.items() for word in (f"--{key}", str(value))]

    def call(*more: object) -> list[str]:
        assert language_table.main([*arguments, *map(str, more)]) == 0
        printed = capsys.readouterr().out
        return printed[printed.index("\n\n") :].strip().splitlines()

    return call


def test_the_table_keeps_what_is_finished(
    table: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["float32", "fp4", "pb-llm-100-rtn", "pb-llm-30-gptq-hessian", "mxfp4-even", "nvfp4"]
    picture = tmp_path / "t.png"
    lines = table("--plot", picture, "--rows", *rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [line.split()[1] for line in lines[2:]] == rows
    assert {len(line) for line in lines} == {110}
    assert all(line.split(" | ")[-3:] == ["           -", "          -", "       - |"] for line in lines[2:])
    monkeypatch.setattr(language_table, "quantize_folder", None)  # nothing is done twice
    assert table("--rows", *rows[:2]) == lines[:4]
    int8 = table("--int8", "--rows", *rows[:2])
    assert [int8[2], int8[3]] == lines[2:4] and int8[4].startswith("|   int8 activations ") and len(int8) == 5
    exact, rounded = (float(line.split(" | ")[1]) for line in int8[3:])
    assert exact != rounded and abs(exact - rounded) < 0.1 * exact
    monkeypatch.setattr(language_table, "evaluate_folder", None)
    assert table("--int8", "--rows", *rows[:2]) == int8
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        table("--plot", picture, "--rows", *rows)
    assert "--plot needs matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err


def test_a_table_is_of_one_model_and_text(table: Callable[..., list[str]], model: Path, tmp_path: Path) -> None:
    rows = ["--rows", "float32", "fp4", "nf4"]
    lines, file, weights = table(*rows), tmp_path / "table" / "fp4.json", model / "model.safetensors"
    row = strict_json.read(file)
    asked = {key: row["asked"].pop(key) for key in ("windows", "length", "eval_windows")}
    assert {*row["asked"]} == {"model", "calibration", "text"}
    strict_json.write(file, {**row, "asked": asked, "perplexity": 7.0})  # a row of an earlier version
    assert table(*rows)[3].split()[3] == "7.00"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 0x40]))
    assert table("--rows", "float32") != lines[:3]
    with pytest.raises(ValueError, match="nf4 holds a run with another model; take another folder"):
        table("--rows", "nf4")


@pytest.mark.parametrize("perplexities", [(30.0, 1e6), (30.0, 31.0), (20.0, 20.0)])
def test_labels_of_the_plot_lie_apart(
    perplexities: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    figure, text = (pytest.importorskip(f"matplotlib.{name}") for name in ("figure", "text"))
    monkeypatch.setattr(figure.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    names = [name for name in language_table.ROWS if name.endswith(("-a4", *language_table.FOUR_BITS))]
    values = torch.linspace(*perplexities, len(names)).tolist()
    rows = [{"name": n, "perplexity": v, "file_bytes": 8.2e7} for n, v in zip(names, values, strict=True)]
    language_table.plot(rows, tmp_path / "t.png", "")
    figures[0].draw_without_rendering()
    labels = figures[0].axes[0].texts
    assert {label.get_text() for label in labels} == {*names}
    boxes = [text.Text.get_window_extent(label) for label in labels]  # without their lines
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_table_measures_speed_and_memory(
    table: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "interleave", lambda samples, *_: timing.interleave(samples, 0.01))
    monkeypatch.setattr(timing, "ROUNDS", 5)
    monkeypatch.setattr(folders, "TOGETHER", 2)
    for module in (folders, language):
        monkeypatch.setattr(module, "STEPS", 3)
    peak = {"imports": 1, "peak": 98_765_432}
    monkeypatch.setattr(folders, "measure_folder", lambda folder, *_: peak if open_folder(folder) else None)
    rows = ["float32", "fp4", "pb-llm-30-rtn", "billm", "nvfp4-a4"]
    table("--rows", *rows)
    monkeypatch.setattr(language_table, "quantize_folder", None)
    lines = table("--speed", "--rows", *rows)
    named = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:10]] == [
        *("float32", "fp4", "int8 activations", "pb-llm-30-rtn", "int8 activations", "billm"),
        *("nvfp4-a4", "int8 activations"),
    ]
    assert len({len(line) for line in lines[:10]}) == 1 and "a prompt of 9 and of 3 steps" in lines[11]
    assert all(line.split()[-2] == "99" for name, line in named.items() if name in rows)
    found = {row: json.loads((tmp_path / "table" / f"{row}.json").read_text())["inference"] for row in rows}
    assert {(row["tokens"], row["torch"], row["threads"]) for row in found.values()} == {
        (9, torch.__version__, torch.get_num_threads())
    }
    assert [row for row in rows if found[row]["int8"] is None] == ["float32", "billm"]
    assert 0 < found["fp4"]["float"]["error"] < 1e-4 < found["fp4"]["int8"]["error"] < 0.2
    assert [row for row in rows if found[row]["fp4"]] == ["nvfp4-a4"]
    cast = found["nvfp4-a4"]["fp4"]
    assert found["nvfp4-a4"]["int8"]["error"] < cast["error"] < 0.6
    assert f"{cast['prompt']['per_second']:,.0f} (" in named["nvfp4-a4"]
    for read in ("prompt", "step"):
        base, ours = found["float32"]["float"][read], found["billm"]["float"][read]  # of the last group
        assert base["x_float32"] == 1
        assert ours["x_float32"] == pytest.approx(ours["per_second"] / base["per_second"])
    assert table("--rows", *rows) == lines  # from the files
    monkeypatch.setattr(language, "EXACT", 0.0)
    with pytest.raises(RuntimeError, match="torch float32: its logits differ from those of its weights"):
        table("--speed", "--rows", *rows)


def test_memory_of_a_folder_in_a_process_of_its_own(model: Path, run: Run, tmp_path: Path) -> None:
    run("quantize", model, "--out", tmp_path / "out", "--method", "fp4")
    found = measure_folder(tmp_path / "out", 9, 3)
    assert found["imports"] > 100 << 20
    assert 1 << 18 < found["peak"] < 60 << 20
