# SPDX-License-Identifier: Apache-2.0
"""`bitmill bench --model`, on models of one or two small layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitmill import cli, timing
from bitmill.chain import MlpChain
from bitmill.nn import PackedBinaryLinear
from bitmill.ops import MlpArguments

pytest.importorskip("transformers")

from bitmill.bench import architectures, models
from bitmill.bench import memory as memory_of
from bitmill.bench import peers as peers_of
from bitmill.bench import stages as stages_of
from bitmill.bench.architectures import ARCHITECTURES, empty_model, random_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2}
TEXTS = {**SMALL, "vocab_size": 200, "max_position_embeddings": 32}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 4, "num_labels": 5}
TORCH = ["torch float32", "torch bfloat16", "torch dynamic int8"]
OURS = ["bitmill, layer by layer", "bitmill, chained"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same table of models, all of them small."""
    monkeypatch.setattr(timing, "preemptions", lambda: 0)
    monkeypatch.setattr(models, "interleave", lambda samples, *_: timing.interleave(samples, 0.01))
    for name, architecture in ARCHITECTURES.items():
        options = TEXTS if architecture.config == "BertConfig" else IMAGES
        monkeypatch.setitem(ARCHITECTURES, name, architecture._replace(options=options))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "method"), [("minilm", "bibert"), ("minilm", "bit"), ("minilm", "bipft"), ("deit-t", "bivit")]
)
def test_every_variant_is_measured(name: str, method: str) -> None:
    result = models.run(name, method, batch=2, tokens=None if name == "deit-t" else 17)
    assert (result["model"], result["method"], result["batch"], result["tokens"]) == (name, method, 2, 17)
    assert result["lengths"] is None and result["real_tokens"] == 34 and result["threads"] == 1
    rows = {row["name"]: row for row in result["variants"]}
    assert list(rows) == TORCH + OURS
    for row in rows.values():
        assert row["status"] == "ok" and 0 < row["low"] <= row["milliseconds"] <= row["high"]
        assert row["x_float32"] == pytest.approx(rows["torch float32"]["milliseconds"] / row["milliseconds"])
        assert row["x_bfloat16"] == pytest.approx(rows["torch bfloat16"]["milliseconds"] / row["milliseconds"])
        assert row["padding"] is None and row["x_one_thread"] is None
    assert [rows[name]["error"] for name in OURS] == [None, None] and rows["torch float32"]["error"] == 0
    assert 0 < rows["torch bfloat16"]["error"] < 0.1 and 0 < rows["torch dynamic int8"]["error"] < 0.3
    assert result["training_form"] == "equal"
    assert result["stages"] is None and result["memory"] is None
    text = models.render(result)
    assert f"{name}, {method}, 2 x 17 tokens" in text and "against the training form: equal" in text
    assert sum(line.startswith(variant) for line in text.splitlines() for variant in rows) == 5


@pytest.mark.usefixtures("small")
def test_two_threads_are_held_against_one_in_the_same_run() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        result = models.run("minilm", tokens=17)
    finally:
        torch.set_num_threads(threads)
    assert result["threads"] == 2 and all(row["x_one_thread"] > 0 for row in result["variants"])
    heads, *lines = models.render(result).splitlines()[3:]
    assert heads.endswith("x one thread") and all(len(line) == len(heads) for line in lines[:5])


@pytest.mark.usefixtures("small")
def test_padding_is_the_time_of_a_real_token_against_one_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 texts of 4, 8, 12 and 16 tokens are 40 real ones; 2 whole texts of 16 are 32."""
    shapes: list[tuple[int, ...]] = []
    draw = models.random_inputs

    def seen(name: str, lengths: list[int]) -> architectures.Inputs:
        inputs = draw(name, lengths)
        shapes.append((*inputs["input_ids"].shape, int(inputs["attention_mask"].sum())))
        return inputs

    def spreads(samples: dict[str, Any], *_: Any) -> dict[str, timing.Spread]:
        return {name: timing.Spread(*[1e-3 if "without" in name else 2e-3] * 3, 9, 0) for name in samples}

    monkeypatch.setattr(models, "random_inputs", seen)
    monkeypatch.setattr(models, "interleave", spreads)
    result = models.run("minilm", lengths=(4, 16), batch=4)
    assert shapes == [(4, 16, 40), (2, 16, 32)]
    assert [row["padding"] for row in result["variants"]] == [pytest.approx(2 * 32 / 40)] * 5
    text = models.render(result)
    assert "4 texts of 4 to 16 tokens, padded (40 real)" in text and "padding: time for a real token" in text


@pytest.mark.usefixtures("small")
def test_stages_add_up() -> None:
    result = models.run("minilm", tokens=20, profile=True)
    stages = dict(result["stages"])
    whole = stages.pop("whole")
    assert list(stages) == [*stages_of.STAGES, stages_of.OTHER, stages_of.REST]
    encoder, embedding = stages.get("binary encoder", 0), stages[stages_of.EMBEDDING]
    assert encoder > 0 and embedding > 0 and stages[stages_of.MLP] == 0  # which is part of the encoder
    assert whole <= sum(stages.values()) * 1.001 and stages[stages_of.REST] >= 0
    kernels, text = 100 * sum(stages[name] for name in stages_of.KERNELS) / whole, models.render(result)
    assert f"{kernels:.0f} % inside matmul and attention kernels" in text
    assert stages_of.ENCODER in text and stages_of.MLP not in text


def test_memory_of_a_real_model_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("deit-t")
    *_, chained, _ = models.packed_models(model, "bivit", architectures.random_inputs("deit-t", [197]))
    memory = memory_of.measure(chained, "deit-t", "bivit", [197])
    assert memory["imports"] > 100 << 20
    assert 1 << 20 < memory["peak"] < 60 << 20
    monkeypatch.setattr(memory_of.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="the process that measures memory failed: it said nothing"):
        memory_of.measure(chained, "deit-t", "bivit", [197])


@pytest.mark.usefixtures("small")
def test_an_empty_model_takes_the_values_of_a_file(tmp_path: Any) -> None:
    import bitmill

    *_, chained, _ = models.packed_models(
        random_model("minilm"), "bibert", inputs := architectures.random_inputs("minilm", [9, 20])
    )
    bitmill.save(chained, tmp_path / "file")
    empty: Any = empty_model("minilm")
    assert all(p.is_meta for p in empty.parameters())
    models.METHODS["bibert"](empty)
    bitmill.load(empty, tmp_path / "file")
    with torch.no_grad():
        assert torch.equal(empty(**inputs).logits, chained(**inputs).logits)


def test_nothing_in_a_random_model_is_exactly_zero() -> None:
    """A padding row or weights of 0 would need a second plane, which no trained model has."""
    assert all(bool(p.all()) for p in random_model("deit-t").parameters())


@pytest.mark.usefixtures("small")
def test_a_wrong_packed_model_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, layer = MlpChain.arguments, PackedBinaryLinear.forward

    def wrong(chain: MlpChain) -> MlpArguments:
        right = arguments(chain)
        return right._replace(scale=right.scale * 1.001)

    monkeypatch.setattr(MlpChain, "arguments", wrong)
    assert cli.main(["bench", "--model", "minilm", "--tokens", "9"]) == 1
    assert "the chained model differs from its layers one by one in " in capsys.readouterr().err
    monkeypatch.setattr(MlpChain, "arguments", arguments)
    monkeypatch.setattr(models, "chain_", lambda model: {})
    monkeypatch.setattr(PackedBinaryLinear, "forward", lambda self, x: layer(self, x) * 1.001)
    assert cli.main(["bench", "--model", "minilm", "--tokens", "9"]) == 1
    assert "the packed model differs from its training form in " in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_what_fails_or_is_wrong_has_a_reason_instead_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: Any, draw: Callable[[], Any]) -> Any:
        raise OSError("no\nlibrary")

    def missing(model: Any, draw: Callable[[], Any]) -> Any:
        raise ModuleNotFoundError(name="nncf")

    def wrong(model: Any, draw: Callable[[], Any]) -> Any:
        return lambda inputs: lambda: -model(**inputs).logits

    monkeypatch.setattr(peers_of, "PEERS", {"A": failing, "B": missing, "C": wrong})
    result = models.run("minilm", peers=True, tokens=9)
    statuses = {row["name"]: row["status"] for row in result["variants"]}
    assert list(statuses) == [*TORCH, "A", "B", "C", *OURS]
    assert statuses["A"] == "failed: OSError: no library" and statuses["B"] == "not installed: pip install nncf"
    assert statuses["C"] == "wrong: its logits differ by 2, relative"
    assert all(row["milliseconds"] is None for row in result["variants"] if row["name"] in "ABC")
    assert "failed: OSError: no library" in models.render(result)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("peer", peers_of.PEERS)
def test_peers_compute_the_float_model(peer: str) -> None:
    for module in {"OpenVINO int8": ("openvino", "nncf"), "ONNX Runtime int8": ("onnx", "onnxruntime")}[peer]:
        pytest.importorskip(module)
    rows = {row["name"]: row for row in models.run("minilm", peers=True, lengths=(4, 16), batch=3)["variants"]}
    assert rows[peer]["status"] == "ok" and rows[peer]["milliseconds"] > 0 and rows[peer]["padding"] > 0


@pytest.mark.usefixtures("small")
def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--model", "bert-base", "--lengths", "2..9", "--batch", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cpu"] == cli.cpu_name() and result["method"] == "bibert" and result["lengths"] == [2, 9]
    assert set(result["variants"][0]) == {
        *(
            "name",
            "status",
            "error",
            "milliseconds",
            "low",
            "high",
            "x_float32",
            "x_bfloat16",
            "x_one_thread",
            "padding",
        )
    }


def test_command_knows_every_model_and_method() -> None:
    assert tuple(ARCHITECTURES) == cli.MODELS
    assert tuple(models.METHODS) == cli.MODEL_METHODS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "gpt"], "invalid choice: 'gpt'"),
        (["--model", "minilm", "--method", "x"], "invalid choice: 'x'"),
        (["--model", "minilm", "--threads", "0"], "expected a whole number from 1 to 1024, got '0'"),
        (["--model", "minilm", "--tokens", "-1"], "expected a whole number from 1 to 65536, got '-1'"),
        (["--model", "minilm", "--lengths", "5-9"], "expected two whole numbers like 5..128, got '5-9'"),
        (["--model", "minilm", "--layer", "fp4"], "--layer does not go with --model"),
        (["--profile"], "--profile needs --model"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt", {}, "model must be one of bert-base, .* got 'gpt'"),
        ("minilm", {"method": "x"}, "method must be one of bibert, bit, bipft, bivit, bivit_mlp_a32, got 'x'"),
        ("minilm", {"tokens": 513}, "minilm has 512 positions, so tokens must be between 1 and 512, got 513"),
        ("minilm", {"tokens": 0}, "between 1 and 512, got 0"),
        ("minilm", {"batch": 0}, "batch must be at least 1, got 0"),
        ("minilm", {"batch": 9000}, "a batch must have at most 65,536 tokens, got 9000 x 128"),
        ("minilm", {"lengths": (9, 5)}, r"lengths must be MIN..MAX with 1 <= MIN <= MAX <= 512, got 9\.\.5"),
        ("minilm", {"lengths": (5, 9), "tokens": 9}, "take the place of tokens"),
        ("minilm", {"lengths": (5, 9), "batch": 1}, "two texts or more"),
        ("deit-s", {"tokens": 9}, "deit-s takes images, which all have 197 tokens; leave the number out"),
        ("deit-t", {"method": "bit"}, "expected a BERT of transformers, got ViTForImageClassification"),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.run(name, **options)
