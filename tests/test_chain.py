# SPDX-License-Identifier: Apache-2.0
"""Chains: the same integers and floats as layer by layer and as the training form; when and why they do not run."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitmill
from bitmill import BinaryConfig, pack_
from bitmill.chained import Chained, chain_, chains, unchain_

transformers = pytest.importorskip("transformers")

from bitmill.recipes import bibert  # noqa: E402
from chain_models import KINDS, bert, both, texts, vit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_chain_equals_layers_and_training_form(kind: str) -> None:
    model = bert(kind)
    plain, chained = both(model)
    # two attentions, two MLPs, the encoder, and the embeddings where they are packed
    assert sum(1 for _ in chains(chained)) == (5 if kind == "bivit" else 6)
    for lengths in ((40, 7, 33, 1), (96,), (1,), (32, 32)):
        inputs = texts(*lengths)
        with torch.no_grad():
            want, got = plain(**inputs).logits, chained(**inputs).logits
            assert torch.equal(got, want), (kind, lengths)
            if kind != "bit":  # whose training form decides near ties of its softmax in float32
                assert torch.equal(model(**inputs).logits, want), (kind, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hidden_state_is_that_of_the_layers(kind: str) -> None:
    """Hooks that record hidden states turn the treatment of padding off, not the chains."""
    plain, chained = both(bert(kind))
    inputs = texts(40, 7, 33, 1)
    with torch.no_grad():
        want = plain(**inputs, output_hidden_states=True).hidden_states
        got = chained(**inputs, output_hidden_states=True).hidden_states
    assert len(want) == 3
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_padding_comes_out_as_zero_and_changes_nothing_else() -> None:
    plain, chained = both(bert().bert)
    inputs = texts(40, 7, 33, 1)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        want, got = plain(**inputs).last_hidden_state, chained(**inputs).last_hidden_state
    assert torch.equal(got[kept], want[kept])
    assert not got[~kept].any()
    assert want[~kept].any()


def masks_of(mask: Tensor) -> dict[str, Tensor]:
    padding = mask[:, None, None, :].bool()
    holes = padding & (torch.rand(padding.shape) < 0.7)
    holes[..., 0] = True
    causal = padding & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    return {
        "2-D": mask,
        "holes": holes[:, 0, 0].long(),
        "4-D": padding.expand(-1, 1, mask.shape[1], -1),
        "causal": causal,
        "additive": torch.where(padding, 0.0, torch.finfo(torch.float32).min).expand(-1, 1, mask.shape[1], -1),
        "everything": torch.ones_like(mask),
        "one text is all padding": mask * torch.tensor([[1], [0], [1], [1]]),
        "nothing": torch.zeros_like(mask),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_form(kind: str) -> None:
    plain, chained = both(bert(kind))
    inputs = texts(40, 7, 33, 1)
    for name, mask in masks_of(inputs["attention_mask"]).items():
        if kind == "bivit" and name == "additive":
            continue
        with torch.no_grad():
            want = plain(inputs["input_ids"], attention_mask=mask).logits
            got = chained(inputs["input_ids"], attention_mask=mask).logits
        assert torch.equal(got, want), name


def test_zero_biases_make_zeros_between_layers() -> None:
    """Dot products of 0 with biases of 0: bibert.md's ternary queries, keys and values."""
    model = bert()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    plain, chained = both(model)
    attention = chained.bert.encoder.layer[0].attention
    assert attention.chain.projected.negative is not None
    with torch.no_grad():
        assert torch.equal(chained(**(inputs := texts())).logits, plain(**inputs).logits)


def test_gelu_that_underflows_is_zero_in_the_chain_too() -> None:
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias.sub_(6.0)
    plain, chained = both(model)
    assert chained.bert.encoder.layer[0].chain.inner.negative is not None
    with torch.no_grad():
        assert torch.equal(chained(**(inputs := texts())).logits, plain(**inputs).logits)


@pytest.mark.parametrize("mlp_act_bits", (1, 32))
def test_vit_chain_equals_layers_and_training_form(mlp_act_bits: int) -> None:
    model = vit(mlp_act_bits)
    plain, chained = copy.deepcopy(model), copy.deepcopy(model)
    pack_(plain, chain=False)
    pack_(chained)
    reasons = [reason for _, reason in chains(chained)]
    assert len(reasons) == 6  # attention, MLP and the layer with both
    assert reasons.count("") == (6 if mlp_act_bits == 1 else 2)
    images = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        want = model(images).logits
        assert torch.equal(plain(images).logits, want)
        assert torch.equal(chained(images).logits, want)


def test_bipft_chains_its_mlps() -> None:
    """Its attention adds estimates to scores and values that no integer holds."""
    model = bert("bipft")
    plain, chained = copy.deepcopy(model), copy.deepcopy(model)
    pack_(plain, chain=False)
    pack_(chained)
    found = dict(chains(chained))
    assert found["bert.encoder.layer.1"] == ""
    assert found["bert.encoder.layer.1.attention"] == "its self-attention is a LowRankSelfAttention"
    assert found["bert.encoder"] == "not all of its attention layers are chained"
    for lengths in ((40, 7, 33, 1), (96,), (32, 32)):
        inputs = texts(*lengths)
        with torch.no_grad():
            want = model(**inputs).logits
            assert torch.equal(plain(**inputs).logits, want), lengths
            assert torch.equal(chained(**inputs).logits, want), lengths


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Electra"])
def test_relatives_of_bert(name: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "max_position_embeddings": 60}
    config = getattr(transformers, f"{name}Config")(vocab_size=300, num_hidden_layers=2, **sizes)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                p.normal_(0, 0.1)
    bibert.binarize_(model)
    plain, chained = both(model.eval())
    assert sum(1 for _ in chains(chained)) == (6 if name == "Electra" else 5)
    inputs = texts(40, 7, 33, 1)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        got, want = chained(**inputs).last_hidden_state, plain(**inputs).last_hidden_state
        assert torch.equal(got[kept], want[kept])
        assert torch.equal(want, model(**inputs).last_hidden_state)


def test_deit() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 40, "patch_size": 8}
    model = transformers.DeiTModel(transformers.DeiTConfig(num_hidden_layers=2, **sizes))
    bitmill.integrations.transformers.set_attention_(model, "softmax_aware")
    bitmill.integrations.transformers.quantize_body_(model, BinaryConfig("bivit_pws"))
    plain, chained = both(model.eval())
    assert [reason for _, reason in chains(chained)] == [""] * 6
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        want = model(images).last_hidden_state
        assert torch.equal(plain(images).last_hidden_state, want)
        assert torch.equal(chained(images).last_hidden_state, want)


def test_state_save_and_load(tmp_path: Path) -> None:
    """A chain is no part of the state: files of either kind are the same, and load into either."""
    model = bert()
    plain, chained = both(model)
    assert list(plain.state_dict()) == list(chained.state_dict())
    bitmill.save(plain, tmp_path / "plain")
    bitmill.save(chained, tmp_path / "chained")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "chained").read_bytes()
    inputs = texts()
    with torch.no_grad():
        want = chained(**inputs).logits
        for fresh in (bert(), both(bert())[1]):
            bitmill.load(fresh, tmp_path / "chained")
            assert sum(not reason for _, reason in chains(fresh)) == 6
            assert torch.equal(fresh(**inputs).logits, want)
        bitmill.load(fresh, tmp_path / "chained", chain=False)
        assert not list(chains(fresh))
        assert torch.equal(fresh(**inputs).logits, want)


def test_load_state_dict_plans_again() -> None:
    _, first = both(bert())
    _, second = both(bert())
    inputs = texts()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(second(**inputs).logits, first(**inputs).logits)


def test_copies_and_pickles() -> None:
    _, chained = both(bert())
    inputs = texts()
    with torch.no_grad():
        want = chained(**inputs).logits
        for other in (copy.deepcopy(chained), pickle.loads(pickle.dumps(chained))):
            own = other.bert.encoder.layer[0]
            assert own.chain.down[0] is own.output.dense
            assert own.attention.chain.out[0] is own.attention.output.dense
            assert torch.equal(other(**inputs).logits, want)


def test_compile_and_export() -> None:
    _, chained = both(bert())
    inputs = texts(40, 40)
    with torch.no_grad():
        want = chained(**inputs).logits
        compiled = torch.compile(chained, fullgraph=True)
        assert torch.allclose(compiled(**inputs).logits, want, atol=1e-5)
    _, images = both(vit())
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        exported = torch.export.export(images, (x,), strict=False)
        assert any("binary_encoder" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x).logits, images(x).logits)


def test_unchain_and_dequantize() -> None:
    plain, chained = both(bert())
    inputs = texts()
    assert len(unchain_(chained)) == 6
    assert not list(chains(chained))
    assert type(chained.bert.encoder.layer[0]).__name__ == "BertLayer"
    with torch.no_grad():
        assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)
        assert set(chain_(chained).values()) == {""}
        assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)
    bitmill.dequantize_(chained)
    assert not list(chains(chained))
    assert not any(isinstance(m, Chained) for m in chained.modules())
