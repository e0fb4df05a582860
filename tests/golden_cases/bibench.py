# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiBench's binarizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill import BinaryConfig, binarize
from bitmill.nn import BinaryLinear

from .common import Case, assert_exact, assert_relative, assert_zeros, backward, check_packed, linear_layer


def registry_linear(case: Case, method: str, **parameters: str) -> None:
    """A row of the registry; `parameters` names the file's learned parameters: ours = theirs."""
    layer = linear_layer(case, BinaryConfig(method))
    with torch.no_grad():
        for ours, theirs in parameters.items():
            parameter = layer.get_parameter(ours)
            parameter.copy_(case[f"par_{theirs}"].reshape(parameter.shape))
    x, y = backward(layer, case)
    if "out_wsign" in case:
        weight = binarize.binarize_weight(layer.weight.detach(), binarize.method(method).weight)
        assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients = {"x": x.grad, "weight": layer.weight.grad}
    gradients |= {} if layer.bias is None else {"bias": layer.bias.grad}
    gradients |= {theirs: layer.get_parameter(ours).grad for ours, theirs in parameters.items()}
    for name, got in gradients.items():
        assert_relative(got.reshape(case[f"grad_{name}"].shape), case[f"grad_{name}"], 2e-5, f"grad_{name}")
        assert_zeros(got.reshape(case[f"grad_{name}"].shape), case[f"grad_{name}"], f"grad_{name}")
    check_packed(layer, case, y, gradient=method != "react_bibench")  # its packed form knows no shift


def recu_linear(case: Case) -> None:
    layer = scheduled_layer(case, "recu")
    assert_relative(layer.tau, case["hp_tau"], 1e-6, "tau")
    layer.train(bool(case.number("hp_train")))
    with torch.no_grad():
        layer.weight_scale.copy_(case["par_alpha"].unsqueeze(1))
    compare_scheduled(case, layer, alpha=layer.weight_scale)


def fda_linear(case: Case) -> None:
    """Without noise the layer is in the state before its first epoch; what the noise adds is in training mode only."""
    layer = scheduled_layer(case, "fda")
    noise = bool(case.number("hp_noise"))
    assert layer.terms.item() == case.number("hp_n")
    assert abs(layer.noise.item() - case.number("hp_noise_scale")) < 1e-6
    if not noise:
        layer.noise.zero_()
    learned = {"wfc1": "weight_inner", "wfc2": "weight_outer", "afc1": "act_inner", "afc2": "act_outer"}
    learned = {theirs: layer.get_parameter(ours) for theirs, ours in learned.items() if f"par_{theirs}" in case}
    with torch.no_grad():
        for theirs, parameter in learned.items():
            parameter.copy_(case[f"par_{theirs}"])
    compare_scheduled(case, layer, **learned)


def scheduled_layer(case: Case, method: str) -> BinaryLinear:
    """A layer at the epoch of the case."""
    layer = linear_layer(case, BinaryConfig(method))
    epoch = int(case.number("hp_epoch")), int(case.number("hp_max_epochs"))
    assert binarize.set_epoch(torch.nn.ModuleDict({"fc": layer}), *epoch) == ["fc"]
    return layer


def compare_scheduled(case: Case, layer: BinaryLinear, **learned: Tensor) -> None:
    x, y = backward(layer, case)
    assert_exact(layer.binarized_weight().signs.to(torch.int8), case["out_wsign"], "signs")
    assert_exact(torch.sign(case["in_x"]).to(torch.int8), case["out_xsign"], "signs of x")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    gradients |= {name: t.grad for name, t in learned.items()}
    for name, got in gradients.items():
        assert_relative(got.reshape(case[f"grad_{name}"].shape), case[f"grad_{name}"], 2e-5, f"grad_{name}")
    assert_zeros(x.grad, case["grad_x"], "grad_x")
    layer.eval()
    assert_exact(layer.pack()(case["in_x"]), layer(case["in_x"]).detach(), "packed output")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bibench/bnn-linear": lambda case: registry_linear(case, "bnn"),
    "bibench/xnor-linear": lambda case: registry_linear(case, "xnor"),
    "bibench/dorefa-linear": lambda case: registry_linear(case, "dorefa"),
    "bibench/bireal-linear": lambda case: registry_linear(case, "bireal"),
    "bibench/xnorplusplus-linear": lambda case: registry_linear(case, "xnorpp", weight_scale="o_scale"),
    "bibench/recu-linear": recu_linear,
    "bibench/fda-linear": fda_linear,
    "bibench/react-linear": lambda case: registry_linear(case, "react_bibench", shift="threshold"),
}
