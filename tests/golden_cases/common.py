# SPDX-License-Identifier: Apache-2.0
"""What the comparisons share: a file of vectors, tolerances, layers with recorded parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitmill import BinaryConfig
from bitmill.nn import BinaryEmbedding, BinaryLinear


class Case:
    """Arrays of one file; `case["out_y"]` is a tensor."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path, allow_pickle=False))

    def __getitem__(self, name: str) -> Tensor:
        array = self.arrays[name]
        unsigned = {np.dtype(np.uint32): np.int32, np.dtype(np.uint16): np.int16}.get(array.dtype)
        return torch.from_numpy(np.array(array if unsigned is None else array.view(unsigned)))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def number(self, name: str) -> float:
        return self.arrays[name].item()


def assert_exact(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan()) if want.is_floating_point() else got == want
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {want.numel()} differ"


def assert_relative(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """max |got - want| <= tolerance max |want|; where want is exactly 0 by a mask, see assert_zeros."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    error, limit = (got - want).abs().max().item(), tolerance * want.abs().max().item()
    assert error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}"


def assert_zeros(got: Tensor, want: Tensor, what: str) -> None:
    """Entries that a closed gradient window sets to 0 are exactly 0."""
    assert bool((got[want == 0] == 0).all()), f"{what}: an entry that must be exactly 0 is not"


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def float_linear(case: Case) -> torch.nn.Linear:
    weight = case["par_weight"]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], "par_bias" in case)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if "par_bias" in case:
            linear.bias.copy_(case["par_bias"])
    return linear


def linear_layer(case: Case, config: BinaryConfig) -> BinaryLinear:
    return BinaryLinear.from_linear(float_linear(case), config)


def backward(layer: torch.nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    x = leaf(case["in_x"])
    y = layer(x)
    y.backward(case["gout_y"])
    return x, y


def check_packed(layer: BinaryLinear, case: Case, y: Tensor, gradient: bool = True) -> None:
    """The packed form of the same layer gives the same floats, bit for bit, and the same gradient to x."""
    layer.eval()
    packed = layer.pack()
    x = leaf(case["in_x"])
    got = packed(x)
    assert_exact(got, y.detach(), "packed output")
    got.backward(case["gout_y"])
    if gradient:
        assert_relative(x.grad, case["grad_x"], 2e-5, "packed grad_x")


def embedding_case(case: Case, method: str, tolerance: float, gradient: float) -> None:
    table = torch.nn.Embedding(*case["par_weight"].shape, padding_idx=0)
    with torch.no_grad():
        table.weight.copy_(case["par_weight"])
    layer = BinaryEmbedding.from_embedding(table, BinaryConfig(method))
    y = layer(case["in_ids"])
    assert_relative(y, case["out_y"], tolerance, "y")
    y.backward(case["gout_y"])
    assert_relative(layer.weight.grad, case["grad_weight"], gradient, "grad_weight")
    assert_exact(layer.pack()(case["in_ids"]), y.detach(), "packed output")


def named_linear(case: Case, name: str, config: BinaryConfig, **parameters: str) -> BinaryLinear:
    """The layer whose arrays are par_<name>_weight, par_<name>_bias, ..."""
    weight = case[f"par_{name}_weight"]
    layer = BinaryLinear(weight.shape[1], weight.shape[0], config=config)
    with torch.no_grad():
        for ours, theirs in {"weight": "weight", "bias": "bias", **parameters}.items():
            parameter = layer.get_parameter(ours)
            parameter.copy_(case[f"par_{name}_{theirs}"].reshape(parameter.shape))
    if layer.alpha_ready is not None:
        layer.alpha_ready.fill_(True)
    return layer


def heads_of(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merged(t: Tensor) -> Tensor:
    return t.transpose(-3, -2).flatten(-2)


def assert_gradients_of(case: Case, tolerance: float, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        want = case[f"grad_{name}"]
        assert_relative(t.grad.reshape(want.shape), want, tolerance, f"grad_{name}")
