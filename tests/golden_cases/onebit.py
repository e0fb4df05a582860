# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of OneBit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bitmill import OneBitConfig
from bitmill.nn import OneBitLinear
from bitmill.ops import tile_unpack

from .common import Case, assert_exact, assert_gradients_of, assert_relative, leaf


def layer_of(case: Case, zero: str) -> OneBitLinear:
    weight = case["par_weight"]
    layer = OneBitLinear(weight.shape[1], weight.shape[0], "par_bias" in case, OneBitConfig(zero))
    names = {"weight": "weight", "in_scale": "g", "out_scale": "h", "bias": "bias"}
    with torch.no_grad():
        for ours, parameter in layer.named_parameters():
            parameter.copy_(case[f"par_{names[ours]}"])
    return layer


def bitlinear(case: Case) -> None:
    """sgn(0) is 0 in their training form and +1 in their packed form; each of ours keeps one of the two."""
    layer, x = layer_of(case, "torch"), leaf(case["in_x"])
    y = layer(x)
    assert_relative(y, case["out_y"], 2e-5, "y")
    assert_exact(layer.pack()(case["in_x"]), y.detach(), "packed output")
    y.backward(case["gout_y"])
    bias = {} if layer.bias is None else {"bias": layer.bias}
    assert_gradients_of(case, 5e-5, x=x, weight=layer.weight, g=layer.in_scale, h=layer.out_scale, **bias)
    packed = layer_of(case, "plus").pack()
    assert_relative(packed(case["in_x"]), case["out_y_packed"], 2e-5, "y of the packed layer")
    minus = 1 - tile_unpack(packed.weight, *packed.weight_shape(), 1).numpy()  # their bit 1 is -1
    theirs = np.packbits(minus, axis=1, bitorder="little").view(np.int8)
    assert_exact(torch.from_numpy(theirs), case["out_packed"], "packed signs")


COMPARISONS: dict[str, Callable[[Case], None]] = {"onebit/bitlinear": bitlinear}
