# SPDX-License-Identifier: Apache-2.0
"""BinaryLinear and its packed form: from_linear, copies, state, the meta device, and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bitmill import BinaryConfig
from bitmill.nn import BinaryLinear, PackedBinaryLinear
from nn_binary_inputs import K, N, assert_close, every_config, inputs, trained
from problems import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


@every_config
def test_copies_and_state(config: BinaryConfig) -> None:
    layer = trained(config)
    packed = layer.pack()
    x = inputs(5, K)
    for module in (layer, packed):
        want = module(x)
        assert_same_bits(copy.deepcopy(module)(x), want)
        assert_same_bits(pickle.loads(pickle.dumps(module))(x), want)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        for assign, device in ((True, "meta"), (False, "cpu")):
            if module is layer:
                fresh = BinaryLinear(K, N, config=config, device=device)
            else:
                fresh = PackedBinaryLinear(**packed.arguments(), config=config, device=device)
            fresh.load_state_dict(state, assign=assign)
            assert fresh.state_dict().keys() == state.keys()
            assert_same_bits(fresh.eval()(x), want)


@every_config
def test_meta_layers_answer_the_shape(config: BinaryConfig) -> None:
    x = torch.randn(2, 3, K, device="meta", dtype=torch.bfloat16)
    for cls in (BinaryLinear, PackedBinaryLinear):
        y = cls(K, N, config=config, device="meta")(x)
        assert y.is_meta and y.shape == (2, 3, N) and y.dtype == torch.bfloat16


def test_meta_layers_can_be_filled_in_place() -> None:
    packed = trained(BinaryConfig()).pack()
    empty = PackedBinaryLinear(**packed.arguments(), device="meta").to_empty(device="cpu")
    empty.load_state_dict(packed.state_dict())
    assert_same_bits(empty(x := inputs(3, K)), packed(x))


@every_config
def test_from_linear_shares_parameters_and_leaves_the_random_state(config: BinaryConfig) -> None:
    linear = nn.Linear(K, N).eval()
    state = torch.get_rng_state()
    layer = BinaryLinear.from_linear(linear, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert all(t.device == linear.weight.device for t in (*layer.parameters(), *layer.buffers()))
    if layer.alpha is None:  # which a training batch sets
        layer.pack()
    assert torch.equal(torch.get_rng_state(), state)
    assert BinaryLinear.from_linear(nn.Linear(K, N, bias=False), config).bias is None


def test_from_linear_keeps_dtype_and_requires_grad() -> None:
    linear = nn.Linear(K, N).bfloat16()
    linear.weight.requires_grad_(False)
    for config in (BinaryConfig("bit"), BinaryConfig("bivit_pws")):
        layer = BinaryLinear.from_linear(linear, config)
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert not layer.weight.requires_grad


def test_from_linear_refuses_a_subclass() -> None:
    class Other(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"BinaryLinear: linear must be a torch.nn.Linear, got Other"):
        BinaryLinear.from_linear(Other(3, 4))


def test_alpha_is_set_by_the_first_training_batch_only() -> None:
    layer = BinaryLinear(K, N, config=BinaryConfig("bit"))
    x = inputs(8, K)
    want = 2 * x.abs().mean()
    layer.eval()
    y = layer(x)
    assert layer.alpha.item() == 1 and not layer.alpha_ready, "eval mode sets nothing"
    layer.train()
    layer(inputs(0, K))
    assert layer.alpha.item() == 1 and not layer.alpha_ready, "an empty batch sets nothing"
    assert_same_bits(layer(x).detach(), y.detach(), "eval used the step that the first batch then set")
    torch.testing.assert_close(layer.alpha.detach(), want)
    layer(x * 5)
    torch.testing.assert_close(layer.alpha.detach(), want)
    with torch.no_grad():
        layer.alpha.fill_(1.0)
    layer(x)
    assert layer.alpha.item() == 1, "a step that training moved to exactly 1 stays"
    fresh = BinaryLinear(K, N, config=BinaryConfig("bit"))
    fresh.load_state_dict(layer.state_dict())
    fresh(x * 3)
    assert fresh.alpha.item() == 1, "the state carries that the step is set"


def test_alpha_must_be_set_to_pack() -> None:
    layer = BinaryLinear(K, N, config=BinaryConfig("bit"))
    with pytest.raises(ValueError, match="alpha is not set, so it cannot be packed; run one batch"):
        layer.pack()
    BinaryLinear(K, N, config=BinaryConfig("bit", act_bits=32)).pack()


def test_config_of_another_layer_is_refused() -> None:
    from bitmill import FP4Config

    with pytest.raises(ValueError, match="BinaryLinear: config must be a BinaryConfig, got FP4Config"):
        BinaryLinear(3, 4, config=FP4Config())


@every_config
def test_dequantize_is_the_linear_of_the_binarised_weight(config: BinaryConfig) -> None:
    layer = trained(config)
    x = inputs(5, K)
    want, got = layer.dequantize(), layer.pack().dequantize()
    assert type(want) is type(got) is nn.Linear
    assert_close(got.weight.detach(), want.weight.detach())
    if config.act_bits == 32:
        assert_close(want(x).detach(), layer(x).detach(), 0.05 if config.activations == "int8" else 1e-5)


@every_config
def test_packed_is_small_and_owns_its_state(config: BinaryConfig) -> None:
    layer = trained(config)
    packed = layer.pack()
    assert not list(packed.parameters())
    assert packed.weight.numel() == config.weight_rule.planes * 2 * 16 * 7, "a bit a weight and plane, in whole tiles"
    x = inputs(5, K)
    want = packed(x)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.zero_()
    assert_same_bits(packed(x), want, "the training form's tensors are not shared")
    assert str(N) in repr(packed) and config.method in repr(packed)


def test_validate_finds_bits_past_the_edge() -> None:
    packed = trained(BinaryConfig()).pack()
    packed.validate()
    for place in ((0, 6, 0), (1, 0, 3)):  # columns 200 ... 223, and row 19
        broken = copy.deepcopy(packed)
        broken.weight[place] |= -(1 << 31) if place[1] == 6 else 1
        with pytest.raises(ValueError, match="weight: bits past the last row or column must be 0, got 1"):
            broken.validate()
