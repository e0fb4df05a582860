# SPDX-License-Identifier: Apache-2.0
"""Every method of the registry with every number of bits: its formula, its gradient, and its packed form."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from binary_inputs import leaf
from bitmill import BinaryConfig, binarize, load, pack_, quantize_, save
from bitmill.binarize import ActivationRule, Method, WeightRule, method, method_names, set_epoch
from bitmill.nn import BinaryEmbedding, BinaryLinear, PackedBinaryLinear
from problems import assert_same_bits

CONFIGS = [
    BinaryConfig(name, act_bits=a, weight_bits=w)
    for name in method_names()
    for a in method(name).act_bits
    for w in method(name).weight_bits
]
FEW_BITS = [c for c in CONFIGS if c.act_bits != 1 or c.weight_bits != 1 or c.method in ("recu", "fda", "n2uq")]
PACKABLE = [c for c in FEW_BITS if c.weight_rule.planes]


def name_of(config: BinaryConfig) -> str:
    return f"{config.method}-w{config.weight_bits}a{config.act_bits}"


def trained(config: BinaryConfig, k: int = 70, n: int = 19) -> BinaryLinear:
    layer = BinaryLinear(k, n, config=config)
    layer(torch.randn(6, k))
    set_epoch(layer, 29, 30)
    return layer.eval()


# Packed forms


@pytest.mark.parametrize("config", PACKABLE, ids=name_of)
def test_packed_equals_training_form_at_odd_shapes(config: BinaryConfig) -> None:
    for k, n in ((1, 1), (7, 17), (31, 3), (33, 16), (197, 40)):
        layer = trained(config, k, n)
        packed = layer.pack()
        assert packed.weight.numel() == math.ceil(n / 16) * math.ceil(k / 32) * 16 * config.weight_rule.planes
        for x in (torch.randn(5, k), torch.randn(2, 3, k), torch.randn(k), torch.zeros(2, k), torch.randn(0, k)):
            want = layer(x).detach()
            if config.act_bits == 32:
                torch.testing.assert_close(packed(x), want, rtol=1e-5, atol=1e-5)
            else:
                assert_same_bits(packed(x), want, f"k = {k}, n = {n}")


@pytest.mark.parametrize("config", [c for c in PACKABLE if c.act_bits != 32], ids=name_of)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e-40])
def test_packed_equals_training_form_at_special_numbers(config: BinaryConfig, special: float) -> None:
    layer = trained(config)
    x = torch.randn(4, 70)
    x[1, 3] = special
    assert_same_bits(layer.pack()(x), layer(x).detach())


@pytest.mark.parametrize("config", FEW_BITS, ids=name_of)
def test_copies_and_files(config: BinaryConfig, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(70, 19), nn.ReLU(), nn.Linear(19, 5))
    quantize_(model, config)
    model(torch.randn(6, 70))
    set_epoch(model, 3, 30)
    model.eval()
    x = torch.randn(5, 70)
    for packed in (False, True) if config.weight_rule.planes else (False,):
        if packed:
            pack_(model)
        want = model(x).detach()
        fresh = nn.Sequential(nn.Linear(70, 19), nn.ReLU(), nn.Linear(19, 5)).eval()
        save(model, tmp_path / "file")
        assert load(fresh, tmp_path / "file") == ["0", "2"]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            assert_same_bits(twin(x).detach(), want)
            assert twin[0].config == config


def test_weights_of_whole_numbers_do_not_pack() -> None:
    for bits in (4, 8):
        layer = BinaryLinear(8, 4, config=BinaryConfig("llmqat", weight_bits=bits))
        message = rf"weight_bits of method 'llmqat' must be 1 or 2 to be packed, got {bits}; keep the training form"
        with pytest.raises(ValueError, match=message):
            layer.pack()
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match=f"pack_: 0: BinaryLinear: {message}"):
            pack_(model)
        assert model[0] is layer
        with pytest.raises(ValueError, match=f"weight_bits={bits} of method 'llmqat' have no packed form"):
            PackedBinaryLinear(8, 4, config=layer.config)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.weight_rule.centre != "global"], ids=name_of)
def test_rows_of_zeros_give_no_nan(config: BinaryConfig) -> None:
    layer = BinaryLinear(40, 6, config=config)
    with torch.no_grad():
        layer.weight[2] = 0
        if layer.weight_scale is not None:
            layer.weight_scale.copy_(binarize.weight_scale(layer.weight, config.weight_rule))
    x = leaf(torch.randn(3, 40))
    y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    if config.method != "n2uq" or config.weight_bits > 1:
        torch.testing.assert_close(y[:, 2], layer.bias[2].expand(3))


# What follows the epoch


def test_set_epoch_moves_what_the_methods_say() -> None:
    model = nn.ModuleDict({m: BinaryLinear(70, 4, config=BinaryConfig(m)) for m in ("recu", "fda", "bibert")})
    assert model["recu"].tau == 1 and model["fda"].terms == 9 and model["fda"].noise == 0
    assert set_epoch(model, 0, 50) == ["recu", "fda"]
    torch.testing.assert_close(model["recu"].tau, torch.tensor(0.85))
    torch.testing.assert_close(model["fda"].noise, torch.tensor(0.05 * (1 + math.cos(math.pi / 50))))
    assert set_epoch(model, 49, 50) == ["recu", "fda"]
    assert 0.98 < model["recu"].tau < 0.99 and model["fda"].terms == 17 and model["fda"].noise.abs() < 1e-7
    state = copy.deepcopy(model.state_dict())
    set_epoch(model, 3, 50)
    model.load_state_dict(state)
    assert model["fda"].terms == 17, "a checkpoint carries the numbers of its epoch"
    for epoch, epochs in ((50, 50), (-1, 50), (0, 0), (True, 2), (1.0, 2), (0, None)):
        with pytest.raises(ValueError, match="set_epoch: epoch must be a whole number from 0 to epochs - 1, got"):
            set_epoch(model, epoch, epochs)


def test_parameters_exist_before_the_first_batch() -> None:
    for config in CONFIGS:
        layer = BinaryLinear(70, 4, config=config)
        before = dict(layer.named_parameters())
        layer(torch.randn(3, 70)).sum().backward()
        assert {key: id(p) for key, p in layer.named_parameters()} == {key: id(p) for key, p in before.items()}


def test_noise_is_learned_in_training_and_gone_in_evaluation() -> None:
    layer = BinaryLinear(130, 4, config=BinaryConfig("fda"))
    x = torch.randn(8, 130)
    layer.eval()
    want = layer(x)
    set_epoch(layer, 0, 10)
    assert_same_bits(layer(x), want)
    layer.train()
    assert not torch.allclose(layer(x), want)
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):  # the outer matrices start at 0, so the inner ones move from the second step on
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert {key for key, p in layer.named_parameters() if not torch.equal(p, before[key])} == set(before)
    assert {"weight_inner", "weight_outer", "act_inner", "act_outer"} < set(before)
    assert BinaryLinear(63, 4, config=BinaryConfig("fda")).weight_inner is None, "too narrow for a hidden unit"


@pytest.mark.parametrize("name", ["recu", "fda"])
def test_a_new_epoch_does_not_recompile(name: str) -> None:
    torch._dynamo.reset()
    layer = BinaryLinear(70, 4, config=BinaryConfig(name))
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(5, 70)
    set_epoch(layer, 0, 30)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in (1, 29):
            set_epoch(layer, epoch, 30)
            torch.testing.assert_close(compiled(x), layer(x))


# Declaring a method


def test_a_new_method_may_mix_everything() -> None:
    """Two residual planes and signs of a row's scale: rules that no published method has together."""
    new = Method(
        "residual_xnor",
        "a test",
        weight=WeightRule(levels="residual", scale="learned", centre="row", bits=3, carries_scale=True),
        activation=ActivationRule(shift="added", scale="row_mean", surrogate="polynomial"),
        embedding=WeightRule(),
    )
    binarize.register_method(new)
    try:
        layer = BinaryLinear(70, 9, config=BinaryConfig("residual_xnor"))
        assert layer.config.weight_bits == 3 and layer.weight_scale.shape == (9, 3)
        x = torch.randn(5, 70)
        layer(x).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        packed = layer.eval().pack()
        assert packed.kernel == "integer_linear" and packed.weight.shape[0] == 3
        assert_same_bits(packed(x), layer(x).detach())
        torch.testing.assert_close(packed.dequantize().weight, layer.dequantize().weight)
        error = (layer.dequantize().weight - (layer.weight - layer.weight.mean(1, keepdim=True))).abs().mean()
        assert error < 0.3 * layer.weight.abs().mean(), "three planes come close to the weight"
    finally:
        binarize.methods._METHODS.pop("residual_xnor")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightRule(levels="quaternary"), "WeightRule: levels must be one of sign, ternary"),
        (lambda: WeightRule(bits=2), "WeightRule: bits must be 1 for levels 'sign', got 2"),
        (lambda: WeightRule(levels="uniform", bits=9), "WeightRule: bits must be a whole number from 1 to 8, got 9"),
        (lambda: WeightRule(levels="residual", bits=2), "scale must be 'learned' for levels 'residual', got 'row'"),
        (lambda: WeightRule(levels="integer", bits=4), "scale must be 'row_max' for whole numbers, got 'row'"),
        (lambda: WeightRule(levels="ternary", scale="learned"), "scale must be a statistic for levels 'ternary'"),
        (lambda: ActivationRule(bits=(2,)), r"ActivationRule: bits must be \(1,\) for scale 'none', got \(2,\)"),
        (lambda: ActivationRule(bits=()), "ActivationRule: bits must be a tuple of whole numbers from 1 to 8"),
        (lambda: ActivationRule(scale="learned", bits=(0,)), "a tuple of whole numbers"),
        (
            lambda: Method("a", "b", WeightRule(), ActivationRule(), WeightRule(), weights=(WeightRule(),)),
            "Method: weights must be one rule for each number of bits",
        ),
        (
            lambda: Method("a", "b", WeightRule(), ActivationRule(), WeightRule(), schedules=("lr",)),
            "Method: schedules must be names among tau, terms, noise, got",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rules_refuse_what_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [1, 2])
def test_tables_of_two_bits_are_ternary(bits: int) -> None:
    table = nn.Embedding(20, 33, padding_idx=0)
    layer = BinaryEmbedding.from_embedding(table, BinaryConfig("tbt", weight_bits=bits))
    values = layer(torch.arange(20)).detach()
    assert not values[0].any(), "the padding row of zeros"
    assert [len(row.unique()) for row in values[1:]] == [bits + 1] * 19
    assert_same_bits(layer.pack()(torch.arange(20)), values)
    plain = BinaryEmbedding.from_embedding(table, BinaryConfig("statsq"))
    assert len(plain(torch.tensor(3)).unique()) == 2, "planes are for linear layers"
