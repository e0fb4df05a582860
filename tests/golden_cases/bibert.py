# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiBERT."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitmill import BinaryConfig, binarize, ops

from .common import (
    Case,
    assert_exact,
    assert_gradients_of,
    assert_relative,
    assert_zeros,
    backward,
    check_packed,
    embedding_case,
    heads_of,
    leaf,
    linear_layer,
    merged,
    named_linear,
)


def bibert_quantizers(case: Case) -> None:
    for name, function in (("sign", binarize.sign), ("bool", binarize.boolean)):
        x = leaf(case["in_x"])
        y = function(x, "clip_open")
        assert_exact(y, case[f"out_{name}"], name)
        y.backward(case["gout_y"])
        assert_exact(x.grad, case[f"grad_x_{name}"], f"gradient of {name}")


def bibert_linear(case: Case) -> None:
    layer = linear_layer(case, BinaryConfig("bibert"))
    x, y = backward(layer, case)
    weight = binarize.binarize_weight(layer.weight.detach(), binarize.method("bibert").weight)
    assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(weight.scale.flatten(), case["out_scale"], 1e-6, "scale")
    assert_exact(torch.sign(case["in_x"]).to(torch.int8), case["out_xsign"], "signs of x")
    sign, nonzero, _, _ = ops.bitpack(case["in_x"])
    n, k = layer.weight.shape
    planes = [ops.tile_pack(plane.to(torch.uint8), 1) for plane in (weight.signs > 0, weight.signs != 0)]
    assert_exact(ops.binary_matmul(sign, planes[0], n, k, nonzero, planes[1]), case["out_dot"], "dot")
    assert bool(((y - case["out_y"]).abs() <= 1e-4 * case["out_scale"]).all()), "y"
    for name, got in (("x", x.grad), ("weight", layer.weight.grad), ("bias", layer.bias.grad)):
        assert_relative(got, case[f"grad_{name}"], 1e-5, f"grad_{name}")
    assert_zeros(x.grad, case["grad_x"], "grad_x")
    check_packed(layer, case, y)


def bibert_attention(case: Case) -> None:
    heads = int(case.number("hp_heads"))
    layers = {name: named_linear(case, name, BinaryConfig("bibert")) for name in "qkv"}
    x, mask = leaf(case["in_x"]), case["in_mask"][:, None, None]
    q, k, v = (heads_of(layer(x), heads) for layer in layers.values())
    for name, t in zip("qkv", (q, k, v), strict=True):
        assert_relative(t, case[f"out_{name}"], 1e-4, name)
    context = merged(binarize.bool_attention(q, k, v, mask))
    assert_exact(context.detach(), case["out_ctx"], "context")
    keep = case["in_keep"].bool()[:, None, None]
    assert_exact(merged(binarize.bool_attention(q, k, v, keep)).detach(), case["out_ctx"], "context, boolean mask")
    similar = [t @ t.mT / t.shape[-1] ** 0.5 for t in (q, k, v)]
    for name, t in zip("qkv", similar, strict=True):
        assert_relative(t, case[f"out_s{name}"], 1e-5, f"similarity of {name}")
    torch.autograd.backward([context, *similar], [case["gout_ctx"], *(case[f"gout_s{name}"] for name in "qkv")])
    parameters = {f"{name}_{p}": layer.get_parameter(p) for name, layer in layers.items() for p in ("weight", "bias")}
    assert_gradients_of(case, 2e-5, x=x, **parameters)


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bibert/quantizers": bibert_quantizers,
    "bibert/linear": bibert_linear,
    "bibert/embedding": lambda case: embedding_case(case, "bibert", 1e-6, 1e-5),
    "bibert/attention": bibert_attention,
}
