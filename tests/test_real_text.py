# SPDX-License-Identifier: Apache-2.0
"""Packed model = training model in eval mode on sentences of TinyStories: every integer and every logit, with padding,
with a row of padding alone, and from one token to 4,096.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitmill import pack_
from bitmill.demo.text import read_text
from bitmill.demo.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
from bitmill.recipes import bibert, bipft, bit  # noqa: E402

RECIPES: dict[str, Callable[[nn.Module], list[str]]] = {
    "bibert": bibert.binarize_,
    "bit": bit.binarize_,
    "bipft": bipft.binarize_,
}


def sentences(count: int) -> dict[str, Tensor]:
    """Inputs of `count` sentences, padded to the longest, and of a row without a token."""
    tokenizer = Tokenizer.load()
    ids = [tokenizer.encode(text) for text in re.findall(r"[^.!?]+[.!?]", read_text())[:count]]
    rows = [torch.tensor(row) for row in (*ids, [])]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    padded = nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    return {"input_ids": padded, "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True)}


def trained(recipe: str, inputs: dict[str, Tensor], **sizes: int) -> Any:
    """A converted BERT after a few steps, in eval mode."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128} | sizes
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=512, **sizes))
    RECIPES[recipe](model)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    labels = torch.arange(len(inputs["input_ids"])) % 2
    for _ in range(4):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def run(model: Any, inputs: dict[str, Tensor], watched: tuple[str, ...]) -> dict[str, Tensor]:
    """The outputs of the named modules, and the logits."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    with torch.no_grad():
        outputs["logits"] = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_integer_and_every_logit_of_real_text(recipe: str) -> None:
    """An output is one whole number times constants of its place, so equal outputs are equal whole numbers."""
    inputs = sentences(24)
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.min() == 0 and len(set(lengths.tolist())) > 5
    model = trained(recipe, inputs)
    binary = [name for name, m in model.named_modules() if type(m).__name__ in ("BinaryLinear", "BinaryEmbedding")]
    contexts = [name for name, m in model.named_modules() if type(m).__name__.endswith("SelfAttention")]
    assert len(binary) == 14 and len(contexts) == 2
    want = run(model, inputs, (*binary, *contexts))
    packed, chained = copy.deepcopy(model), copy.deepcopy(model)
    assert set(pack_(packed, chain=False)) == set(binary) == set(pack_(chained))
    got = run(packed, inputs, (*binary, *contexts))
    for name, t in want.items():
        assert torch.equal(got[name], t), name
    texts = {name: t[:-1] for name, t in inputs.items()}  # without the row of padding a chain skips the rest of it
    for batch, logits in ((inputs, want["logits"]), (texts, want["logits"][:-1])):
        assert torch.equal(run(chained, batch, ())["logits"], logits)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_text_gives_the_same_logits_alone_and_padded(recipe: str) -> None:
    inputs = sentences(6)
    model = trained(recipe, inputs)
    pack_(model)
    together = run(model, inputs, ())["logits"]
    for i, length in enumerate(inputs["attention_mask"].sum(1)[:-1]):
        alone = run(model, {name: t[i : i + 1, :length] for name, t in inputs.items()}, ())["logits"]
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_token_and_4096(recipe: str) -> None:
    inputs = sentences(4)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 4096}
    model = trained(recipe, inputs, **sizes)
    text = torch.tensor(Tokenizer.load().encode(read_text()[:20000]))[None]
    packed, chained = copy.deepcopy(model), copy.deepcopy(model)
    pack_(packed, chain=False)
    pack_(chained)
    for tokens, kept in ((1, 1), (4096, 4096), (4096, 4095), (4096, 1)):
        mask = torch.arange(tokens)[None] < kept
        batch = {"input_ids": text[:, :tokens], "attention_mask": mask.long()}
        assert batch["input_ids"].shape == mask.shape
        want = run(model, batch, ())["logits"]
        assert want.isfinite().all()
        for form in (packed, chained):
            assert torch.equal(run(form, batch, ())["logits"], want), (tokens, kept)
