# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiT."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitmill import BinaryConfig, binarize, pack_

from . import hosts
from .common import (
    Case,
    assert_exact,
    assert_gradients_of,
    assert_relative,
    backward,
    check_packed,
    embedding_case,
    heads_of,
    leaf,
    linear_layer,
    merged,
    named_linear,
)


def bit_weight(case: Case) -> None:
    method = binarize.method("bit")
    weight = leaf(case["in_weight"])
    result = binarize.binarize_weight(weight, method.weight if case.number("hp_layerwise") else method.embedding)
    assert_exact(result.signs.to(torch.int8), case["out_sign"], "signs")
    want = case["out_scale"]
    assert_relative(result.scale if want.dim() else result.scale[0, 0], want, 2e-5, "scale")
    assert_relative(result.value, case["out_y"], 2e-5, "value")
    result.value.backward(case["gout_y"])
    assert_exact(weight.grad, case["grad_weight"], "gradient")


def bit_elastic(case: Case, signed: bool) -> None:
    bits = int(case.number("hp_bits"))
    x, alpha = leaf(case["in_x"]), leaf(case["hp_alpha"].reshape(()))
    y = binarize.elastic(x, alpha, bits, signed)
    assert_relative(y, case["out_y"], 1e-6, "y")
    offset = x.min() if bits > 1 and not signed else 0
    assert_exact(((y - offset) / alpha).round().to(torch.int8), case["out_code"], "code")
    y.backward(case["gout_y"])
    assert_exact(x.grad, case["grad_x"], "grad_x")
    assert_relative(alpha.grad, case["grad_alpha"].reshape(()), 1e-5, "grad_alpha")
    first = binarize.elastic_alpha(case["in_x"], bits, signed)
    assert_relative(first, case["out_alpha_init"].reshape(()), 1e-5, "first alpha")


def bit_linear(case: Case) -> None:
    bits, signed = int(case.number("hp_bits")), bool(case.number("hp_symmetric"))
    layer = linear_layer(case, BinaryConfig("bit", act_bits=bits, signed=signed))
    with torch.no_grad():
        layer.shift.copy_(case["par_move"])
    layer(case["in_x"])  # the first training batch sets alpha
    assert_relative(layer.alpha.detach(), case["out_alpha_init"].reshape(()), 1e-5, "first alpha")
    with torch.no_grad():
        layer.alpha.copy_(case["hp_alpha"])
    x, y = backward(layer, case)
    weight = binarize.binarize_weight(layer.weight.detach(), binarize.method("bit").weight)
    assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(weight.scale[0, 0], case["out_wscale"].reshape(()), 2e-5, "scale")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients = {
        "x": x.grad,
        "weight": layer.weight.grad,
        "bias": layer.bias.grad,
        "move": layer.shift.grad,
        "alpha": layer.alpha.grad,
    }
    for name, got in gradients.items():
        assert_relative(got, case[f"grad_{name}"].reshape(got.shape), 2e-5, f"grad_{name}")
    if bits == 1:
        check_packed(layer, case, y)
    else:
        layer.eval()
        assert_relative(layer.pack()(case["in_x"]), case["out_y"], 2e-5, "packed output")


def bit_attention(case: Case) -> None:
    heads = int(case.number("hp_heads"))
    learned = {"shift": "move", "alpha": "alpha"}
    layers = {name: named_linear(case, name, BinaryConfig("bit"), **learned) for name in "qkv"}
    steps = {f"alpha_{name}": leaf(case[f"par_alpha_{name}"].reshape(())) for name in "qkva"}
    x = leaf(case["in_x"])
    q, k, v = (heads_of(layer(x), heads) for layer in layers.values())
    context = binarize.elastic_attention(q, k, v, **steps, mask=case["in_mask"][:, None, None])
    whole = context.detach() / (steps["alpha_a"] * steps["alpha_v"]).detach()
    assert_exact(whole.round().int(), case["out_ctx_int"], "context as integers")
    assert_relative(merged(context), case["out_ctx"], 2e-5, "context")
    merged(context).backward(case["gout_ctx"])
    places = {"weight": "weight", "bias": "bias", **learned}
    parameters = {
        f"{name}_{theirs}": layer.get_parameter(ours)
        for name, layer in layers.items()
        for ours, theirs in places.items()
    }
    assert_gradients_of(case, 5e-5, x=x, **parameters, **steps)
    with torch.no_grad():
        q, k, v = (heads_of(layer.pack()(case["in_x"]), heads) for layer in layers.values())
        packed = binarize.elastic_attention(q, k, v, **steps, mask=case["in_mask"][:, None, None])
        assert_exact(packed, context.detach(), "context of the packed layers")


def bit_layer(case: Case) -> None:
    model = hosts.bert_of_layer(case)
    hosts.recipe("bit").binarize_(model)
    layer = model.train().encoder.layer[0]  # steps have gradients in training mode only
    parameters = hosts.parameters_of_layer(layer, case)
    places = {"attention.self": "ctx", "attention.output.dense": "att", "attention": "h1"}
    places |= {"intermediate": "u", "output.dense": "ffn"}
    x = leaf(case["in_x"])
    with hosts.recorded(layer, places) as outputs:
        y = layer(x, hosts.key_mask(case))
    for name, got in {**outputs, "y": y.detach()}.items():
        assert_relative(got, case[f"out_{name}"], 5e-5, name)
    y.backward(case["gout_y"])
    assert_gradients_of(case, 1e-4, x=x, **parameters)
    pack_(layer.eval())
    assert_exact(layer(x.detach(), hosts.key_mask(case)), y.detach(), "y of the packed layer")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bit/weight": bit_weight,
    "bit/elastic-signed": lambda case: bit_elastic(case, True),
    "bit/elastic-unsigned": lambda case: bit_elastic(case, False),
    "bit/linear": bit_linear,
    "bit/embedding": lambda case: embedding_case(case, "bit", 1e-5, 1e-6),
    "bit/attention": bit_attention,
    "bit/layer": bit_layer,
}
