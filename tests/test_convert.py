# SPDX-License-Identifier: Apache-2.0
"""quantize_, pack_ and dequantize_: what they swap, what they leave alone, and that an error changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import bitmill
from bitmill import BinaryConfig, FP4Config, OneBitConfig, SalientConfig, dequantize_, pack_, quantize_
from bitmill.config import Config
from bitmill.convert import LATENT
from bitmill.nn import BinaryLinear, PackedBinaryLinear
from convert_models import IDS, Model, Snapshot, each_config

each_kind = pytest.mark.parametrize(
    "config",
    [BinaryConfig(), BinaryConfig(method="bit", embeddings=True), SalientConfig(), FP4Config(), OneBitConfig()],
    ids=repr,
)


# quantize_


@each_config
def test_quantize_names_what_it_swapped_and_nothing_else(config: Config) -> None:
    model = Model()
    before = dict(model.named_modules())
    names = quantize_(model, config)
    linears = ["blocks.0.fc", "blocks.1.fc", "head"]
    assert names == (["embedding"] if getattr(config, "embeddings", False) else []) + linears
    after = dict(model.named_modules())
    for name, module in before.items():
        assert (type(after[name]) in LATENT) == (name in names)
        if name in names:
            assert after[name].config == config and after[name].training == module.training
        else:
            assert after[name] is module
    assert model.norm.weight.shape == (40,) and type(model.conv) is nn.Conv1d


@each_config
def test_a_second_call_changes_nothing(config: Config) -> None:
    model = Model()
    assert quantize_(model, config)
    snapshot = Snapshot(model)
    assert quantize_(model, config) == []
    snapshot.assert_same(model)
    model(IDS)
    assert pack_(model)
    snapshot = Snapshot(model)
    assert pack_(model) == []
    assert quantize_(model, FP4Config()) == []
    snapshot.assert_same(model)


def test_another_configuration_takes_what_is_left() -> None:
    model = Model()
    assert quantize_(model, BinaryConfig(), lambda m, name: name != "head") == ["blocks.0.fc", "blocks.1.fc"]
    assert quantize_(model, FP4Config()) == ["head"]
    assert [type(m).__name__ for m in model.modules() if isinstance(m, LATENT)] == [*["BinaryLinear"] * 2, "FP4Linear"]


@each_kind
def test_parameters_are_shared_and_an_optimizer_made_before_trains_them(config: Config) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weight, bias, head = model.blocks[0]["fc"].weight, model.blocks[0]["fc"].bias, model.head.weight
    quantize_(model, config)
    assert model.blocks[0]["fc"].weight is weight and model.blocks[0]["fc"].bias is bias
    assert model.head.weight is head and model.embedding.weight is head
    old = weight.detach().clone(), bias.detach().clone(), head.detach().clone()
    model(IDS).square().sum().backward()
    optimizer.step()
    for t, before in zip((weight, bias, head), old, strict=True):
        assert not torch.equal(t, before)
    assert model.head.weight is model.embedding.weight


def test_flags_and_modes_are_kept() -> None:
    model = Model().eval()
    model.blocks[0]["fc"].requires_grad_(False)
    model.blocks[1].train()
    quantize_(model, BinaryConfig())
    assert not model.blocks[0]["fc"].weight.requires_grad and model.blocks[1]["fc"].weight.requires_grad
    assert not model.blocks[0]["fc"].training and model.blocks[1]["fc"].training


@each_kind
def test_nothing_matched_names_the_classes_seen(config: Config) -> None:
    class Conv1D(nn.Module):  # as in GPT-2: not an nn.Linear
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    model = nn.Sequential(Conv1D(), nn.LayerNorm(4), Conv1D())
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"quantize_: .*nn\.Linear.*got only Conv1D, LayerNorm, Sequential$"):
        quantize_(model, config)
    with pytest.raises(ValueError, match=r"pack_: .*call quantize_ first.*got only Conv1D, LayerNorm, Sequential$"):
        pack_(model)
    with pytest.raises(ValueError, match=r"dequantize_: .*got only Conv1D"):
        dequantize_(model)
    snapshot.assert_same(model)
    refused = Model()
    with pytest.raises(ValueError, match="that the filter accepts"):
        quantize_(refused, config, lambda module, name: False)


@pytest.mark.parametrize("config", [None, {}, {"config": "BinaryConfig"}, "bibert", BinaryConfig, Config()])
def test_only_a_configuration_configures(config: Any) -> None:
    with pytest.raises(
        ValueError, match="quantize_: config must be one of BinaryConfig, SalientConfig, FP4Config, OneBitConfig, got"
    ):
        quantize_(Model(), config)


def test_the_filter_sees_every_candidate_and_may_raise() -> None:
    model, seen = Model(), []
    assert quantize_(
        model, BinaryConfig(embeddings=True), lambda m, name: seen.append((type(m), name)) or name == "head"
    )
    names = ["embedding", "blocks.0.fc", "blocks.1.fc", "head"]
    assert seen == [(nn.Embedding if n == "embedding" else nn.Linear, n) for n in names]

    def fails(module: nn.Module, name: str) -> bool:
        if name == "head":
            raise KeyError("no")
        return True

    fresh = Model()
    snapshot = Snapshot(fresh)
    with pytest.raises(KeyError):
        quantize_(fresh, BinaryConfig(), fails)
    snapshot.assert_same(fresh)


def test_subclasses_of_linear_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mine": Mine(4, 4), "plain": nn.Linear(4, 4)})
    out = model["attention"].out_proj
    assert type(out) is not nn.Linear and isinstance(out, nn.Linear)
    assert quantize_(model, BinaryConfig()) == ["plain"]
    assert model["attention"].out_proj is out and type(model["mine"]) is Mine
    with pytest.raises(ValueError, match="got only ModuleDict, MultiheadAttention, NonDynamicallyQuantizableLinear"):
        quantize_(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), BinaryConfig())
    parametrised = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"got only .*ParametrizedLinear"):
        quantize_(parametrised, BinaryConfig())


@each_kind
def test_torchs_own_encoder_calls_the_swapped_layers(config: Config) -> None:
    # In eval mode without gradients it would read linear1.weight and never call linear1.
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert len(quantize_(model, config)) == 4
    model(x)  # one batch in training mode
    model.eval()
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        assert torch.allclose(model(x, src_key_padding_mask=padding), expected, atol=1e-5)
    pack_(model)
    with torch.no_grad():
        packed = model(x, src_key_padding_mask=padding)
    assert torch.isfinite(packed).all()
    assert (packed - expected).abs().mean() < 1e-2  # signs near a tie may differ


def test_a_weight_that_attention_reads_without_calling_its_layer() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "head": nn.Linear(32, 2)})
    model["attention"].out_proj = nn.Linear(32, 32)
    assert quantize_(model, BinaryConfig()) == ["head"]


def test_a_part_of_torchs_encoder_that_nests_its_tensors() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    quantize_(encoder.layers[1], BinaryConfig())
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False, False, True, True, True]])
    with torch.no_grad(), pytest.raises(ValueError, match="x must not be a nested tensor; quantise the whole"):
        encoder(x, src_key_padding_mask=padding)
    encoder.use_nested_tensor = False
    with torch.no_grad():
        assert encoder(x, src_key_padding_mask=padding).shape == x.shape


def test_a_shared_module_is_swapped_under_all_its_names() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    assert quantize_(model, BinaryConfig()) == ["a", "b.0", "c"]
    assert model["a"] is model["b"][0] and type(model["a"]) is BinaryLinear and model["c"] is not model["a"]
    assert pack_(model) == ["a", "b.0", "c"]
    assert model["a"] is model["b"][0] and type(model["a"]) is PackedBinaryLinear
    assert dequantize_(model) == ["a", "b.0", "c"]
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear


def test_a_filter_that_refuses_one_name_of_a_shared_module_keeps_it() -> None:
    shared = nn.Linear(8, 8)
    for order in (("body", "classifier"), ("classifier", "body")):
        model = nn.ModuleDict({name: shared for name in order} | {"c": nn.Linear(8, 8)})
        assert quantize_(model, BinaryConfig(), lambda m, name: "classifier" not in name) == ["c"]
        assert model["body"] is shared and model["classifier"] is shared


def test_the_model_itself_cannot_be_swapped() -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="quantize_: the model itself is a Linear"):
        quantize_(linear, BinaryConfig())
    layer = BinaryLinear(4, 4)
    assert quantize_(layer, BinaryConfig()) == []
    with pytest.raises(ValueError, match="pack_: the model itself is a BinaryLinear"):
        pack_(layer)
    with pytest.raises(ValueError, match="dequantize_: the model itself is a PackedBinaryLinear"):
        dequantize_(layer.pack())


def test_what_a_swap_would_drop_is_an_error() -> None:
    def nothing(*args: Any) -> None:
        return None

    def own_forward(layer: nn.Module) -> None:
        layer.forward = lambda x: x  # type: ignore[method-assign]

    attach = {
        "forward hook": lambda m: m.register_forward_hook(nothing),
        "forward pre-hook": lambda m: m.register_forward_pre_hook(nothing),
        "backward hook": lambda m: m.register_full_backward_hook(nothing),
        "backward pre-hook": lambda m: m.register_full_backward_pre_hook(nothing),
        "state_dict hook": lambda m: m.register_state_dict_post_hook(nothing),
        "load hook": lambda m: m.register_load_state_dict_post_hook(nothing),
        "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
        "spectral norm": nn.utils.spectral_norm,
        "forward": own_forward,
        "submodule": lambda m: m.add_module("adapter", nn.Identity()),
    }
    for what, change in attach.items():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        change(model[1])
        snapshot = Snapshot(model)
        with pytest.raises(ValueError, match=r"^quantize_: 1: it has .*, which a swap would drop; remove"):
            quantize_(model, BinaryConfig())
        snapshot.assert_same(model)
        assert quantize_(model, BinaryConfig(), lambda m, name: name == "0") == ["0"], what
    for what in ("forward hook", "load hook", "forward", "submodule"):
        for config in (BinaryConfig(), SalientConfig(), FP4Config()):
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            quantize_(model, config)
            attach[what](model[1])
            snapshot = Snapshot(model)
            for function in (pack_, dequantize_):
                with pytest.raises(ValueError, match=rf"^{function.__name__}: 1: it has .*, which a swap would drop"):
                    function(model)
                snapshot.assert_same(model)
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_buffer("mask", torch.ones(8, 8))
    with pytest.raises(ValueError, match="it has 'mask' attached"):
        quantize_(model, BinaryConfig())


def test_hooks_elsewhere_are_kept() -> None:
    model, calls = Model(), []
    model.norm.register_forward_hook(lambda *a: calls.append("norm"))
    model.blocks[0].register_forward_hook(lambda *a: None)
    quantize_(model, BinaryConfig())
    model(IDS)
    assert calls == ["norm", "norm"]


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_a_layer_in_the_middle_that_fails_leaves_the_model_untouched(option: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8, **option), nn.Linear(8, 8))
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=rf"^quantize_: 1: .*{next(iter(option))}"):
        quantize_(model, BinaryConfig(embeddings=True))
    snapshot.assert_same(model)


def test_a_deep_and_wide_model() -> None:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(100):
        model = nn.Sequential(model, nn.Linear(2, 2))
    names = quantize_(model, BinaryConfig())
    assert len(names) == 101 and ".".join(["0"] * 100) in names
    assert pack_(model) == names and dequantize_(model) == names


def test_a_module_whose_name_contains_a_dot() -> None:
    model = nn.Module()
    setattr(model, "a.b", nn.Linear(4, 4))
    model.a = nn.Linear(4, 4)
    assert sorted(quantize_(model, BinaryConfig())) == ["a", "a.b"]
    assert type(getattr(model, "a.b")) is BinaryLinear and type(model.a) is BinaryLinear


@each_config
def test_a_model_on_the_meta_device(config: Config) -> None:
    with torch.device("meta"):
        model = Model()
    assert quantize_(model, config)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    snapshot = [type(m) for m in model.modules()]
    for function in (pack_, dequantize_):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: .*: it is on the meta device"):
            function(model)
    assert [type(m) for m in model.modules()] == snapshot


def test_the_functions_are_public() -> None:
    assert {"quantize_", "pack_", "dequantize_"} <= set(bitmill.__all__)
