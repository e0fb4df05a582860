# SPDX-License-Identifier: Apache-2.0
"""A model with every kind of layer that can be swapped, the configurations, and a snapshot of all it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig, FP4Config, SalientConfig, quantize_
from bitmill.binarize import method_names
from bitmill.config import Config

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
