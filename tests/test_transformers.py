# SPDX-License-Identifier: Apache-2.0
"""Binary attention and binary layers in transformers' own BERT and ViT."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import BinaryConfig, quantize_

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
from bitmill.integrations import transformers as host  # noqa: E402
from bitmill.recipes import bibert, bipft, bit  # noqa: E402

SIZES = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 3}
IDS = torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(1))
KEEP = torch.ones(3, 11, dtype=torch.long)
KEEP[0, 7:] = KEEP[2, 1:] = 0

KINDS = ("bool", "softmax_aware", "elastic")


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(intermediate_size=64, max_position_embeddings=16, **SIZES)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():  # untrained weights of std 0.02 leave too much to rounding
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = transformers.ViTConfig(image_size=16, patch_size=4, intermediate_size=64, **sizes)
    return transformers.ViTForImageClassification(config)


def outputs(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        result = model(**(inputs or {"input_ids": IDS, "attention_mask": KEEP}), output_hidden_states=True)
    return torch.cat([result.logits.flatten(), *(h.flatten() for h in result.hidden_states)])


def converted(recipe: str) -> Any:
    """A converted BERT whose steps are set, in eval mode."""
    model = bert()
    {"bibert": bibert, "bit": bit, "bipft": bipft}[recipe].binarize_(model)
    model.train()(input_ids=IDS, attention_mask=KEEP)
    return model.eval()


@pytest.mark.parametrize("kind", ("bool", "softmax_aware"))
@pytest.mark.parametrize("build", (bert, vit))
def test_two_lines_convert_a_model(build: Any, kind: str) -> None:
    model = build().eval()
    inputs = {} if build is bert else {"pixel_values": torch.randn(2, 3, 16, 16)}
    before = outputs(model, **inputs)
    model.set_attn_implementation(f"bitmill_{kind}")
    names = quantize_(model, BinaryConfig("bibert"), lambda module, name: "classifier" not in name)
    assert len(names) == (13 if build is bert else 12)
    trained = outputs(model, **inputs)
    assert not torch.allclose(trained, before)
    bitmill.pack_(model)
    torch.testing.assert_close(outputs(model, **inputs), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ("bibert", "bit", "bipft"))
def test_packed_equals_training_form_with_padding(recipe: str) -> None:
    model = converted(recipe)
    trained = outputs(model)
    codes: list[Tensor] = []
    handles = []
    layers = [m for m in model.modules() if isinstance(m, bitmill.nn.BinaryLinear)]
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda m, x: codes.append(x[0].sign())))
    outputs(model)
    for handle in handles:
        handle.remove()
    before, codes[:] = list(codes), []
    bitmill.pack_(model)
    assert not any(isinstance(m, bitmill.nn.BinaryLinear) for m in model.modules())
    for layer in (m for m in model.modules() if isinstance(m, bitmill.nn.PackedBinaryLinear)):
        layer.register_forward_pre_hook(lambda m, x: codes.append(x[0].sign()))
    torch.testing.assert_close(outputs(model), trained, rtol=0, atol=1e-4)
    assert len(codes) == len(before) == len(layers)
    assert all(torch.equal(a, b) for a, b in zip(codes, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_form_agree(kind: str) -> None:
    model = bert().eval()
    host.attach_attention_(model, kind)
    want = outputs(model)
    keep = KEEP.bool()[:, None, None]
    additive = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    forms = (KEEP.bool(), KEEP.float(), keep, keep.expand(3, 1, 11, 11), keep.long(), additive)
    for mask in (*forms, additive.clamp_min(-10000.0), additive.clamp_min(-torch.inf)):
        assert torch.equal(outputs(model, input_ids=IDS, attention_mask=mask), want)
    assert torch.equal(
        outputs(model, input_ids=IDS), outputs(model, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    )


@pytest.mark.parametrize("keep", [KEEP.bool(), torch.ones(3, 11, dtype=torch.bool), None], ids=["some", "all", "none"])
@pytest.mark.parametrize("skip", [True, False])
def test_masks_are_left_out_where_the_host_leaves_them_out(keep: Tensor | None, skip: bool) -> None:
    sizes = {"batch_size": 3, "q_length": 11, "mask_function": transformers.masking_utils.bidirectional_mask_function}
    for more in ({}, {"local_size": 4}, {"local_size": 40}, {"kv_length": 12}, {"kv_offset": 1}):
        arguments: Any = {"kv_length": 11, "allow_is_causal_skip": False, **sizes, **more}
        arguments |= {"attention_mask": keep, "allow_is_bidirectional_skip": skip}
        got, want = host._mask(**arguments), host.sdpa_mask(**arguments)
        assert got is want is None or torch.equal(got, want), more
        known = keep is not None and bool(keep.all()) and skip and not more
        assert host._keeps_all(**arguments) is known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", (1, 16))
def test_all_padding_and_single_tokens_stay_finite(kind: str, length: int) -> None:
    model = bert().eval()
    host.attach_attention_(model, kind)
    ids = torch.ones(2, length, dtype=torch.long)
    for mask in (torch.zeros_like(ids), torch.ones_like(ids)):
        assert outputs(model, input_ids=ids, attention_mask=mask).isfinite().all()


def test_a_decoder_attends_to_the_past_only() -> None:
    config = transformers.BertConfig(is_decoder=True, intermediate_size=64, max_position_embeddings=16, **SIZES)
    model = transformers.BertLMHeadModel(config).eval()
    host.set_attention_(model, "bool")
    changed = IDS.clone()
    changed[:, 8:] = 1
    with torch.no_grad():
        a, b = (model(input_ids=ids, use_cache=False).logits for ids in (IDS, changed))
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.equal(a[:, 8:], b[:, 8:])


def test_steps_are_parameters_and_survive_a_state_dict() -> None:
    model = converted("bit")
    steps = [name for name, _ in model.named_parameters() if ".binary_attention.alpha_" in name]
    assert len(steps) == 8
    fresh = bert()
    bit.binarize_(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh.eval()), outputs(model))
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))


@pytest.mark.parametrize("recipe", ("bibert", "bit"))
def test_save_and_load(recipe: str, tmp_path: Path) -> None:
    model, fresh = converted(recipe), bert()
    bitmill.pack_(model)
    bitmill.save(model, tmp_path / "model.safetensors")
    {"bibert": bibert, "bit": bit}[recipe].binarize_(fresh)
    bitmill.load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(outputs(fresh.eval()), outputs(model))


def test_gradients_reach_every_latent_weight() -> None:
    model = bert().train()
    bibert.binarize_(model)
    model(input_ids=IDS, attention_mask=KEEP, labels=torch.tensor([0, 1, 2])).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_a_compiled_packed_model_answers_the_same() -> None:
    model = converted("bibert")
    bitmill.pack_(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        got = compiled(input_ids=IDS, attention_mask=KEEP).logits
        torch.testing.assert_close(got, model(input_ids=IDS, attention_mask=KEEP).logits, rtol=0, atol=1e-5)


class Plain(nn.Module):
    """A model of nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


def test_what_does_not_fit_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="expected a model of transformers, got Plain"):
        host.set_attention_(Plain(), "bool")
    with pytest.raises(ValueError, match="got MultiheadAttention"):
        host.attention_layers(Plain())
    with pytest.raises(ValueError, match="kind must be one of bool, elastic"):
        host.set_attention_(bert(), "hard")
    model = bert()
    model.set_attn_implementation("bitmill_elastic")
    with pytest.raises(ValueError, match="attach_attention_"):
        outputs(model)
    with pytest.raises(ValueError, match="expected a BERT"):
        bit.binarize_(vit())


def test_what_the_rules_do_not_know_is_refused() -> None:
    q, module = torch.randn(1, 2, 3, 16), nn.Linear(2, 2)
    for kind in ("bool", "softmax_aware"):
        attend = transformers.AttentionInterface()[f"bitmill_{kind}"]
        for option in ("softcap", "s_aux", "position_bias"):
            with pytest.raises(
                ValueError, match=f"bitmill_{kind}: binary attention has no {option}, which Linear uses"
            ):
                attend(module, q, q, q, None, **{option: torch.ones(3, 3)})
            attend(module, q, q, q, None, **{option: None})


def test_models_with_nothing_to_binarise() -> None:
    for binarize_ in (bibert.binarize_, bit.binarize_, bipft.binarize_):
        for model in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(2, 2))):
            with pytest.raises(ValueError, match="got Sequential"):
                binarize_(model)
    with pytest.raises(ValueError, match=r"must contain nn.Linear that the filter accepts, got only .*ReLU"):
        quantize_(nn.Sequential(nn.ReLU()), BinaryConfig())


def test_estimates_know_no_earlier_keys() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=20, is_decoder=True, **sizes))
    with pytest.raises(ValueError, match="model must be an encoder, got a decoder"):
        bipft.binarize_(decoder)
    bipft.binarize_(decoder, rank=0)
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    bipft.binarize_(encoder)
    with pytest.raises(ValueError, match="cache must be None"):
        encoder.encoder.layer[0].attention.self(torch.randn(1, 3, 32), cache=transformers.DynamicCache())


def test_a_model_that_does_not_fit_keeps_its_attention() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    model.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="has hooks"):
        bibert.binarize_(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("installed", "message"),
    [(None, "needs transformers 5, which is not installed"), ("4.57.1", "needs transformers 5 or newer, got 4.57.1")],
)
def test_another_version_of_the_host_is_one_sentence(
    installed: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = None if installed is None else types.SimpleNamespace(__version__=installed)
    monkeypatch.setitem(sys.modules, "transformers", other)
    spec = importlib.util.spec_from_file_location("bitmill.integrations.again", host.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=rf"{message}.*pip install 'transformers>=5'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_projections_are_the_tensors_before_the_signs() -> None:
    model = bert()
    projections = host.Projections(model)
    model(input_ids=IDS, attention_mask=KEEP)
    q, _, v = projections.last[1]
    assert q.shape == v.shape == (3, 3, 11, 16)
    q.sum().backward()
    assert model.bert.encoder.layer[1].attention.self.query.weight.grad is not None
    projections.remove()
    bibert.binarize_(model)  # which refuses layers that have hooks
