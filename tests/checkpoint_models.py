# SPDX-License-Identifier: Apache-2.0
"""A small model with tied weights and odd buffers, its quantised forms, and bit-for-bit comparisons of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig, FP4Config, OneBitConfig, SalientConfig, load, pack_, quantize_
from bitmill.binarize import method_names
from bitmill.config import Config

CONFIGS: list[Config] = [
    *(BinaryConfig(method=m, act_bits=bits) for m in method_names() for bits in (None, 32)),
    BinaryConfig(method="bit", act_bits=2),
    BinaryConfig(method="tbt", weight_bits=2, act_bits=2),
    BinaryConfig(method="binarydm", weight_bits=2, act_bits=32),
    BinaryConfig(act_bits=32, activations="int8"),
    BinaryConfig(method="bit", signed=False),
    BinaryConfig(zero="plus", group_size=32),
    *(BinaryConfig(method=m, embeddings=True) for m in ("bibert", "bit")),
    SalientConfig(),
    SalientConfig(fraction=0.3, bits=16, centre=False, group_size=32),
    SalientConfig(structure="column", activations="int8"),
    SalientConfig(fraction=0.02),
    *(FP4Config(format=f) for f in FP4Config.FORMATS),
    FP4Config(activations="int8"),
    FP4Config("nvfp4", embeddings=True),
    OneBitConfig(),
    OneBitConfig("plus", "int8"),
]
KINDS: list[Config] = [
    BinaryConfig(method="bit", embeddings=True),
    BinaryConfig(),
    SalientConfig(fraction=0.3),  # always a bitmap
    FP4Config("mxfp4", embeddings=True),
    OneBitConfig(),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=repr)
each_kind = pytest.mark.parametrize("config", KINDS, ids=repr)
each_form = pytest.mark.parametrize("packed", [False, True], ids=["training", "packed"])
IDS = torch.tensor([[0, 1, 2], [3, 4, 23]])


class Model(nn.Module):
    """Linear layers, a head that may be tied, buffers of several kinds."""

    def __init__(self, tied: bool = False, width: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, width, padding_idx=3)
        self.fc = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("codes", torch.arange(6).bfloat16())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.head = nn.Linear(width, 24, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        return self.head(x + self.fc(x))


def quantised(config: Config, packed: bool, tied: bool = False) -> Model:
    model = Model(tied)
    quantize_(model, config)
    model(IDS)  # sets what the first batch sets
    if packed:
        pack_(model)
    return model.eval()


def fresh(tied: bool = False) -> Model:
    """The same architecture with other values everywhere."""
    torch.manual_seed(1)
    model = Model(tied).eval()
    model.codes.zero_()
    model.flags.zero_()
    return model


def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, t in first.items():
        assert t.dtype == second[name].dtype and t.shape == second[name].shape, name
        assert same_bytes(t, second[name]), name
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]


class Snapshot:
    """Bit-for-bit what a model holds."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
        self.tensors = {
            name: (t, t.requires_grad, None if t.is_meta else t.detach().clone(), t._version)
            for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        }

    def assert_same(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert self.modules == now.modules and list(self.tensors) == list(now.tensors)
        for name, (t, flag, value, version) in self.tensors.items():
            other, now_flag, now_value, now_version = now.tensors[name]
            assert t is other and (flag, version) == (now_flag, now_version), name
            assert (value is None) == (now_value is None)
            assert value is None or same_bytes(value, now_value)


def assert_refused(model: nn.Module, path: Path, match: str = "cannot be loaded") -> str:
    """One ValueError of one line that starts the same way, and an unchanged model."""
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        load(model, path)
    text = str(error.value)
    assert text.startswith(f"load: {path} cannot be loaded: ")
    assert "\n" not in text and len(text) < 1000
    snapshot.assert_same(model)
    return text


def fresh_on_cpu() -> Model:
    with torch.device("cpu"):
        return fresh()
