# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of weights and activations of a few bits: TBT, LLM-QAT, N2UQ, OFQ, BinaryDM; and BinaryViT's map."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitmill import BinaryConfig, binarize
from bitmill.nn import BinaryEmbedding

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


def compare_gradients(case: Case, tolerance: float, **gradients: Tensor) -> None:
    for name, got in gradients.items():
        assert_relative(got.reshape(case[f"grad_{name}"].shape), case[f"grad_{name}"], tolerance, f"grad_{name}")


def tbt_linear(case: Case) -> None:
    bits, signed = int(case.number("hp_abits")), bool(case.number("hp_symmetric"))
    config = BinaryConfig("tbt", act_bits=bits, weight_bits=int(case.number("hp_wbits")), signed=signed)
    layer = linear_layer(case, config)
    layer(case["in_x"])  # the first training batch sets alpha
    if layer.alpha is not None:
        with torch.no_grad():
            layer.alpha.copy_(case["hp_alpha"].reshape(()))
    x, y = backward(layer, case)
    weight = layer.binarized_weight()
    assert_exact(weight.signs.to(torch.int8), case["out_wcode"], "codes of the weight")
    assert_relative(weight.scale, case["out_wscale"], 2e-6, "scale")
    rule = binarize.method("tbt").activation_rule(bits)
    q = binarize.quantize_activation(case["in_x"], rule, bits, signed, alpha=layer.alpha)
    assert_exact(q.code.to(torch.int16), case["out_code"], "codes of x")
    assert_relative(y, case["out_y"], 2e-5, "y")
    learned = {} if layer.alpha is None else {"alpha": layer.alpha.grad}
    compare_gradients(case, 2e-5, x=x.grad, weight=layer.weight.grad, bias=layer.bias.grad, **learned)
    check_packed(layer, case, y)


def tbt_embedding(case: Case) -> None:
    """A row of zeros is 0 here; the published ternary code answers NaN, which the vectors keep."""
    table = nn.Embedding(*case["par_weight"].shape, padding_idx=1)
    with torch.no_grad():
        table.weight.copy_(case["par_weight"])
    layer = BinaryEmbedding.from_embedding(table, BinaryConfig("tbt", weight_bits=int(case.number("hp_wbits"))))
    y = layer(case["in_ids"])
    want = case["out_y"].nan_to_num(0.0)
    assert not (case["out_y"].isnan() & (case["par_weight"][case["in_ids"]] != 0)).any()
    assert_relative(y, want, 2e-6, "y")
    y.backward(case["gout_y"])
    assert_relative(layer.weight.grad, case["grad_weight"].nan_to_num(0.0), 2e-6, "grad_weight")
    assert_exact(layer.pack()(case["in_ids"]), y.detach(), "packed output")


def tbt_attention(case: Case) -> None:
    """BART's attention from the layers and the quantiser: every product's operands are quantised once more."""
    bits, heads = int(case.number("hp_abits")), int(case.number("hp_heads"))
    config = BinaryConfig("tbt", act_bits=bits, weight_bits=int(case.number("hp_wbits")))
    learned = {"alpha": "alpha"} if bits < 8 else {}
    layers = {name: named_linear(case, name, config, **learned) for name in "qkvo"}
    steps = {f"alpha_{name}": leaf(case[f"par_alpha_{name}"].reshape(())) for name in "qkva"} if learned else {}
    rule = binarize.method("tbt").activation_rule(bits)

    def quantised(t: Tensor, name: str, signed: bool = True) -> Tensor:
        q = binarize.quantize_activation(t, rule, bits, signed, alpha=steps.get(f"alpha_{name}"))
        want = case[f"out_{name if signed else 'p'}code"]
        assert_exact(q.code.flatten(0, 1).to(want.dtype), want, f"codes of {name}")
        return q.value

    x = leaf(case["in_x"])
    kv = leaf(case["in_kv"]) if "in_kv" in case else x
    q = heads_of(layers["q"](x) * (layers["q"].out_features // heads) ** -0.5, heads)
    k, v = (heads_of(layers[name](kv), heads) for name in "kv")
    q, k, v = (quantised(t, name) for name, t in zip("qkv", (q, k, v), strict=True))
    scores = q @ k.mT
    probability = torch.softmax(scores + case["in_mask"] if "in_mask" in case else scores, -1)
    assert_relative(probability, case["out_probs"], 5e-5, "probabilities")
    context = merged(quantised(probability, "a", signed=False) @ v)
    assert_relative(context, case["out_ctx"], 5e-5, "context")
    y = layers["o"](context)
    assert_relative(y, case["out_y"], 5e-5, "y")
    y.backward(case["gout_y"])
    places = {"weight": "weight", "bias": "bias", **learned}
    parameters = {
        f"{name}_{theirs}": layer.get_parameter(ours)
        for name, layer in layers.items()
        for ours, theirs in places.items()
    }
    if not learned:  # exactly 0, because the softmax does not see it; the vectors hold rounding noise
        assert parameters.pop("k_bias").grad.abs().max() < 1e-5
    inputs = {"x": x} if kv is x else {"x": x, "kv": kv}
    assert_gradients_of(case, 1e-4, **inputs, **parameters, **steps)


def llmqat_linear(case: Case) -> None:
    bits, act_bits = int(case.number("hp_wbits")), int(case.number("hp_abits"))
    signed = bool(case.number("hp_symmetric"))
    layer = linear_layer(case, BinaryConfig("llmqat", act_bits=act_bits, weight_bits=bits, signed=signed))
    x, y = backward(layer, case)
    weight = layer.binarized_weight()
    assert_relative(weight.value, case["out_wq"], 2e-6, "weight")
    codes = weight.signs
    if bits == 2:  # theirs counts the levels -3, -1, 1, 3 from -2 up
        low, high = codes.chunk(2, 1)
        codes = (low + 2 * high - 1) / 2
    assert_exact(codes.to(torch.int16), case["out_wcode"], "codes of the weight")
    if act_bits != 32:
        rule = binarize.method("llmqat").activation_rule(act_bits)
        q = binarize.quantize_activation(case["in_x"], rule, act_bits, signed)
        assert_exact(q.code.to(torch.int16), case["out_xcode"], "codes of x")
        assert_relative(q.value, case["out_xq"], 2e-6, "x")
    assert_relative(y, case["out_y"], 2e-5, "y")
    compare_gradients(case, 2e-5, x=x.grad, weight=layer.weight.grad)
    assert_zeros(layer.weight.grad, case["grad_weight"], "grad_weight")
    if bits <= 2 and act_bits != 32:
        check_packed(layer, case, y)
    elif bits <= 2:
        assert_relative(layer.eval().pack()(case["in_x"]), case["out_y"], 2e-5, "packed output")


def n2uq_thresholds(case: Case) -> None:
    bits, x = int(case.number("hp_bits")), leaf(case["in_x"])
    names = {"widths": "a", "start": "start", "in_scale": "scale1", "out_scale": "scale2"}
    learned = {ours: leaf(case[f"par_{theirs}"]) for ours, theirs in names.items()}
    learned = {ours: leaf(t if ours == "widths" else t.reshape(())) for ours, t in learned.items()}
    rule = binarize.method("n2uq").activation_rule(bits)
    q = binarize.quantize_activation(x, rule, bits, thresholds=binarize.Thresholds(**learned))
    assert_exact(q.code.to(torch.uint8), case["out_code"], "codes")
    assert_relative(q.value, case["out_y"], 1e-6, "y")
    q.value.backward(case["gout_y"])
    gradients = {theirs: learned[ours].grad for ours, theirs in names.items()}
    compare_gradients(case, 2e-5, x=x.grad, **gradients)
    assert_zeros(x.grad, case["grad_x"], "grad_x")


def ofq_statsq(case: Case) -> None:
    bits = int(case.number("hp_bits"))
    rule = binarize.method("statsq").weight
    rule = dataclasses.replace(rule, bits=bits, scale_factor=0.5 ** (bits - 1))
    weight = leaf(case["in_weight"])
    result = binarize.binarize_weight(weight, rule)
    assert_relative(result.value, case["out_y"], 1e-6, "y")
    level = result.value / (case["out_scale"] / 2 ** (bits - 1)) - 0.5
    assert_exact(level.round().to(torch.int8), case["out_level"], "levels")
    result.value.backward(case["gout_y"])
    assert_exact(weight.grad, case["grad_weight"], "gradient")


def binarydm_linear(case: Case) -> None:
    order = int(case.number("hp_order"))
    layer = linear_layer(case, BinaryConfig("binarydm", act_bits=32, weight_bits=order))
    for plane in range(order):
        want = case[f"out_init_s{plane + 1}"]
        assert_relative(layer.weight_scale[:, plane : plane + 1].detach(), want, 2e-5, "first scale")
    with torch.no_grad():
        layer.weight_scale.copy_(torch.cat([case[f"par_s{plane + 1}"] for plane in range(order)], 1))
    x, y = backward(layer, case)
    signs = layer.binarized_weight().signs.to(torch.int8).chunk(order, 1)
    for plane in range(order):
        assert_exact(signs[plane], case[f"out_b{plane + 1}"], f"signs of plane {plane + 1}")
    assert_relative(y, case["out_y"], 2e-5, "y")
    scales = {f"s{plane + 1}": layer.weight_scale.grad[:, plane : plane + 1] for plane in range(order)}
    compare_gradients(case, 2e-5, x=x.grad, weight=layer.weight.grad, bias=layer.bias.grad, **scales)
    assert_relative(layer.eval().pack()(case["in_x"]), case["out_y"], 2e-5, "packed output")


def binaryvit_elastic_prob(case: Case) -> None:
    p, c = leaf(case["in_p"]), leaf(case["par_c"].reshape(()))
    y = binarize.elastic(p, c, 1, signed=False, normalised=False)
    assert_exact(y.detach(), case["out_y"], "y")
    assert_exact((y.detach() / c.detach()).to(torch.uint8), case["out_bits"], "bits")
    y.backward(case["gout_y"])
    assert_exact(p.grad, case["grad_p"], "grad_p")
    compare_gradients(case, 1e-5, c=c.grad)


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "tbt/linear": tbt_linear,
    "tbt/embedding": tbt_embedding,
    "tbt/bart-attention": tbt_attention,
    "llmqat/linear": llmqat_linear,
    "n2uq/ltq": n2uq_thresholds,
    "ofq/statsq": ofq_statsq,
    "binarydm/linear": binarydm_linear,
    "binaryvit/elastic-prob": binaryvit_elastic_prob,
}
