# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiViT."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitmill import BinaryConfig, binarize

from .common import (
    Case,
    assert_exact,
    assert_gradients_of,
    assert_relative,
    assert_zeros,
    backward,
    check_packed,
    heads_of,
    leaf,
    linear_layer,
    merged,
    named_linear,
)


def bivit_linear(case: Case, method: str, act_bits: int) -> None:
    layer = linear_layer(case, BinaryConfig(method, act_bits=act_bits))
    if "par_scale" in case:
        with torch.no_grad():
            layer.weight_scale.copy_(case["par_scale"])
    x, y = backward(layer, case)
    weight = binarize.binarize_weight(layer.weight.detach(), binarize.method("bivit").weight)
    assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    if "grad_scale" in case:
        gradients["scale"] = layer.weight_scale.grad
    for name, got in gradients.items():
        assert_relative(got, case[f"grad_{name}"], 2e-5, f"grad_{name}")
    if act_bits == 1:
        assert_zeros(x.grad, case["grad_x"], "grad_x")
        check_packed(layer, case, y)
    else:
        layer.eval()
        assert_relative(layer.pack()(case["in_x"]), case["out_y"], 2e-5, "packed output")


def bivit_sab_mask(case: Case) -> None:
    logits = leaf(case["in_logits"])
    bits = binarize.softmax_aware_map(logits)
    assert_exact(bits.detach().to(torch.uint8), case["out_bits"], "bits")
    assert_exact(binarize.softmax_aware_map(logits.detach()).to(torch.uint8), case["out_bits"], "bits, no gradient")
    bits.backward(case["gout_bits"])
    assert_relative(logits.grad, case["grad_logits"], 2e-5, "grad_logits")


def bivit_attention(case: Case, method: str) -> None:
    heads, learned = int(case.number("hp_heads")), {"weight_scale": "scale"} if method == "bivit_pws" else {}
    qkv, proj = (named_linear(case, name, BinaryConfig(method), **learned) for name in ("qkv", "proj"))
    attention = binarize.softmax_aware_attention if learned else binarize.bool_attention
    x = leaf(case["in_x"])
    q, k, v = (heads_of(t, heads) for t in qkv(x).chunk(3, -1))
    z = merged(attention(q, k, v))
    assert_exact(z.detach().to(torch.int16), case["out_z"], "z")
    y = proj(z)
    assert_relative(y, case["out_y"], 2e-5, "y")
    y.backward(case["gout_y"])
    places = {"weight": "weight", "bias": "bias", **learned}
    parameters = {
        f"{name}_{theirs}": layer.get_parameter(ours)
        for name, layer in (("qkv", qkv), ("proj", proj))
        for ours, theirs in places.items()
    }
    assert_gradients_of(case, 5e-5, x=x, **parameters)
    with torch.no_grad():
        q, k, v = (heads_of(t, heads) for t in qkv.pack()(case["in_x"]).chunk(3, -1))
        packed = merged(attention(q, k, v))
        assert_exact(packed.to(torch.int16), case["out_z"], "z of the packed layers")
        assert_exact(proj.pack()(packed), y.detach(), "y of the packed layers")


def bivit_mlp(case: Case) -> None:
    """lin2(gelu(lin1(x))): W1A1, W1A32, and W1A32 with learned scales."""
    kind = int(case.number("hp_kind"))
    learned = {"weight_scale": "scale"} if kind == 3 else {}
    config = BinaryConfig("bivit_pws" if learned else "bivit", act_bits=1 if kind == 1 else 32)
    fc1, fc2 = (named_linear(case, name, config, **learned) for name in ("fc1", "fc2"))
    x = leaf(case["in_x"])
    hidden = torch.nn.functional.gelu(fc1(x))
    assert_relative(hidden, case["out_hidden"], 2e-5, "hidden")
    y = fc2(hidden)
    assert_relative(y, case["out_y"], 2e-5, "y")
    y.backward(case["gout_y"])
    places = {"weight": "weight", "bias": "bias", **learned}
    parameters = {
        f"{name}_{theirs}": layer.get_parameter(ours)
        for name, layer in (("fc1", fc1), ("fc2", fc2))
        for ours, theirs in places.items()
    }
    assert_gradients_of(case, 5e-5, x=x, **parameters)
    packed = fc2.pack()(torch.nn.functional.gelu(fc1.pack()(case["in_x"])))
    assert_relative(packed, case["out_y"], 2e-5, "packed output")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bivit/sab-mask": bivit_sab_mask,
    "bivit/sab-attention": lambda case: bivit_attention(case, "bivit_pws"),
    "bivit/bool-attention": lambda case: bivit_attention(case, "bivit"),
    "bivit/mlp": bivit_mlp,
    "bivit/linear-w1a1": lambda case: bivit_linear(case, "bivit", 1),
    "bivit/linear-pws": lambda case: bivit_linear(case, "bivit_pws", 1),
    "bivit/linear-w1a32": lambda case: bivit_linear(case, "bivit", 32),
    "bivit/linear-pws-w1a32": lambda case: bivit_linear(case, "bivit_pws", 32),
}
