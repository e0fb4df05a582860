# SPDX-License-Identifier: Apache-2.0
"""Windows of a text, perplexity, and the program that quantises a language model from a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill.recipes.language import perplexity, random_windows


def test_random_windows_follow_the_seed() -> None:
    ids = torch.arange(100)
    first, again, other = (torch.cat(random_windows(ids, 20, 10, seed)) for seed in (0, 0, 1))
    assert first.shape == (20, 10) and torch.equal(first, again) and not torch.equal(first, other)
    assert (first.diff() == 1).all() and (first[:, 0].max() > 60) and (first[:, 0].min() < 30)
    assert torch.equal(random_windows(ids, 1, 100)[0][0], ids)
    for wrong in (ids[:9], ids.view(10, 10)):
        with pytest.raises(ValueError, match=r"ids must be one-dimensional with at least 10 tokens, got \["):
            random_windows(wrong, 1, 10)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        random_windows(ids, 1, 0)


class Bigrams(nn.Module):
    """Logits that depend on the last token only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_perplexity_is_over_all_predicted_tokens_of_whole_windows() -> None:
    model, ids = Bigrams(), torch.randint(11, (47,))
    chance = model.table.weight.detach().softmax(1)
    losses = [-math.log(chance[ids[i - 1], ids[i]]) for i in range(40) if i % 10]
    assert perplexity(model, ids, 10) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    with torch.no_grad():
        model.table.weight.fill_(0)
    assert perplexity(model, ids, 47) == pytest.approx(11, rel=1e-5)
    with torch.no_grad():
        model.table.weight[:, 0] = 1e6
    assert perplexity(model, ids, 47) == math.inf
    with pytest.raises(ValueError, match="perplexity: ids must be one-dimensional with at least 48 tokens"):
        perplexity(model, ids, 48)
    with pytest.raises(ValueError, match="perplexity: length must be at least 2, got 1"):
        perplexity(model, ids, 1)


def test_program_quantises_a_model_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    tokenizers = pytest.importorskip("tokenizers")
    from bitmill.recipes.scripts import pb_llm

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
    arguments = ["--model", str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt")]
    arguments += ["--evaluation", str(tmp_path / "text.txt"), "--out", str(out), "--samples", "4"]
    with pytest.raises(ValueError, match="fraction must be"):
        pb_llm.main([*arguments, "--fraction", "2"])
    assert pb_llm.main([*arguments, "--fraction", "0.3"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((out / "result.json").read_text())
    assert len(result.pop("errors")) == 14 and result == printed
    # Loaded into a model with other weights it is the same model again.
    loaded = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(out)).eval()
    bitmill.load(loaded, out / "packed.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(text * 20, return_tensors="pt").input_ids[0]
    assert perplexity(loaded, ids, 32) == result["perplexity"] != result["perplexity_before"]
    assert pb_llm.main([*arguments, "--fraction", "0.3"]) == 0  # from the finished blocks
    assert json.loads((out / "result.json").read_text())["perplexity"] == result["perplexity"]
    with pytest.raises(SystemExit, match="other values of --fraction"):
        pb_llm.main([*arguments, "--fraction", "0.2"])
