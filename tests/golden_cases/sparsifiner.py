# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of Sparsifiner: the predicted mask is exact, so an attention that takes it is too."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitmill.recipes.sparsifiner import MaskPredictor, SparsifinerAttention

from .common import Case, assert_exact, assert_relative, heads_of


def sparsifiner_attention(case: Case) -> None:
    x, heads = case["in_x"], int(case.number("hp_heads"))
    _, tokens, dim = x.shape
    predictor = MaskPredictor(
        dim // heads,
        tokens,
        case.number("hp_keep"),
        int(case.number("hp_reduce_n")),
        int(case.number("hp_topk")),
        case.number("hp_basis_threshold"),
    )
    attention = SparsifinerAttention(dim, heads, tokens, predictor=predictor).eval()
    layers = {"qkv": attention.qkv, "proj": attention.proj, "pq": predictor.query, "pk": predictor.key}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(case[f"par_{name}_weight"])
            layer.bias.copy_(case[f"par_{name}_bias"])
        predictor.down.copy_(case["par_proj_n"])
        predictor.basis.copy_(case["par_proj_back_n"])
        q, k, _ = (heads_of(t, heads) for t in attention.qkv(x).chunk(3, -1))
        assert_relative(predictor.estimate(q, k), case["out_approx"], 2e-5, "estimate of the map")
        assert_exact(predictor(q, k).to(torch.uint8), case["out_mask"], "mask")
        assert_relative(attention(x), case["out_y"], 2e-5, "y")


COMPARISONS: dict[str, Callable[[Case], None]] = {"sparsifiner/attention": sparsifiner_attention}
