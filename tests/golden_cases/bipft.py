# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiPFT, on transformers' BERT."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import hosts
from .common import Case, assert_exact, assert_gradients_of, assert_relative, leaf

ESTIMATORS = {"q_p": "query_plus", "k_p": "key_plus", "q_m": "query_minus", "k_m": "key_minus", "v_p": "value_plus"}
NOISE = ("k_p_bias", "k_m_bias")  # exactly 0: a constant for every query does not change its softmax


def bipft_attention(case: Case) -> None:
    model = hosts.bert_of_layer(case)
    hosts.recipe("bipft").binarize_(model, int(case.number("hp_rank")))
    layer = model.train().encoder.layer[0]  # steps have gradients in training mode only
    parameters = hosts.parameters_of_layer(layer, case)
    attention = layer.attention.self
    for theirs, ours in ESTIMATORS.items():
        for part in ("weight", "bias"):
            parameters[f"{theirs}_{part}"] = attention.get_parameter(f"{ours}.{part}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(case[f"par_{name}"].reshape(parameter.shape))
    x = leaf(case["in_x"])
    context, _ = attention(x, case["in_mask"][:, None, None])
    assert_relative(context, case["out_ctx"], 2e-5, "context")
    context.backward(case["gout_ctx"])
    for name in NOISE:
        assert parameters.pop(name).grad.abs().max() < 1e-5, name
    assert_gradients_of(case, 1e-4, x=x, **parameters)
    again, _ = attention(x, hosts.key_mask(case))
    assert_exact(again.detach(), context.detach(), "context, boolean mask")


def bipft_pooler(case: Case) -> None:
    model = hosts.bert(hidden_size=case["par_weight"].shape[0], num_attention_heads=1)
    hosts.recipe("bipft").binarize_(model)
    pooler = model.train().pooler
    dense, norm = pooler.dense, pooler.LayerNorm
    parameters = {"weight": dense.weight, "bias": dense.bias, "move": dense.shift, "alpha": dense.alpha}
    parameters |= {"ln_weight": norm.weight, "ln_bias": norm.bias}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(case[f"par_{name}"].reshape(parameter.shape))
        dense.alpha_ready.fill_(True)
    h = leaf(case["in_h"])
    y = pooler(h)
    assert_relative(y, case["out_y"], 2e-5, "y")
    y.backward(case["gout_y"])
    assert_gradients_of(case, 5e-5, h=h, **parameters)


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bipft/attention": bipft_attention,
    "bipft/pooler": bipft_pooler,
}
