# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiBERT."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitmill import BinaryConfig, binarize, ops, pack_

from . import hosts
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
    with torch.no_grad():
        q, k, v = (heads_of(layer.pack()(case["in_x"]), heads) for layer in layers.values())
        for form, packed_mask in (("additive", mask), ("boolean", keep)):
            packed = merged(binarize.bool_attention(q, k, v, packed_mask))
            assert_exact(packed, case["out_ctx"], f"context of the packed layers, {form} mask")


def bibert_layer(case: Case) -> None:
    model = hosts.bert_of_layer(case)
    hosts.recipe("bibert").binarize_(model)
    layer = model.encoder.layer[0]
    parameters = hosts.parameters_of_layer(layer, case)
    places = {"attention.self": "ctx", "attention.output.dense": "att", "attention": "h1", "intermediate.dense": "f"}
    places |= {"intermediate": "gelu", "output.dense": "ffn"}
    x = leaf(case["in_x"])
    with hosts.recorded(layer, places) as outputs:
        y = layer(x, hosts.key_mask(case))
    assert_exact(outputs.pop("ctx"), case["out_ctx"], "context")
    for name, got in {**outputs, "y": y.detach()}.items():
        assert_relative(got, case[f"out_{name}"], 2e-5, name)
    y.backward(case["gout_y"])
    assert_gradients_of(case, 5e-5, x=x, **parameters)
    additive = torch.where(hosts.key_mask(case), 0.0, -10000.0)
    assert_exact(layer(x, additive).detach(), y.detach(), "y, additive mask")
    pack_(model)
    assert_exact(layer(x.detach(), hosts.key_mask(case)), y.detach(), "y of the packed layer")


def bibert_pooler(case: Case) -> None:
    model = hosts.bert(hidden_size=case["par_weight"].shape[0], num_attention_heads=1)
    hosts.recipe("bibert").binarize_(model)
    dense = model.pooler.dense
    with torch.no_grad():
        dense.weight.copy_(case["par_weight"])
        dense.bias.copy_(case["par_bias"])
    h = leaf(case["in_h"])
    y = model.pooler(h)
    y.backward(case["gout_y"])
    assert_relative(y, case["out_y"], 1e-5, "y")
    assert_gradients_of(case, 1e-5, h=h, weight=dense.weight, bias=dense.bias)


def bibert_model(case: Case) -> None:
    recipe = hosts.recipe("bibert")
    parameters = {name[4:].replace("__", "."): case[name] for name in case.arrays if name.startswith("par_")}
    table, positions = (parameters[f"bert.embeddings.{n}_embeddings.weight"] for n in ("word", "position"))
    model = hosts.bert_classifier(
        vocab_size=table.shape[0],
        hidden_size=table.shape[1],
        num_hidden_layers=int(case.number("hp_layers")),
        num_attention_heads=int(case.number("hp_heads")),
        intermediate_size=parameters["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=positions.shape[0],
        num_labels=case["out_logits"].shape[-1],
    )
    model.load_state_dict(parameters)
    recipe.binarize_(model)
    projections = hosts.integration().Projections(model)
    inputs = {"input_ids": case["in_ids"], "token_type_ids": case["in_seg"], "attention_mask": case["in_keep"].long()}
    outputs = recipe.outputs_of(model, inputs, projections)
    projections.remove()
    assert_relative(outputs.logits, case["out_logits"], 1e-4, "logits")
    assert_relative(torch.stack(tuple(outputs.hidden)), case["out_h"], 1e-4, "hidden states")
    for name, layers in zip("qkv", outputs.similarities, strict=True):
        assert_relative(torch.stack(tuple(layers)), case[f"out_s{name}"], 1e-4, f"similarities of {name}")
    outputs.logits.backward(case["gout_logits"])
    for name, parameter in model.named_parameters():
        assert_relative(parameter.grad, case[f"grad_{name.replace('.', '__')}"], 1e-4, f"gradient of {name}")
    pack_(model)
    assert_relative(model(**inputs).logits, case["out_logits"], 1e-4, "logits of the packed model")


def bibert_dmd(case: Case) -> None:
    recipe, losses = hosts.recipe("bibert"), hosts.recipe("distillation")
    names = ("sq", "sk", "sv", "h", "logits")
    inputs = {name: leaf(case[f"in_{name}"]) for name in names}
    student = recipe.Outputs(inputs["logits"], [*inputs["h"]], [[*inputs[f"s{name}"]] for name in "qkv"])
    teacher = recipe.Outputs(case["in_tlogits"], [*case["in_th"]], [[*case[f"in_t{name}"]] for name in "qkv"])
    for name, *pair in zip("qkv", student.similarities, teacher.similarities, strict=True):
        assert_relative(losses.similarity_loss(*pair), case[f"out_{name}"], 2e-6, name)
    assert_relative(losses.hidden_direction_loss(student.hidden, teacher.hidden), case["out_rep"], 2e-6, "rep")
    predicted = recipe.prediction_loss(student.logits, teacher.logits, case["in_labels"])
    assert_relative(predicted, case["out_cls"], 2e-6, "logit term")
    total = recipe.direction_matching_loss(student, teacher, case["in_labels"])
    assert_relative(total, case["out_total"], 2e-6, "total")
    total.backward()
    assert_gradients_of(case, 1e-5, **inputs)


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bibert/quantizers": bibert_quantizers,
    "bibert/linear": bibert_linear,
    "bibert/embedding": lambda case: embedding_case(case, "bibert", 1e-6, 1e-5),
    "bibert/attention": bibert_attention,
    "bibert/layer": bibert_layer,
    "bibert/pooler": bibert_pooler,
    "bibert/model": bibert_model,
    "bibert/dmd": bibert_dmd,
}
