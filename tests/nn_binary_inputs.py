# SPDX-License-Identifier: Apache-2.0
"""The configurations of BinaryLinear, a trained layer of each, and what its two forms promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill import BinaryConfig
from bitmill.binarize import method, method_names, set_epoch
from bitmill.nn import BinaryLinear
from problems import assert_same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
K, N = 200, 19  # two groups of 128 columns and two tiles, neither full

INTEGER = (
    *(BinaryConfig(m) for m in method_names()),
    *(BinaryConfig(m, zero="plus") for m in method_names() if method(m).act_bits[0] == 1),
    BinaryConfig("bit", signed=False),
    *(BinaryConfig("bit", act_bits=bits, signed=signed) for bits in (2, 4) for signed in (True, False)),
    *(BinaryConfig("tbt", act_bits=a, weight_bits=w, signed=a < 8) for a in (1, 2, 8) for w in (1, 2)),
    *(BinaryConfig("tbt", act_bits=a, signed=a == 8) for a in (2, 8)),
    *(BinaryConfig("llmqat", weight_bits=w, signed=s) for w in (1, 2) for s in (True, False)),
    *(BinaryConfig("n2uq", act_bits=a, weight_bits=w) for a, w in ((2, 1), (1, 2), (4, 3))),
    BinaryConfig("statsq", act_bits=4, weight_bits=4, signed=False),
    BinaryConfig("binarydm", act_bits=4, weight_bits=2),
    *(BinaryConfig(m, group_size=g) for m in ("bibert", "bivit", "xnor", "sign") for g in (32, 128)),
)
FLOAT = (
    *(BinaryConfig(m, act_bits=32) for m in method_names()),
    BinaryConfig("tbt", act_bits=32, weight_bits=2),
    BinaryConfig("binarydm", act_bits=32, weight_bits=2),
    BinaryConfig("statsq", act_bits=32, weight_bits=4),
    BinaryConfig("bibert", act_bits=32, group_size=32),
    BinaryConfig("xnor", act_bits=32, group_size=128),
)
INT8 = (
    *(BinaryConfig(m, act_bits=32, activations="int8") for m in ("bibert", "bit", "bivit")),
    BinaryConfig("bibert", act_bits=32, activations="int8", group_size=128),
)
CONFIGS = tuple(dict.fromkeys(INTEGER + FLOAT + INT8))


def name(config: BinaryConfig) -> str:
    fields = config.to_dict()
    default = BinaryConfig().to_dict()
    changes = [f"{key}={value}" for key, value in fields.items() if key != "method" and value != default[key]]
    return "-".join((config.method, *changes))


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name)


def graph_of(config: BinaryConfig) -> tuple[object, ...]:
    """Equal for two configurations that differ in constants only: zero, number of planes, codes or groups.

    Float activations have no rule, so their methods are told apart by the weight's levels and scale. What else a weight
    has, its centre and its window, is in the graph of the method's own activations.
    """
    rule = config.weight_rule
    activation = "float" if config.act_bits == 32 else (config.method, config.act_bits == 1, config.signed)
    return activation, rule.levels, rule.scale, rule.redistribute, config.activations, config.group_size is None


graphs = {graph_of(c): c for c in CONFIGS if c.zero == "torch" and c.group_size in (None, 128)}
every_graph = pytest.mark.parametrize("config", graphs.values(), ids=name)
every_method = pytest.mark.parametrize("config", [BinaryConfig(m) for m in method_names()], ids=name)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with exact zeros among them."""
    return (torch.randn(shape) * (torch.rand(shape) < 0.9)).to(dtype)


def trained(config: BinaryConfig, k: int = K, n: int = N, bias: bool = True, dtype: torch.dtype = torch.float32):
    """A layer in eval mode whose learned parts are not where they start."""
    layer = BinaryLinear(k, n, bias, config, dtype=dtype)
    layer(inputs(8, k, dtype=dtype))
    with torch.no_grad():
        if layer.shift is not None:
            layer.shift.normal_(0, 0.1)
        if layer.weight_scale is not None:
            layer.weight_scale.mul_(1.5)
        if layer.widths is not None:
            layer.widths.copy_(torch.rand_like(layer.widths).float() + 0.1)
            layer.start.fill_(-1.0)
            layer.in_scale.fill_(0.75)
    set_epoch(layer, 29, 30)  # the packed form's gradient is that of the last epoch
    return layer.eval()


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == want.dtype
    if got.dtype != torch.float32:
        tolerance = max(tolerance, 2 * torch.finfo(got.dtype).eps)
    limit = tolerance * max(want.abs().max().item(), 1e-2) if want.numel() else 0.0  # alpha's gradient is a long sum
    torch.testing.assert_close(got, want, rtol=0, atol=limit)


def assert_agree(got: Tensor, want: Tensor, config: BinaryConfig, what: str = "") -> None:
    """The promise of training against packed form: every bit with integer activations, else the order of summation."""
    if config.act_bits != 32 or config.activations == "int8":
        assert_same_bits(got, want, what)
    else:
        assert_close(got, want)
