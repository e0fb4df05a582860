# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of PB-LLM: quantisation after training, training, and the 1-bit layers that it compares with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bitmill import BinaryConfig, SalientConfig
from bitmill.binarize import ActivationRule, Method, WeightRule, method_names, register_method
from bitmill.nn import PackedSalientLinear, SalientLinear
from bitmill.ops._groups import columns_of_groups
from bitmill.ops.salient_scatter import (
    binary_statistics,
    binary_value,
    high_bit_codes,
    high_bit_scales,
    salient_mask,
    salient_value,
)
from bitmill.recipes.gptq import Hessian, factor, output_error
from bitmill.recipes.pb_llm import quantize_weight, saliency

from .common import (
    Case,
    assert_exact,
    assert_gradients_of,
    assert_relative,
    assert_zeros,
    backward,
    float_linear,
    linear_layer,
)

METRICS = ("magnitude", "hessian")


def low_xnor(case: Case) -> None:
    """Where w equals mu theirs is mu and ours mu + alpha: a packed sign is one bit."""
    weight, group_size = case["in_weight"], max(int(case.number("hp_groupsize")), 0)
    alpha, mu = binary_statistics(weight, ~case["in_mask"].bool(), group_size, "official")
    for got, name in ((alpha, "out_scale"), (mu, "out_mean")):
        assert_relative(got, case[name].squeeze(2).T, 1e-6, name)
    centred = weight - columns_of_groups(mu, weight.shape[1], group_size)
    unequal = case["out_sign"] != 0
    assert_exact(torch.sign(centred).to(torch.int8)[unequal], case["out_sign"][unequal], "signs")
    q = binary_value(centred >= 0, alpha, mu, group_size)
    assert_relative(q[unequal], case["out_q"][unequal], 1e-6, "q")


def high(case: Case) -> None:
    bits = int(case.number("hp_bits"))
    scale, zero = high_bit_scales(case["in_weight"], bits)
    assert_relative(scale.unsqueeze(1), case["out_scale"], 1e-7, "scale")
    assert_exact(zero.unsqueeze(1), case["out_zero"], "zero")
    for values, name in (("in_weight", ""), ("in_other", "_other")):
        codes = high_bit_codes(case[values], scale, zero, bits)
        assert_exact(codes, case[f"out_code{name}"], f"codes{name}")
        assert_relative(salient_value(codes, scale, zero), case[f"out_q{name}"], 1e-6, f"q{name}")


def hessian(case: Case) -> None:
    x, want = case["in_x"], case["out_h"]
    got = Hessian(x.shape[-1])
    for batch, size in enumerate(case["hp_sizes"].tolist()):
        got.add(x[batch, :size])
        assert_relative(got.matrix, want[batch], 1e-5, f"H after batch {batch}")


def combinations(case: Case) -> Iterator[tuple[int, float, str, int]]:
    """Index, salient fraction, metric and group size of every combination of a file."""
    rows = zip(case.arrays["hp_low_frac"], case.arrays["hp_metric"], case.arrays["hp_groupsize"], strict=True)
    for i, (low_frac, metric, group_size) in enumerate(rows):
        yield i, 1 - float(low_frac), METRICS[metric], max(int(group_size), 0)


def masks(case: Case) -> None:
    upper = torch.diag(case["in_udiag"])
    for i, fraction, metric, group_size in combinations(case):
        binarised = ~salient_mask(saliency(case["in_weight"], upper, metric), fraction, group_size)
        assert_exact(binarised.to(torch.uint8), case["out_mask"][i], f"mask {i}")
        assert int(binarised.sum()) == case["out_count"][i]


def gptq(case: Case) -> None:
    weight, half = case["in_weight"], case["in_h_upper"]
    h = half.triu() + half.triu(1).T
    measured = Hessian(weight.shape[1])
    for x in case["in_x"]:
        measured.add(x)
    assert_relative(measured.matrix, h, 1e-5, "H")
    assert_relative(factor(h).upper, case["out_u"], 1e-4, "U")
    block, bits = int(case.number("hp_blocksize")), int(case.number("hp_high_bits"))
    for i, fraction, metric, group_size in combinations(case):
        rounding = "rtn" if case["hp_disable"][i] else "gptq"
        config = SalientConfig(fraction, bits, metric, scale="official", group_size=group_size or None)
        result = quantize_weight(weight, h, config, rounding, block=block)
        got, want, scales = result.value(), case["out_w"][i], result.parts.scales
        assert_exact((~result.mask).to(torch.uint8), case["out_mask"][i], f"mask {i}")
        for ours, theirs in ((scales.alpha, "out_scale"), (scales.mu, "out_mean")):
            assert_relative(ours.T, case[theirs][i][: ours.shape[1]], 1e-6, f"{theirs} {i}")
        assert_relative(scales.scale, case["out_high_scale"], 1e-7, "scale of the codes")
        assert_exact(scales.zero, case["out_high_zero"], "zero of the codes")
        close = (got - want).abs() <= 1e-4 * want.abs()
        assert close.float().mean() >= 0.999, f"weight {i}: {int((~close).sum())} of {close.numel()} differ"
        error, original = output_error(h, weight, got), case["out_rel"][i].item()
        assert error == pytest.approx(original, rel=0.01), f"error of the output {i}"
        assert result.loss == pytest.approx(case["out_error"][i].item(), rel=1e-3), f"loss {i}"
        packed = PackedSalientLinear.from_parts(result.parts, result.mask, None, config)
        assert_exact(packed.dequantize().weight.detach(), got, f"packed weight {i}")


def qat(case: Case) -> None:
    """Theirs keeps salient weights as float32 (its 8-bit routine is broken) and has sgn(0) = 0; ours rounds them to
    float16 and has sgn(0) = +1. What that changes in the weight is known exactly, and so in y and in the gradient of x.
    """
    fraction = case.number("hp_outlier_fraction")
    config = SalientConfig(fraction, 16, "quantile", centre=False, granularity="layer")
    layer = SalientLinear.from_linear(float_linear(case), config)
    assert_exact(layer.mask.to(torch.uint8), case["out_salient"], "mask")
    alpha = layer.scales().alpha
    assert_relative(alpha, case["out_alpha"].expand_as(alpha), 1e-6, "alpha")
    w, theirs = case["par_weight"], case["out_w"]
    expected = torch.where(layer.mask, w.half().float(), torch.where(w == 0, alpha, theirs))
    x, y = backward(layer, case)
    assert_relative(layer.quantised_weight().detach(), expected, 1e-6, "weight")
    added = (expected - theirs).double()
    assert_relative(y, case["out_y"] + (case["in_x"].double() @ added.T).float(), 2e-5, "y")
    assert_relative(x.grad, case["grad_x"] + (case["gout_y"].double() @ added).float(), 2e-5, "grad_x")
    assert_relative(layer.weight.grad, case["grad_weight"], 2e-5, "grad_weight")
    assert_zeros(layer.weight.grad, case["grad_weight"], "grad_weight")
    assert_relative(layer.bias.grad, case["grad_bias"], 2e-5, "grad_bias")
    packed = layer.eval().pack()
    assert_exact(packed.dequantize().weight.detach(), layer.quantised_weight().detach(), "packed weight")
    assert_relative(packed(case["in_x"]), y.detach(), 2e-5, "packed y")


# The layers that PB-LLM compares with, as rows of the registry: kind of the file to weight rule.
BASELINES = {
    1: WeightRule(centre="row", scale="row_centred", surrogate="identity", carries_scale=True),
    2: WeightRule(centre="row", scale="row_centred", surrogate="ede", carries_scale=True),
    3: WeightRule(scale="none", surrogate="fourier"),
}


def weight_binarizers(case: Case) -> None:
    kind = int(case.number("hp_kind"))
    name = "bireal" if kind == 4 else f"pb_llm_baseline_{kind}"
    if name not in method_names():
        schedules = ("terms",) if kind == 3 else ()
        register_method(Method(name, "PB-LLM", BASELINES[kind], ActivationRule(), WeightRule(), schedules=schedules))
    layer = linear_layer(case, BinaryConfig(name, act_bits=1 if kind == 4 else 32))
    if kind == 3:
        layer.terms.fill_(10)
    x, y = backward(layer, case)
    assert_relative(y, case["out_y"], 2e-5, "y")
    tensors = {"x": x, "weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
    assert_gradients_of(case, 2e-5, **tensors)
    for name, t in tensors.items():
        assert_zeros(t.grad, case[f"grad_{name}"], f"grad_{name}")
    assert_relative(layer.eval().pack()(case["in_x"]), y.detach(), 2e-5, "packed y")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "pbllm/low-xnor": low_xnor,
    "pbllm/high": high,
    "pbllm/hessian": hessian,
    "pbllm/salient-mask": masks,
    "pbllm/gptq": gptq,
    "pbllm/qat": qat,
    "pbllm/weight-binarizers": weight_binarizers,
}
