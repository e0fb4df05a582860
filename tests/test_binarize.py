# SPDX-License-Identifier: Apache-2.0
"""The rules and their gradients, against the same formulas written with plain autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from binary_inputs import leaf
from bitmill import BinaryConfig, binarize
from bitmill.binarize import WeightRule, methods
from bitmill.nn import BinaryLinear
from bitmill.ops._surrogates import SURROGATES, surrogate_slope

EDGES = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 1 + 1e-6, float("nan"), float("inf")])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("function", [binarize.sign, binarize.boolean])
def test_gradient_is_the_slope_of_the_surrogate(function, surrogate: str) -> None:
    x = leaf(EDGES)
    g = torch.arange(1.0, len(EDGES) + 1)
    function(x, surrogate).backward(g)
    want = g * surrogate_slope(EDGES, surrogate)
    assert torch.equal(x.grad.nan_to_num(-1), want.nan_to_num(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", ["clip", "clip_open", "unit"])
def test_windows_end_at_one_to_the_last_bit(surrogate: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -1.0, 1.0], dtype=dtype)
    around = [torch.nextafter(ends, torch.tensor(to, dtype=dtype)) for to in (-torch.inf, torch.inf)]
    x = leaf(torch.cat([ends, *around]))
    binarize.sign(x, surrogate).sum().backward()
    assert torch.equal(x.grad, surrogate_slope(x.detach(), surrogate))


def test_levels_at_the_edges() -> None:
    assert torch.equal(binarize.sign(EDGES), torch.sign(EDGES))
    assert binarize.sign(EDGES, zero="plus").tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, 1, -1, 1]
    assert binarize.boolean(EDGES).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("centre", ["none", "row", "global"])
@pytest.mark.parametrize("scale", ["none", "row", "row_centred", "tensor"])
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("surrogate", ["identity", "clip", "clip_open"])
def test_weight_rules(centre: str, scale: str, carries: bool, surrogate: str) -> None:
    rule = WeightRule(centre, scale, surrogate, carries)
    w = leaf(torch.randn(5, 40))
    result = binarize.binarize_weight(w, rule)
    plain = leaf(w)
    mean = {"none": 0.0, "row": plain.mean(1, keepdim=True), "global": plain.detach().mean()}[centre]
    centred = plain - mean
    factor = {
        "none": torch.ones(5, 1),
        "row": w.detach().abs().mean(1, keepdim=True),
        "row_centred": centred.detach().abs().mean(1, keepdim=True),
        "tensor": w.detach().abs().mean().expand(5, 1),
    }[scale]
    torch.testing.assert_close(result.scale, factor)
    assert torch.equal(result.signs, torch.sign(centred.detach()))
    torch.testing.assert_close(result.value, factor * torch.sign(centred.detach()))
    g = torch.randn(5, 40)
    result.value.backward(g)
    window = surrogate_slope(centred.detach(), surrogate)
    (centred * (g * window * (factor if carries else 1.0))).sum().backward()
    torch.testing.assert_close(w.grad, plain.grad)


def test_groups_have_their_own_statistics() -> None:
    w = torch.randn(3, 70)
    result = binarize.binarize_weight(w, WeightRule(centre="row", scale="row"), group_size=32)
    for group, part in enumerate(w.split(32, 1)):
        torch.testing.assert_close(result.scale[:, group], part.abs().mean(1))
        columns = slice(32 * group, 32 * group + part.shape[1])
        assert torch.equal(result.signs[:, columns], torch.sign(part - part.mean(1, keepdim=True)))


def test_learned_scale_gets_its_gradient() -> None:
    w, s = torch.randn(4, 33), leaf(torch.tensor([[0.5], [-0.25], [1.0], [0.0]]))
    rule = WeightRule(centre="row", scale="learned", surrogate="clip_open", carries_scale=True)
    result = binarize.binarize_weight(w, rule, learned_scale=s)
    g = torch.randn(4, 33)
    result.value.backward(g)
    torch.testing.assert_close(s.grad, (g * result.signs).sum(1, keepdim=True))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_elastic_takes_only_its_levels(bits: int, signed: bool) -> None:
    x, alpha = torch.randn(7, 9) * 3, torch.tensor(0.75)
    y = binarize.elastic(x, alpha, bits, signed)
    offset = x.min() if bits > 1 and not signed else 0.0
    codes = ((y - offset) / alpha).round()
    low, high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if not signed:
        low, high = 0, 2**bits - 1
    assert codes.min() >= low and codes.max() <= high
    torch.testing.assert_close(codes * alpha + offset, y)


def test_elastic_step_is_bounded_below() -> None:
    y = binarize.elastic(torch.tensor([1.0, -1.0]), torch.tensor(-3.0))
    assert torch.equal(y, torch.tensor([1e-5, -1e-5]))


def test_exact_linear_is_the_scaled_product() -> None:
    w = binarize.binarize_weight(leaf(torch.randn(6, 50)), WeightRule())
    x, bias = leaf(torch.sign(torch.randn(2, 3, 50))), leaf(torch.randn(6))
    y = binarize.exact_linear(x, w, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w.value, bias))
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), g, retain_graph=True)
    want = torch.autograd.grad(torch.nn.functional.linear(x, w.value, bias), (x, bias), g, retain_graph=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of bibert, bit, bivit"):
        binarize.method("bnext")


def test_register_method() -> None:
    new = binarize.Method(
        "median_free",
        "a test",
        weight=WeightRule(centre="row", scale="row_centred", surrogate="polynomial"),
        activation=binarize.ActivationRule(shift="added", surrogate="clip_open"),
        embedding=WeightRule(),
    )
    binarize.register_method(new)
    try:
        assert binarize.method("median_free") is new and "median_free" in binarize.method_names()
        layer = BinaryLinear(40, 7, config=BinaryConfig("median_free"))
        x = torch.randn(3, 40)
        layer(x).sum().backward()
        assert layer.weight.grad is not None and layer.shift.grad is not None
        assert torch.equal(layer.eval().pack()(x), layer(x))
        with pytest.raises(ValueError, match="the name 'median_free' is taken"):
            binarize.register_method(new)
    finally:
        methods._METHODS.pop("median_free")
    with pytest.raises(ValueError, match="expected a Method whose name is an identifier"):
        binarize.register_method(dataclasses.replace(new, name="two words"))


def test_rules_refuse_what_they_do_not_know() -> None:
    for make, message in (
        (lambda: WeightRule(centre="median"), "WeightRule: centre must be one of none, row, global, got 'median'"),
        (lambda: WeightRule(scale="max"), "WeightRule: scale must be one of"),
        (lambda: WeightRule(surrogate="sine"), "WeightRule: surrogate must be one of"),
        (
            lambda: binarize.ActivationRule(shift=True),
            "ActivationRule: shift must be one of none, added, gradient, got True",
        ),
        (lambda: binarize.ActivationRule(scale="row"), "ActivationRule: scale must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_shift_of_the_gradient_leaves_the_level_alone() -> None:
    """BiBench's linear ReActNet: the sign of x, with the window at x + shift, whose gradient also reaches the shift."""
    layer = BinaryLinear(40, 7, bias=False, config=BinaryConfig("react_bibench"))
    plain = BinaryLinear(40, 7, bias=False, config=BinaryConfig("bireal"))
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        layer.shift.normal_()
    x = leaf(torch.randn(5, 40))
    y = layer(x)
    assert torch.equal(y, plain(x.detach()))
    y.sum().backward()
    window = (2 - 2 * (x + layer.shift).abs()).clamp_min(0).detach()
    want = window * binarize.binarize_weight(layer.weight, binarize.method("react_bibench").weight).value.detach().sum(
        0
    )
    torch.testing.assert_close(x.grad, want)
    torch.testing.assert_close(layer.shift.grad, want.sum(0))
