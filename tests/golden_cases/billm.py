# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of BiLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bitmill.config import ZonedConfig
from bitmill.nn import PackedZonedLinear
from bitmill.recipes.billm import CONCENTRATED, SALIENT, SPARSE, quantize_weight, residual_binarize, search_zones
from bitmill.recipes.gptq import Hessian, factor, output_error
from bitmill.recipes.pb_llm import saliency

from .common import Case, assert_exact, assert_relative

METRICS = ("magnitude", "hessian")


def residual(case: Case) -> None:
    """Where an entry equals its mean theirs is mu and ours mu + alpha: a packed sign is one bit."""
    got = residual_binarize(case["in_weight"], case["in_mask"].bool(), int(case.number("hp_order")))
    assert_relative(got.value, case["out_sum"], 1e-6, "approximation")
    assert_relative(got.mu, case["out_mu"], 1e-6, "mu")
    assert_relative(got.alpha, case["out_alpha"], 1e-6, "alpha")


def search(case: Case) -> None:
    weight = case["in_weight"]
    hessian = bool(case.number("hp_metric"))
    scores = saliency(weight, torch.diag(case["in_udiag"]), "hessian") if hessian else weight
    got = search_zones(scores, int(case.number("hp_up_lim")) - 1)
    assert got.columns == case.number("out_k")
    assert got.split == pytest.approx(case.number("out_split"), rel=1e-6)
    for zone, name in ((CONCENTRATED, "conc"), (SPARSE, "sparse"), (SALIENT, "salient")):
        assert_exact((got.zone == zone).to(torch.uint8), case[f"out_mask_{name}"], f"mask {name}")


def gptq(case: Case) -> None:
    weight, half = case["in_weight"], case["in_h_upper"]
    h = half.triu() + half.triu(1).T
    measured = Hessian(weight.shape[1])
    for x in case["in_x"]:
        measured.add(x)
    assert_relative(measured.matrix, h, 1e-5, "H")
    assert_relative(factor(h).upper, case["out_u"], 1e-4, "U")
    for i, metric in enumerate(case["hp_metric"].tolist()):
        rounding = "rtn" if case["hp_disable"][i] else "gptq"
        block = int(case.number("hp_blocksize"))
        got = quantize_weight(weight, h, METRICS[metric], rounding, block=block, scale_bits=32)
        assert_exact(got.zone, case["out_mask"][i], f"zones {i}")
        assert got.columns == case["out_k"][i].tolist()
        assert_relative(got.value, case["out_w"][i], 1e-4, f"weight {i}")
        if rounding == "gptq":
            assert got.loss == pytest.approx(case["out_error"][i].item(), rel=1e-3), f"loss {i}"
        assert output_error(h, weight, got.value) == pytest.approx(case["out_rel"][i].item(), rel=0.01), f"error {i}"
        packed = PackedZonedLinear.from_parts(got.weight, None, ZonedConfig(block, scale_bits=32))
        assert_exact(packed.dequantize().weight.detach(), got.value, f"packed weight {i}")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "billm/residual": residual,
    "billm/search": search,
    "billm/gptq": gptq,
}
