# SPDX-License-Identifier: Apache-2.0
"""save and load of tied weights and shared modules, and into parameters that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from bitmill import BinaryConfig, FP4Config, SalientConfig, load, pack_, quantize_, save
from bitmill.config import Config
from checkpoint_models import (
    IDS,
    Model,
    assert_refused,
    assert_same_state,
    each_form,
    each_kind,
    fresh,
    output,
    quantised,
    same_bytes,
)

# Identity: ties, parameters, flags


@each_kind
@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path, config: Config, meta: bool) -> None:
    model = quantised(config, packed=False, tied=True)
    save(model, tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert "embedding.weight" in file.keys() and "head.weight" not in file.keys()  # noqa: SIM118
    with torch.device("meta" if meta else "cpu"):
        target = Model(tied=True)
    target.hidden = torch.ones(2)
    weight = target.embedding.weight
    load(target, tmp_path / "a")
    assert target.head.weight is target.embedding.weight and isinstance(target.head.weight, nn.Parameter)
    assert meta or target.embedding.weight is weight
    assert_same_state(model, target)
    names = [n for n, _ in target.named_parameters()]
    assert "head.weight" not in names and "embedding.weight" in names
    output(target)
    target(IDS).sum().backward()
    assert target.head.weight.grad is not None


def test_tied_plain_models(tmp_path: Path) -> None:
    model, target = Model(tied=True), fresh(tied=True)
    save(model, tmp_path / "a")
    load(target, tmp_path / "a")
    assert target.head.weight is target.embedding.weight
    assert_same_state(model, target)
    untied = fresh(tied=False)
    load(untied, tmp_path / "a")
    assert_same_state(model, untied)


def test_a_tied_model_refuses_two_different_tensors(tmp_path: Path) -> None:
    save(Model(tied=False), tmp_path / "a")
    assert_refused(fresh(tied=True), tmp_path / "a", "head.weight is tied to another tensor in the model")
    with torch.device("meta"):
        meta = Model(tied=True)
    meta.hidden = torch.ones(2)
    assert_refused(meta, tmp_path / "a", "tied")
    equal = Model(tied=False)
    with torch.no_grad():
        equal.head.weight.copy_(equal.embedding.weight)
    save(equal, tmp_path / "b")
    target = fresh(tied=True)
    load(target, tmp_path / "b")
    assert target.head.weight is target.embedding.weight and torch.equal(target.head.weight, equal.head.weight)


@each_form
def test_shared_modules(tmp_path: Path, packed: bool) -> None:
    def build(shared: bool) -> nn.ModuleDict:
        a = nn.Linear(8, 8)
        return nn.ModuleDict({"a": a, "b": a if shared else nn.Linear(8, 8)})

    model = build(True)
    quantize_(model, BinaryConfig())
    if packed:
        pack_(model)
    save(model, tmp_path / "a")
    target = build(True)
    assert load(target, tmp_path / "a") == ["a", "b"]
    assert target["a"] is target["b"]
    assert_same_state(model, target)
    apart = build(False)
    load(apart, tmp_path / "a")
    assert type(apart["a"]) is type(apart["b"]) is type(model["a"]) and apart["a"] is not apart["b"]
    assert all(same_bytes(t, apart.state_dict()[name]) for name, t in model.state_dict().items())
    model = build(False)
    quantize_(model, BinaryConfig())
    if packed:
        pack_(model)
    save(model, tmp_path / "b")
    assert_refused(build(True), tmp_path / "b", "tied to another tensor")
    quantize_(model := build(False), BinaryConfig(), lambda m, name: name == "a")
    quantize_(model, FP4Config())
    save(model, tmp_path / "c")
    assert_refused(build(True), tmp_path / "c", "one module under two names in the model, and two different ones")


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    for config in (BinaryConfig(method="bit"), SalientConfig(), FP4Config()):
        model = quantised(config, packed=False)
        save(model, tmp_path / "a")
        for prepared in (False, True):
            target = fresh()
            if prepared:
                quantize_(target, config)
            before = dict(target.named_parameters())
            optimizer = torch.optim.SGD(target.parameters(), lr=1.0)
            load(target, tmp_path / "a")
            after = dict(target.named_parameters())
            assert all(after[name] is t for name, t in before.items())
            target.train()(IDS).square().sum().backward()
            optimizer.step()
            assert not torch.equal(target.fc.weight, model.fc.weight)


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    save(quantised(BinaryConfig(method="bit"), packed=False), tmp_path / "a")
    for meta in (False, True):
        with torch.device("meta" if meta else "cpu"):
            target = Model()
        target.hidden = torch.ones(2)
        target.fc.requires_grad_(False)
        target.norm.weight.requires_grad_(False)
        load(target, tmp_path / "a")
        flags = {name for name, t in target.named_parameters() if not t.requires_grad}
        assert flags == {"fc.weight", "fc.bias", "fc.shift", "fc.alpha", "norm.weight"}
    save(quantised(BinaryConfig(), packed=True), tmp_path / "a")
    target = fresh()
    load(target, tmp_path / "a")
    assert not any(t.requires_grad for t in target.fc.buffers())
