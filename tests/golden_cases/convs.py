# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of convolutions, of every system that has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill import BinaryConfig, binarize
from bitmill.nn import BinaryConv2d

from .common import Case, assert_exact, assert_relative, assert_zeros, backward, check_packed, linear_layer


def conv_layer(case: Case, config: BinaryConfig) -> BinaryConv2d:
    weight = case["par_weight"]
    n, channels, *kernel = weight.shape
    stride, padding = int(case.number("hp_stride")), int(case.number("hp_padding"))
    conv = torch.nn.Conv2d(channels, n, kernel, stride, padding, bias="par_bias" in case)
    with torch.no_grad():
        conv.weight.copy_(weight)
        if conv.bias is not None:
            conv.bias.copy_(case["par_bias"])
    return BinaryConv2d.from_conv(conv, config)


def learn(case: Case, layer: BinaryConv2d, **parameters: str) -> None:
    """Learned parameters from the file, ours = theirs; of the scales of a map it keeps the used ones."""
    with torch.no_grad():
        for ours, theirs in parameters.items():
            value = case[f"par_{theirs}"]
            parameter = layer.get_parameter(ours)
            parameter[: len(value)] = value.reshape(-1, *parameter.shape[1:]) if parameter.dim() < 3 else value


def compare(case: Case, layer: BinaryConv2d, carries: bool = True, **parameters: str) -> None:
    """Output, gradients, signs, and the packed form, whose gradient to x is the same where `carries` says so."""
    x, y = backward(layer, case)
    if "out_wsign" in case:
        signs = layer.binarized_weight().signs.view_as(layer.weight)
        assert_exact(signs.to(torch.int8), case["out_wsign"], "signs")
    if "out_xsign" in case:
        z = x.detach() if layer.shift is None else x.detach() + layer.shift.detach().view(-1, 1, 1)
        assert_exact(torch.sign(z).to(torch.int8), case["out_xsign"], "signs of x")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients: dict[str, Tensor] = {"x": x.grad, "weight": layer.weight.grad}
    gradients |= {} if layer.bias is None else {"bias": layer.bias.grad}
    gradients |= {theirs: layer.get_parameter(ours).grad for ours, theirs in parameters.items()}
    for name, got in gradients.items():
        want = case[f"grad_{name}"]
        got = got[: len(want)].reshape(want.shape)
        assert_relative(got, want, 2e-5, f"grad_{name}")
        if layer.config.act_bits == 1 and name in ("x", "weight"):
            assert_zeros(got, want, f"grad_{name}")
    compare_packed(case, layer, carries)


def compare_packed(case: Case, layer: BinaryConv2d, carries: bool) -> None:
    layer.eval()
    want, packed = layer(case["in_x"]).detach(), layer.pack()
    x = case["in_x"].requires_grad_()
    got = packed(x)
    if layer.config.act_bits == 1:
        assert_exact(got, want, "packed output")
    else:
        assert_relative(got, want, 2e-5, "packed output")
    same = case["in_x"].requires_grad_()
    gradients = [torch.autograd.grad(y, t, case["gout_y"])[0] for y, t in ((got, x), (layer(same), same))]
    if carries:
        assert_relative(*gradients, 2e-5, "packed grad_x")


def registry_conv(case: Case, method: str, carries: bool = True, **parameters: str) -> None:
    layer = conv_layer(case, BinaryConfig(method))
    learn(case, layer, **parameters)
    compare(case, layer, carries, **parameters)


def at_epoch(case: Case, method: str) -> BinaryConv2d:
    layer = conv_layer(case, BinaryConfig(method))
    epoch = int(case.number("hp_epoch")), int(case.number("hp_max_epochs"))
    assert binarize.set_epoch(torch.nn.ModuleDict({"conv": layer}), *epoch) == ["conv"]
    return layer


def recu_conv(case: Case) -> None:
    layer = at_epoch(case, "recu").train(bool(case.number("hp_train")))
    assert_relative(layer.tau, case["hp_tau"], 1e-6, "tau")
    learn(case, layer, weight_scale="alpha")
    compare(case, layer, weight_scale="alpha")


def fda_conv(case: Case) -> None:
    """Without noise the layer is in the state before its first epoch; what the noise adds is in training mode only."""
    layer = at_epoch(case, "fda")
    assert layer.terms.item() == case.number("hp_n")
    if not case.number("hp_noise"):
        layer.noise.zero_()
    names = {"weight_inner": "wfc1", "weight_outer": "wfc2", "act_inner": "afc1", "act_outer": "afc2"}
    names = {ours: theirs for ours, theirs in names.items() if f"par_{theirs}" in case}
    learn(case, layer, **names)
    compare(case, layer, carries=False, **names)  # the packed form has the terms of the last epoch


def binaryvit(case: Case) -> None:
    if "hp_stride" in case:
        return compare(case, conv_layer(case, BinaryConfig("binaryvit")))
    layer = linear_layer(case, BinaryConfig("binaryvit"))
    x, y = backward(layer, case)
    assert_relative(y, case["out_y"], 2e-5, "y")
    for name, got in {"x": x.grad, "weight": layer.weight.grad}.items():
        assert_relative(got, case[f"grad_{name}"], 2e-5, f"grad_{name}")
    assert_zeros(x.grad, case["grad_x"], "grad_x")
    check_packed(layer, case, y)


def n2uq_conv(case: Case) -> None:
    layer = conv_layer(case, BinaryConfig("n2uq", act_bits=32, weight_bits=int(case.number("hp_bits"))))
    planes = layer.binarized_weight().signs.unflatten(1, (layer.rule.planes, -1))
    worth = 2 ** torch.arange(layer.rule.planes)
    level = ((planes + 1) / 2 * worth[:, None]).sum(1)
    assert_exact(level.to(torch.int8).view_as(layer.weight), case["out_level"], "levels")
    compare(case, layer)


def binarydm_conv(case: Case) -> None:
    order = int(case.number("hp_order"))
    layer = conv_layer(case, BinaryConfig("binarydm", act_bits=32, weight_bits=order))
    names = [f"s{p + 1}" for p in range(order)]
    first = torch.cat([case[f"out_init_{name}"].flatten(1) for name in names], 1)
    assert_relative(layer.weight_scale.detach(), first, 2e-5, "first scales")
    with torch.no_grad():
        layer.weight_scale.copy_(torch.cat([case[f"par_{name}"].flatten(1) for name in names], 1))
    signs = layer.binarized_weight().signs.unflatten(1, (order, -1))
    for p in range(order):
        assert_exact(signs[:, p].view_as(layer.weight).to(torch.int8), case[f"out_b{p + 1}"], f"signs {p + 1}")
    compare(case, layer)
    for p, name in enumerate(names):
        want = case[f"grad_{name}"]
        assert_relative(layer.weight_scale.grad[:, p].view_as(want), want, 2e-5, f"grad_{name}")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bibench/bnn-conv2d": lambda case: registry_conv(case, "bnn"),
    "bibench/xnor-conv2d": lambda case: registry_conv(case, "xnor", carries=False),
    "bibench/dorefa-conv2d": lambda case: registry_conv(case, "dorefa"),
    "bibench/bireal-conv2d": lambda case: registry_conv(case, "bireal"),
    "bibench/xnorplusplus-conv2d": lambda case: registry_conv(
        case, "xnorpp", weight_scale="o_scale", row_scale="h_scale", column_scale="w_scale"
    ),
    "bibench/react-conv2d": lambda case: registry_conv(case, "react_bibench", shift="threshold"),
    "bibench/recu-conv2d": recu_conv,
    "bibench/fda-conv2d": fda_conv,
    "binaryvit/linear-conv": binaryvit,
    "n2uq/weight-conv": n2uq_conv,
    "binarydm/conv2d": binarydm_conv,
}
