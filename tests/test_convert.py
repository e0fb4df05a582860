# SPDX-License-Identifier: Apache-2.0
"""quantize_, pack_ and dequantize_: what they swap, what they leave alone, and that an error changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import bitmill
from bitmill import BinaryConfig, FP4Config, OneBitConfig, SalientConfig, dequantize_, pack_, quantize_
from bitmill.binarize import method_names
from bitmill.config import Config
from bitmill.convert import LATENT, PACKED
from bitmill.demo.model import load_stories
from bitmill.nn import BinaryEmbedding, BinaryLinear, PackedBinaryEmbedding, PackedBinaryLinear

CONFIGS: list[Config] = [
    *(BinaryConfig(method=m, act_bits=bits) for m in method_names() for bits in (None, 32)),
    *(BinaryConfig(method="bit", act_bits=bits) for bits in (2, 4)),
    BinaryConfig(method="bit", signed=False),
    BinaryConfig(method="tbt", weight_bits=2, act_bits=8),
    BinaryConfig(method="binarydm", weight_bits=2, act_bits=32),
    BinaryConfig(zero="plus", group_size=32),
    *(BinaryConfig(method=m, embeddings=True) for m in method_names()),
    SalientConfig(),
    SalientConfig(fraction=0.3, bits=16, centre=False, group_size=32),
    *(FP4Config(format=f) for f in FP4Config.FORMATS),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=repr)
each_kind = pytest.mark.parametrize(
    "config",
    [BinaryConfig(), BinaryConfig(method="bit", embeddings=True), SalientConfig(), FP4Config(), OneBitConfig()],
    ids=repr,
)


class Model(nn.Module):
    """Two linear layers, a tied head, and things that nothing may touch."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 40, padding_idx=3)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(40, 40)}) for _ in range(2))
        self.norm = nn.LayerNorm(40)
        self.conv = nn.Conv1d(3, 3, 1)
        self.head = nn.Linear(40, 24, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block["fc"](self.norm(x))
        return self.head(self.conv(x.transpose(0, 0)))


IDS = torch.tensor([[0, 1, 2], [3, 4, 23]])


class Snapshot:
    """Bit-for-bit what a model holds: its modules, its tensors and their values."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.tensors = [(name, t) for name, t in model.state_dict(keep_vars=True).items()]
        self.values = [t.detach().clone() for _, t in self.tensors]
        self.flags = [(m.training, t.requires_grad) for _, m in self.modules for t in m.parameters(recurse=False)]

    def assert_same(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert [(n, id(m)) for n, m in self.modules] == [(n, id(m)) for n, m in now.modules]
        assert [(n, id(t)) for n, t in self.tensors] == [(n, id(t)) for n, t in now.tensors]
        assert self.flags == now.flags
        for a, b in zip(self.values, now.values, strict=True):
            assert a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def trained(config: Config, tied: bool = True) -> Model:
    """A quantised model that has seen one batch."""
    model = Model(tied)
    quantize_(model, config)
    model(IDS)
    return model


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


# pack_


@each_config
def test_packed_and_training_form_agree_in_eval_mode(config: Config) -> None:
    model = trained(config).eval()
    with torch.no_grad():
        expected = model(IDS)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LATENT)}
        x = torch.randn(5, 40)
        outputs = {n: m(IDS if isinstance(m, BinaryEmbedding) else x) for n, m in layers.items()}
    names = pack_(model)
    assert names == list(layers)
    with torch.no_grad():
        for name in names:
            layer = model.get_submodule(name)
            assert type(layer) in PACKED and not layer.training and not list(layer.parameters())
            got = layer(IDS if isinstance(layer, PackedBinaryEmbedding) else x)
            if isinstance(config, BinaryConfig) and config.act_bits == 1:
                assert torch.equal(got, outputs[name]), name
            else:
                torch.testing.assert_close(got, outputs[name], rtol=1e-5, atol=1e-5)
        got = model(IDS)
    if isinstance(config, BinaryConfig) and config.act_bits == 1:
        assert torch.equal(got, expected)
    elif not isinstance(config, BinaryConfig) or config.act_bits == 32:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_real_model_stays_itself() -> None:
    model, ids = load_stories(), torch.tensor([[1, 403, 407, 261, 378]])
    with torch.no_grad():
        quantize_(model, BinaryConfig())
        expected = model(ids)
        assert len(pack_(model)) == 35
        assert torch.equal(model(ids), expected)


def test_an_elastic_step_that_nothing_has_set_names_the_layer() -> None:
    model = Model()
    quantize_(model, BinaryConfig(method="bit"))
    model.blocks[0]["fc"](torch.randn(2, 40))  # only the first layer has seen a batch
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"^pack_: blocks\.1\.fc: .*alpha is not set.*run one batch"):
        pack_(model)
    snapshot.assert_same(model)


@each_config
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_without_packed_form_leaves_the_model_untouched(config: Config, value: float) -> None:
    model = trained(config, tied=False)
    with torch.no_grad():
        model.head.weight[1, 1] = value
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=r"^pack_: head: .*weight must be finite"):
        pack_(model)
    snapshot.assert_same(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_every_layer_of_a_training_model_can_be_without_rows() -> None:
    for config in (BinaryConfig(), SalientConfig(), *(FP4Config(format=f) for f in FP4Config.FORMATS)):
        model = nn.Sequential(nn.Linear(8, 0, bias=False))
        assert quantize_(model, config) == ["0"] and pack_(model) == ["0"]
        assert model(torch.randn(3, 8)).shape == (3, 0)
        assert dequantize_(model) == ["0"] and model[0].weight.shape == (0, 8)


# dequantize_


@each_config
def test_dequantize_gives_back_plain_layers(config: Config) -> None:
    model = trained(config)
    packed = copy.deepcopy(model)
    names = pack_(packed)
    assert dequantize_(model) == names and dequantize_(packed) == names
    for name in names:
        a, b = model.get_submodule(name), packed.get_submodule(name)
        assert type(a) is type(b) is (nn.Embedding if name == "embedding" else nn.Linear)
        assert a.weight.requires_grad and b.training == model.training
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=1e-7)
        if name == "embedding":
            assert a.padding_idx == b.padding_idx == 3
        else:
            assert (a.bias is None) == (b.bias is None) == (name == "head")
    for m in (model, packed):
        with pytest.raises(ValueError, match="dequantize_: the model must contain bitmill layers"):
            dequantize_(m)
        assert not any(isinstance(x, LATENT + PACKED) for x in m.modules())
        m(IDS).sum().backward()


@pytest.mark.parametrize("act_bits", [1, 32])
def test_dequantised_binary_weights_are_scale_times_signs(act_bits: int) -> None:
    model = nn.Sequential(nn.Linear(40, 24))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    quantize_(model, BinaryConfig(act_bits=act_bits))
    pack_(model)
    scale, signs = model[0].scale.clone(), (weight - weight.mean(1, keepdim=True)).sign()
    dequantize_(model)
    assert torch.equal(model[0].weight, scale * signs) and torch.equal(model[0].bias, bias)
    torch.testing.assert_close(scale, weight.abs().mean(1, keepdim=True))


def test_dequantised_layers_own_their_tensors() -> None:
    model = trained(BinaryConfig(), tied=False)
    latent = model.head.weight
    dequantize_(model)
    with torch.no_grad():
        model.head.weight.zero_()
    assert latent.abs().sum() > 0


def test_the_functions_are_public() -> None:
    assert {"quantize_", "pack_", "dequantize_"} <= set(bitmill.__all__)
