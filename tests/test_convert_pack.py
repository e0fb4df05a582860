# SPDX-License-Identifier: Apache-2.0
"""pack_ and dequantize_: the packed model agrees with the training form, and the way back to plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitmill import BinaryConfig, FP4Config, SalientConfig, dequantize_, pack_, quantize_
from bitmill.config import Config
from bitmill.convert import LATENT, PACKED
from bitmill.demo.model import load_stories
from bitmill.nn import BinaryEmbedding, PackedBinaryEmbedding
from convert_models import IDS, Model, Snapshot, each_config, trained

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
