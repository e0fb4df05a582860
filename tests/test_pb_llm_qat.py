# SPDX-License-Identifier: Apache-2.0
"""PB-LLM in training: what is swapped and what is frozen, what training recovers, and the program with its resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitmill import SalientConfig, load, pack_
from bitmill.demo.model import Stories, StoriesConfig, load_stories
from bitmill.demo.text import encode_pieces, read_text, split_stories
from bitmill.demo.tokenizer import Tokenizer
from bitmill.nn import PackedSalientLinear, SalientLinear
from bitmill.recipes import pb_llm, pb_llm_qat
from bitmill.recipes.language import perplexity
from bitmill.recipes.pb_llm_qat import binarize_, masks_of, next_token_loss

SMALL = StoriesConfig(dim=32, hidden=48, layers=2, heads=4, kv_heads=2, vocab=50, context=24)
MAGNITUDE = SalientConfig(centre=False)


def train(model: nn.Module, ids: Tensor, steps: int = 12, lr: float = 1e-2) -> list[float]:
    optimizer, losses = pb_llm_qat.optimizer(model, lr), []
    for _ in range(steps):
        loss = next_token_loss(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_binarised_weights_train(dtype: torch.dtype) -> None:
    model, ids = Stories(SMALL).to(dtype), torch.randint(50, (4, 20))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    names = binarize_(model, MAGNITUDE)
    assert names == [f"layers.{i}.{name}" for i in range(2) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]
    salient = {name: model.get_submodule(name).quantised_weight() for name in names}
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.1
    for name, t in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in names:
            assert torch.equal(t, before[name]) and t.dtype == dtype, name
        elif name.endswith(".weight"):
            mask = model.get_submodule(layer).mask
            assert t.dtype == torch.float32 and torch.equal(t[mask], before[name].float()[mask])
            assert (t != before[name].float())[~mask].float().mean() > 0.9
            assert torch.equal(model.get_submodule(layer).quantised_weight()[mask], salient[layer][mask])
    wanted = model.eval()(ids)
    pack_(model)
    torch.testing.assert_close(model(ids), wanted, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_masks_come_from_the_rounded_model() -> None:
    rounded, model = Stories(SMALL), Stories(SMALL)
    model.load_state_dict(rounded.state_dict())
    batches = [torch.randint(50, (2, 20)) for _ in range(3)]
    pb_llm.quantize_(rounded, batches, SalientConfig(0.2, metric="hessian"), progress=False)
    masks = masks_of(rounded)
    del masks["layers.1.w2"]
    assert binarize_(model, SalientConfig(0.2, metric="hessian", centre=False), masks) == list(masks)
    assert type(model.layers[1].w2) is nn.Linear and not model.layers[1].w2.weight.requires_grad
    for name, mask in masks.items():
        layer, theirs = model.get_submodule(name), rounded.get_submodule(name)
        assert isinstance(layer, SalientLinear) and isinstance(theirs, PackedSalientLinear)
        assert torch.equal(layer.mask, mask) and 0.1 < mask.float().mean() <= 0.2
        assert torch.equal(layer.value_scale, theirs.value_scale) and torch.equal(layer.value_zero, theirs.value_zero)


def test_training_recovers_what_rounding_loses() -> None:
    model = load_stories()
    pieces = encode_pieces(Tokenizer.load(), split_stories(read_text()), context=97, tokens=500)
    ids = torch.tensor([piece for piece in pieces if len(piece) == 97])
    with torch.no_grad():
        exact = next_token_loss(model, ids).item()
    binarize_(model, MAGNITUDE)
    losses = train(model, ids, steps=8, lr=4e-3)
    assert losses[0] > exact + 1 and losses[-1] < exact + 0.7 * (losses[0] - exact)


def test_the_recipe_says_what_is_wrong() -> None:
    model = Stories(SMALL)
    with pytest.raises(ValueError, match="masks must be given for metric 'hessian', got None; take masks_of"):
        binarize_(model)
    with pytest.raises(ValueError, match=r"that masks and filter accept, got none"):
        binarize_(model, MAGNITUDE, filter_fn=lambda module, name: False)
    with pytest.raises(
        ValueError, match=r"must be of nn\.Linear layers of the model, it has none named 'layers.0.norm'"
    ):
        binarize_(model, MAGNITUDE, {"layers.0.norm": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"layers\.0\.wq: .* mask must be bool \[32, 32\], got bool \[1\]"):
        binarize_(model, MAGNITUDE, {"layers.0.wq": torch.ones(1, dtype=torch.bool)})
    kept = model.layers[1].w1.weight[0, 0].item()
    with torch.no_grad():
        model.layers[1].w1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.w1: SalientLinear: weight must be finite"):
        binarize_(model, MAGNITUDE)
    with torch.no_grad():
        model.layers[1].w1.weight[0, 0] = kept
    model.layers[1].w3.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.w3: it has hooks"):
        binarize_(model, MAGNITUDE)
    assert type(model.layers[0].wq) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_program_resumes_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitmill.recipes.scripts import pb_llm_qat as program

    class Killed(BaseException):
        pass

    def two_layers() -> Stories:
        model = load_stories()
        model.layers = model.layers[:2]
        return model

    text = split_stories(read_text())
    monkeypatch.setattr(program, "load_stories", two_layers)
    monkeypatch.setattr(program, "split_stories", lambda _: text[: program.EVALUATED + 3])
    monkeypatch.setattr(program, "DEFAULT_TOKENS", 300)

    def run(folder: str, last: int | None = None) -> dict[str, Any]:
        calls = 0

        def loss(model: nn.Module, ids: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            return next_token_loss(model, ids)

        monkeypatch.setattr(pb_llm_qat, "next_token_loss", loss)
        sizes = {"samples": 2, "length": 64, "batch-size": 2, "parts": 2, "steps": 5, "every": 2, "lr": 4e-3}
        options = [f"--{name}={value}" for name, value in sizes.items()]
        out = tmp_path / folder
        assert program.main(["--model", program.DEMO, "--out", str(out), *options]) == 0
        result = json.loads((out / "result.json").read_text())
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        return {**result, "log": [{k: v for k, v in line.items() if k != "seconds"} for line in lines]}

    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", last=8)  # in the second half of the fourth batch
    assert run("killed") == whole
    value = whole["perplexity"]
    assert value["trained"] < value["start"] and value["float"] < value["rounded"]
    assert value["packed"] == pytest.approx(value["trained"], rel=1e-4)
    loaded = two_layers()
    load(loaded, tmp_path / "whole" / "packed.safetensors")
    assert program.demo_material().perplexity(loaded) == value["packed"]
    assert whole["file_bytes"] == (tmp_path / "whole" / "packed.safetensors").stat().st_size


def test_program_trains_a_model_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    tokenizers = pytest.importorskip("tokenizers")
    from bitmill.recipes.scripts import pb_llm_qat as program

    text = " ".join(f"the {a} saw the {b} ." for a in ("cat", "dog", "bird") for b in ("tree", "house")) + " "
    words = {word: index for index, word in enumerate(["<unk>", *sorted(set(text.split()))])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text * 20)
    out = tmp_path / "out"
    arguments = ["--model", str(tmp_path / "model"), "--out", str(out), "--metric", "magnitude", "--samples", "2"]
    with pytest.raises(SystemExit, match="--text must name the text"):
        program.main(arguments)
    arguments += ["--text", str(tmp_path / "text.txt"), "--evaluation", str(tmp_path / "text.txt")]
    with pytest.raises(ValueError, match="bits must be one of 4, 8, 16, got 3"):
        program.main([*arguments, "--bits", "3"])
    out = tmp_path / "trained"
    assert program.main([*arguments, "--out", str(out), "--steps", "12", "--lr", "1e-2", "--every", "6"]) == 0
    value = json.loads((out / "result.json").read_text())["perplexity"]
    assert value["trained"] < 0.8 * value["start"]
    loaded = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(out)).eval()
    load(loaded, out / "packed.safetensors")
    ids = transformers.AutoTokenizer.from_pretrained(out)(text * 20, return_tensors="pt").input_ids[0]
    assert perplexity(loaded, ids, 32) == value["packed"]
