# SPDX-License-Identifier: Apache-2.0
"""What a chain cannot do: it is computed layer by layer, or the reason is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import BinaryConfig, pack_
from bitmill.chained import chains

transformers = pytest.importorskip("transformers")

from bitmill.recipes import bibert, bit  # noqa: E402
from chain_models import bert, both, texts, vit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_chain_cannot_do_is_computed_layer_by_layer() -> None:
    plain, chained = both(bert())
    inputs = texts(40, 40)
    attention = chained.bert.encoder.layer[1].attention
    seen: list[Tensor] = []
    with torch.no_grad():
        want = plain(**inputs).logits
        handle = attention.self.query.register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(chained(**inputs).logits, want)
        assert len(seen) == 1, "a hook on a projection was not called"
        handle.remove()
        chained.set_attn_implementation("sdpa"), plain.set_attn_implementation("sdpa")
        assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)
        chained.set_attn_implementation("bitmill_bool"), plain.set_attn_implementation("bitmill_bool")
        half, plain_half = copy.deepcopy(chained).bfloat16(), copy.deepcopy(plain).bfloat16()
        assert torch.equal(half(**inputs).logits, plain_half(**inputs).logits)
    logits = chained(**inputs).logits
    assert torch.equal(logits, want)
    logits.sum().backward()  # to the parameters that are left
    assert chained.bert.embeddings.position_embeddings.weight.grad.abs().sum() > 0
    chained.train()
    assert chained(**inputs).logits.requires_grad


@torch.no_grad()
def test_whatever_is_watched_or_replaced_in_an_encoder_is_called() -> None:
    plain, chained = both(bert())
    inputs, seen = texts(40, 30), []
    layer = chained.bert.encoder.layer[1]
    want = plain(**inputs).logits
    for module in (layer, layer.attention, layer.output.LayerNorm, layer.output.dense, layer.attention.self):
        handle = module.register_forward_hook(lambda module, *_: seen.append(type(module)))
        assert torch.equal(chained(**inputs).logits, want)
        assert seen.pop() is type(module) and not seen
        handle.remove()
    forward = layer.attention.output.forward
    layer.attention.output.forward = lambda *args: seen.append("called") or forward(*args)
    assert torch.equal(chained(**inputs).logits, want)
    assert seen == ["called"]
    del layer.attention.output.forward
    layer.output.LayerNorm = nn.Identity()
    plain.bert.encoder.layer[1].output.LayerNorm = nn.Identity()
    assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)


@torch.no_grad()
def test_whatever_is_watched_or_replaced_in_a_layer_of_vit_is_called() -> None:
    plain, chained = both(vit())
    images, seen = torch.randn(2, 3, 40, 40), []
    layer = chained.vit.layers[1]
    want = plain(images).logits
    for module in (layer.layernorm_after, layer.attention, layer.attention.o_proj, layer.mlp, layer.mlp.fc2):
        handle = module.register_forward_hook(lambda module, *_: seen.append(type(module)))
        assert torch.equal(chained(images).logits, want)
        assert seen.pop() is type(module) and not seen
        handle.remove()
    layer.layernorm_before = plain.vit.layers[1].layernorm_before = nn.Identity()
    assert torch.equal(chained(images).logits, plain(images).logits)
    del layer.mlp.chain  # as when loading other weights takes it off
    layer.mlp.__class__ = layer.mlp.plain
    assert torch.equal(chained(images).logits, plain(images).logits)


@torch.no_grad()
def test_weights_that_cannot_be_chained_loaded_into_one_layer() -> None:
    plain, chained = both(bert())
    inputs = texts(40, 30)
    for model in (plain, chained):
        layer = model.bert.encoder.layer[0]
        state = layer.state_dict()
        state["output.dense.scale"] = -state["output.dense.scale"]
        state["intermediate.dense.scale"] = torch.full_like(state["intermediate.dense.scale"], torch.nan)
        layer.load_state_dict(state)
    assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_keys_from_before_are_attended_to(padded: bool) -> None:
    plain, chained = both(bert())
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[1, 9:] = 1 - int(padded)
    x = torch.randn(3, 9, 128)
    outputs = []
    for model in (plain, chained):
        torch.manual_seed(0)
        cache = transformers.DynamicCache()
        for index in range(2):
            cache.update(torch.randn(3, 4, 4, 32), torch.randn(3, 4, 4, 32), index)
        outputs.append(model.bert(inputs_embeds=x, attention_mask=mask, cache=cache, use_cache=True))
    assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 8, 40])
def test_feed_forward_in_chunks_of_a_padded_batch(chunk: int) -> None:
    plain, chained = both(bert(chunk_size_feed_forward=chunk))
    inputs = texts(40, 30)
    assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)


@torch.no_grad()
def test_a_hook_sees_sequences_with_their_padding() -> None:
    _, chained = both(bert())
    inputs, shapes = texts(40, 30), []
    layer = chained.bert.encoder.layer[1]
    for module in (layer, layer.attention, layer.attention.output.LayerNorm, layer.intermediate, layer.output.dense):
        handle = module.register_forward_hook(
            lambda module, args, output: shapes.append((output[0] if isinstance(output, tuple) else output).shape[:-1])
        )
        chained(**inputs)
        handle.remove()
    assert shapes == [(2, 40)] * 5


def test_learned_steps_get_their_gradients_and_move_the_ranges() -> None:
    plain, chained = both(bert("bit"))
    inputs = texts(40, 40)
    for model in (plain, chained):
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_("alpha" in name)
        model(**inputs).logits.sum().backward()
    steps = {name: p.grad for name, p in plain.named_parameters() if "alpha" in name}
    assert steps and all(torch.equal(p.grad, steps[n]) for n, p in chained.named_parameters() if n in steps)
    with torch.no_grad():
        for model in (plain, chained):
            for name, p in model.named_parameters():
                if "alpha" in name:
                    p.mul_(1.7)
        assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def quantize(config: BinaryConfig, suffix: str) -> Any:
    return lambda model: bitmill.quantize_(model, config, lambda module, name: name.endswith(suffix))


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (
            quantize(BinaryConfig("bibert", group_size=32), "1.attention.output.dense"),
            "bert.encoder.layer.1.attention",
            "output has a scale for every 32 columns",
        ),
        (
            quantize(BinaryConfig("bibert", act_bits=32), "0.output.dense"),
            "bert.encoder.layer.0",
            "the second layer has activations of 32 bits",
        ),
        (
            lambda model: setattr(model.bert.encoder.layer[0].intermediate, "intermediate_act_fn", Sine()),
            "bert.encoder.layer.0",
            "the dot products of an output that become ",
        ),
    ],
)
def test_reasons(change: Any, name: str, reason: str) -> None:
    config = transformers.BertConfig(
        vocab_size=300, num_hidden_layers=2, hidden_size=128, num_attention_heads=4, intermediate_size=192
    )
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for dense in (layer.intermediate.dense for layer in model.bert.encoder.layer):
            dense.weight.mul_(30)
    change(model)
    bibert.binarize_(model)
    plain, chained = copy.deepcopy(model), copy.deepcopy(model)
    pack_(plain, chain=False)
    pack_(chained)
    found = dict(chains(chained))
    assert reason in found[name]
    assert f"{name} computes layer by layer: " in str(bitmill.summary(chained))
    with torch.no_grad():
        assert torch.equal(chained(**(inputs := texts())).logits, plain(**inputs).logits)


def test_attention_that_has_no_form_on_bits() -> None:
    for attention, reason in (("sdpa", "its attention is 'sdpa'"), ("bitmill_sign_softmax", "has no form on bits")):
        model = bert()
        if attention != "sdpa":
            bibert.binarize_(fresh := bert(), "sign_softmax")
            del fresh
        model.set_attn_implementation(attention)
        pack_(model)
        found = dict(chains(model))
        assert reason in found["bert.encoder.layer.0.attention"]
        assert found["bert.encoder"] == "not all of its attention layers are chained"
        assert found["bert.encoder.layer.0"] == ""


def test_heads_that_are_not_whole_words_and_steps_that_are_not_set() -> None:
    model = bert(hidden_size=96, num_attention_heads=4, intermediate_size=64)
    pack_(model)
    assert dict(chains(model))["bert.encoder.layer.0.attention"] == "heads of 24 columns are not whole words of 32"
    config = transformers.BertConfig(vocab_size=300, num_hidden_layers=1, hidden_size=64, num_attention_heads=2)
    model = transformers.BertForSequenceClassification(config)
    bit.binarize_(model)
    model.train()(**texts(20))
    model.bert.encoder.layer[0].attention.self.binary_attention.alpha_ready.fill_(False)
    pack_(model.eval())
    reason = dict(chains(model))["bert.encoder.layer.0.attention"]
    assert reason == "the steps of the attention have not been set by a training batch"


def test_texts_longer_than_the_plan() -> None:
    model = vit()
    plain, chained = both(model)
    for attention in chained.modules():
        if hasattr(attention, "chain") and hasattr(attention.chain, "most_keys"):
            attention.chain.most_keys = 8
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(chained(images).logits, plain(images).logits)


def test_padding_where_the_attention_is_not_the_planned_one() -> None:
    """The layers then compute one by one, with the mask that they know."""
    (plain, chained), inputs = both(bert()), texts(20, 3)
    for most_keys, implementation in ((96, "bitmill_softmax_aware"), (8, "bitmill_bool")):
        for attention in (m for m in chained.modules() if hasattr(getattr(m, "chain", None), "most_keys")):
            attention.chain.most_keys = most_keys
        for model in (plain, chained):
            model.set_attn_implementation(implementation)
        with torch.no_grad():
            assert torch.equal(chained(**inputs).logits, plain(**inputs).logits)
