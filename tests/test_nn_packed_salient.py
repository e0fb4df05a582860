# SPDX-License-Identifier: Apache-2.0
"""PackedSalientLinear by itself: what it refuses to hold, and several layers joined to one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bitmill.config import SalientConfig
from bitmill.nn import PackedSalientLinear
from salient_inputs import CONFIGS, layer_of


def test_empty_packed_layer_is_valid() -> None:
    for config in CONFIGS:
        for encoding in ("bitmap", "list", "columns"):
            packed = PackedSalientLinear(40, 5, config=config, encoding=encoding)
            packed.validate()
            assert torch.equal(packed(torch.randn(2, 40)), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="encoding must be one of"):
        PackedSalientLinear(40, 5, encoding="csr")


def test_validate_finds_what_contradicts() -> None:
    packed = layer_of(SalientConfig(fraction=0.3)).pack()

    def broken(name: str, change) -> PackedSalientLinear:
        twin = copy.deepcopy(packed)
        change(getattr(twin, name))
        return twin

    for name, change in (
        ("start", lambda t: t[3].add_(1)),
        ("start", lambda t: t[-1].add_(1)),
        ("start", lambda t: t[0].sub_(1)),
        ("index", lambda t: t[0, 0, 0].bitwise_xor_(1)),
        ("weight", lambda t: t.fill_(-1)),
        ("index", lambda t: t[0, 2, 0].bitwise_or_(1 << 20)),  # past k
        ("weight", lambda t: t[1, 0, 9].fill_(1)),  # past n
    ):
        with pytest.raises(ValueError):
            broken(name, change).validate()
    packed.validate()
    packed = layer_of(SalientConfig(fraction=0.03)).pack()
    for name, change in (
        ("start", lambda t: t[1].add_(1)),
        ("index", lambda t: t.fill_(254)),
        ("weight", lambda t: t.fill_(-1)),
    ):
        with pytest.raises(ValueError):
            broken(name, change).validate()
    packed.validate()
    packed = layer_of(SalientConfig(structure="column")).pack()
    for name, change in (
        ("index", lambda t: t[-1].fill_(70)),
        ("index", lambda t: t[0].fill_(-1)),
        ("index", lambda t: t[1].copy_(t[0])),
        ("weight", lambda t: t.fill_(-1)),
    ):
        with pytest.raises(ValueError):
            broken(name, change).validate()
    packed.validate()


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_joined_layers_are_all_of_them_side_by_side(fraction: float, activations: str) -> None:
    config = SalientConfig(fraction, group_size=32, activations=activations)
    layers = [PackedSalientLinear.from_linear(nn.Linear(70, n), config) for n in (32, 16, 19)]
    x = torch.randn(3, 70)
    want = [layer(x) for layer in layers]
    before = [layer.state_dict() for layer in copy.deepcopy(layers)]
    whole = PackedSalientLinear.joined(layers)
    assert whole is not None and torch.equal(whole(x), torch.cat(want, 1)) and torch.equal(whole.bound()(x), whole(x))
    whole.validate()
    for layer, output, state in zip(layers, want, before, strict=True):
        assert torch.equal(layer(x), output)
        for name, t in state.items():
            assert torch.equal(layer.state_dict()[name], t)
            assert name == "start" or layer.state_dict()[name].untyped_storage().data_ptr() == (
                whole.state_dict()[name].untyped_storage().data_ptr()
            )


def test_layers_that_cannot_be_joined() -> None:
    def packed(n: int = 16, k: int = 70, bias: bool = True, **options: Any) -> PackedSalientLinear:
        return PackedSalientLinear.from_linear(nn.Linear(k, n, bias), SalientConfig(**options))

    for first, second in (
        (packed(17), packed()),
        (packed(k=64), packed()),
        (packed(bias=False), packed()),
        (packed(fraction=0.2), packed()),
        (packed(structure="column"), packed(structure="column")),
        (packed(bits=4), packed(bits=4)),
    ):
        assert PackedSalientLinear.joined([first, second]) is None
