# SPDX-License-Identifier: Apache-2.0
"""`bitmill bench --model smollm2` and the decoder that it times, on a model of two small layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill import cli, timing

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")

from bitmill.bench import language, language_peers, layers  # noqa: E402
from bitmill.integrations.generation import LEAN, Decoder, generate  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(language.SHAPES, "smollm2", SMALL)
    monkeypatch.setattr(timing, "preemptions", lambda: 0)
    monkeypatch.setattr(language, "interleave", lambda samples, *_: timing.interleave(samples, 0.01))
    monkeypatch.setattr(timing, "ROUNDS", 5)
    monkeypatch.setattr(language, "STEPS", 3)


def random_model(kind: str = "llama") -> Any:
    config = transformers.AutoConfig.for_model(kind, **SMALL, eos_token_id=None, sliding_window=None)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.01 * torch.randn_like(parameter))  # biases are 0 at first
    return model


@pytest.mark.parametrize(("kind", "lean"), [("llama", False), *((kind, None) for kind in (*LEAN, "gpt2"))])
def test_generation_is_that_of_transformers(kind: str, lean: bool | None) -> None:
    model, prompt = random_model(kind), torch.randint(50, (1, 9))
    hosts = [model] if kind == "gpt2" else [model, language.packed_model(model, "pb-llm", "float")]
    for host in hosts:
        want = host.generate(prompt, max_new_tokens=12, do_sample=False)[0, 9:].tolist()
        assert list(generate(host, prompt, 12, lean=lean)) == want
        drawn = [list(generate(host, prompt, 12, 1.0, seed, lean)) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        host.generation_config.eos_token_id = [want[4], 50]
        assert list(generate(host, prompt, 12, lean=lean)) == want[: want.index(want[4])]


@pytest.mark.parametrize("kind", LEAN)
def test_lean_steps_follow_any_prompt(kind: str) -> None:
    model, texts = random_model(kind), torch.randint(50, (2, 1, 12))
    decoder = Decoder(model, 12, lean=True)
    with torch.no_grad():
        for text, start in zip(texts, (7, 1), strict=True):
            want = model(text).logits[0]
            got = [decoder.prefill(text[:, :start]), *(decoder.step(text[:, i : i + 1]) for i in range(start, 12))]
            torch.testing.assert_close(torch.cat(got), want[start - 1 :], rtol=1e-4, atol=1e-4)


def test_generation_says_what_is_wrong() -> None:
    model, prompt = random_model(), torch.randint(50, (1, 9))
    for arguments, message in (
        ((prompt, 60), "the text must have from 1 to 64 tokens, got 69"),
        ((prompt[:, :0], 4), r"prompt must have shape \[1, length\], length > 0, got \[1, 0\]"),
        ((prompt, -1), "generate: tokens must be at least 0, got -1"),
        ((prompt, 4, -1.0), "temperature must be 0 or at least 0.0001, got -1.0"),
        ((prompt, 4, 1e-40), "temperature must be 0 or at least 0.0001, got 1e-40"),
        ((prompt, 4, float("nan")), "temperature must be 0 or at least 0.0001, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            list(generate(model, *arguments))
    for other in (random_model("gpt2"), random_model("mistral")):
        other.config.sliding_window = 8
        with pytest.raises(ValueError, match="lean must be None or False for a model of type"):
            Decoder(other, 12, lean=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", language.METHODS)
def test_every_variant_is_measured(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--model", "smollm2", "--method", method, "--tokens", "17", "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["method"], result["tokens"]) == ("smollm2", method, 17)
    rows = {row["name"]: row for row in result["variants"]}
    assert len(rows) == 5 and all(row["status"] == "ok" for row in rows.values())
    for row in rows.values():
        for kind in language.KINDS:
            assert 0 < row[kind]["low"] <= row[kind]["per_second"] <= row[kind]["high"]
    base, ours = rows["torch float32"], rows["bitmill int8"]
    assert base["step"]["x_float32"] == 1
    for kind in language.KINDS:
        ratio = ours[kind]["per_second"] / base[kind.removeprefix("lean_")]["per_second"]
        assert ours[kind]["x_float32"] == pytest.approx(ratio)
    assert rows["bitmill"]["error"] < 1e-4 < ours["error"] < 0.2
    text = language.render(result)
    assert sum(line.startswith(name) for line in text.splitlines() for name in rows) >= 5


@pytest.mark.usefixtures("small")
def test_an_engine_that_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    result = language.run("smollm2", tokens=9, peers=True)
    rows = {row["name"]: row for row in result["variants"]}
    assert len(rows) == 7
    for name in language.PEERS:
        assert rows[name]["status"].startswith("failed: ModuleNotFoundError: import of llama_cpp")
        assert rows[name]["prompt"]["per_second"] is None
        assert f"{name:<19} failed: ModuleNotFoundError" in language.render(result)


@pytest.mark.parametrize(("kind", "off"), [("Q4_0", 0.12), ("Q8_0", 0.01)])
def test_a_written_gguf_holds_the_model(tmp_path: Path, kind: str, off: float) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    model = random_model()
    language_peers.write_gguf(model, tmp_path / "model.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["llama.block_count"].contents() == 2
    written = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    assert len(written) == len(list(model.parameters()))
    body, heads, half = model.model, SMALL["num_attention_heads"], model.config.head_dim // 2
    assert layers.relative_error(written["token_embd.weight"], body.embed_tokens.weight) < 0.01
    torch.testing.assert_close(written["output_norm.weight"], body.norm.weight.data, rtol=0, atol=0)
    torch.testing.assert_close(
        written["blk.1.ffn_norm.weight"], body.layers[1].post_attention_layernorm.weight.data, rtol=0, atol=0
    )
    assert 0 < layers.relative_error(written["blk.1.ffn_down.weight"], body.layers[1].mlp.down_proj.weight) < off
    queries = body.layers[0].self_attn.q_proj.weight.unflatten(0, (heads, 2, half))
    turned = written["blk.0.attn_q.weight"].unflatten(0, (heads, half, 2))  # neighbours are what halves are there
    assert 0 < layers.relative_error(turned, queries.transpose(1, 2)) < off


@pytest.mark.usefixtures("small")
def test_wrong_requests_and_wrong_results_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="method must be one of pb-llm, fp4 for a language model, got 'bit'"):
        language.run("smollm2", "bit")
    with pytest.raises(ValueError, match="tokens must be between 1 and 60, got 61"):
        language.run("smollm2", tokens=61)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--model", "smollm2", "--profile"])
    assert "--profile does not go with --model smollm2" in capsys.readouterr().err
    assert tuple(language.SHAPES) == cli.LANGUAGE_MODELS and tuple(language.METHODS) == cli.LANGUAGE_METHODS
    monkeypatch.setattr(language, "EXACT", 0.0)
    with pytest.raises(RuntimeError, match="its logits differ from those of its weights"):
        language.run("smollm2", tokens=9)
