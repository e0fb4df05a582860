# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiBench's binarizers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitmill import BinaryConfig, binarize

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


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bibench/bnn-linear": lambda case: registry_linear(case, "bnn"),
    "bibench/xnor-linear": lambda case: registry_linear(case, "xnor"),
    "bibench/dorefa-linear": lambda case: registry_linear(case, "dorefa"),
    "bibench/bireal-linear": lambda case: registry_linear(case, "bireal"),
    "bibench/xnorplusplus-linear": lambda case: registry_linear(case, "xnorpp", weight_scale="o_scale"),
    "bibench/react-linear": lambda case: registry_linear(case, "react_bibench", shift="threshold"),
}
