# SPDX-License-Identifier: Apache-2.0
"""BiLLM: zones of a block, what a row may hold, and a small model. The search itself: golden_cases/billm.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitmill import load, save
from bitmill.config import ZonedConfig
from bitmill.demo.model import Stories, StoriesConfig
from bitmill.nn import PackedZonedLinear
from bitmill.recipes import billm
from bitmill.recipes.gptq import Hessian, output_error


def hessian_for(k: int) -> Tensor:
    hessian = Hessian(k)
    hessian.add(torch.randn(8, 40, k // 4) @ torch.randn(k // 4, k) + 0.5 * torch.randn(8, 40, k))
    return hessian.matrix


def test_every_round_lowers_the_error() -> None:
    weight, mask = torch.randn(9, 40), torch.rand(9, 40) < 0.6
    mask[0], mask[1] = False, True
    errors = [(weight - billm.residual_binarize(weight, mask, order).value)[mask].norm() for order in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    got = billm.residual_binarize(weight, mask, 2)
    assert (got.value[~mask] == 0).all() and got.alpha.shape == got.mu.shape == (2, 9)
    row = weight[1]
    torch.testing.assert_close(got.mu[0, 1], row.mean())
    torch.testing.assert_close(got.alpha[0, 1], (row - row.mean()).abs().mean())


@pytest.mark.parametrize("k", [1, 2, 40, 90])
def test_zones_are_columns_and_a_split(k: int) -> None:
    scores = torch.randn(12, k)
    zone, columns, split = billm.search_zones(scores)
    salient = zone == billm.SALIENT
    assert torch.equal(salient, salient[:1].expand_as(salient)) and int(salient[0].sum()) == columns
    assert 1 <= columns <= max(min(k - 1, billm.MOST_SALIENT), 1)
    low, high = scores[zone == billm.CONCENTRATED].abs(), scores[zone == billm.SPARSE].abs()
    assert (low < split).all() and (high >= split).all()
    if 0 < columns < k:
        sums = scores.abs().sum(0)
        assert sums[salient[0]].min() >= sums[~salient[0]].max()


@pytest.mark.parametrize("metric", billm.METRICS)
def test_rows_of_a_block_hold_eight_values(metric: str) -> None:
    weight, h = torch.randn(16, 150), hessian_for(150)
    swept, plain = (billm.quantize_weight(weight, h, metric, rounding, block=64) for rounding in ("gptq", "rtn"))
    for got in (swept, plain):
        assert len(got.columns) == 3
        for value, zone in zip(got.value.split(64, 1), got.zone.split(64, 1), strict=True):
            for row, marks in zip(value, zone, strict=True):
                assert all(len(row[marks == z].unique()) <= 2**rounds for z, rounds in billm.ROUNDS.items())
    assert output_error(h, weight, swept.value) < output_error(h, weight, plain.value)
    assert plain.loss == 0 < swept.loss


@pytest.mark.parametrize("scale_bits", [16, 32])
def test_the_packed_weight_is_the_one_that_was_found(scale_bits: int) -> None:
    linear, h = nn.Linear(150, 20), hessian_for(150)
    result = billm.quantize_weight(linear.weight, h, block=64, scale_bits=scale_bits)
    packed = billm.pack_linear(linear, result, ZonedConfig(64, scale_bits=scale_bits))
    assert torch.equal(packed.dequantize().weight, result.value) and torch.equal(packed.bias, linear.bias)
    x = torch.randn(5, 150)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, result.value, linear.bias), rtol=1e-5, atol=1e-5)


def test_a_model_is_packed_and_saved(tmp_path: Path) -> None:
    config = StoriesConfig(dim=32, hidden=48, layers=2, heads=4, kv_heads=2, vocab=50, context=24)
    model, ids = Stories(config).bfloat16(), torch.randint(50, (4, 20))
    errors = billm.quantize_(model, [ids], progress=False)
    layer = model.layers[1].w2
    assert len(errors) == 14 and type(layer) is PackedZonedLinear and all(0 < error < 1 for error in errors.values())
    assert all(len(row.unique()) <= 8 for row in layer.dequantize().weight)
    expected = model(ids)
    assert expected.dtype == torch.bfloat16
    save(model, tmp_path / "a")
    fresh = Stories(config).bfloat16()
    assert len(load(fresh, tmp_path / "a")) == 14 and torch.equal(fresh(ids), expected)


def test_says_what_is_wrong() -> None:
    weight, h = torch.randn(4, 40), hessian_for(40)
    with pytest.raises(ValueError, match="metric must be one of magnitude, hessian, got 'hessian_paper'"):
        billm.quantize_weight(weight, h, "hessian_paper")
    with pytest.raises(ValueError, match="rounding must be one of gptq, rtn, got 'x'"):
        billm.quantize_weight(weight, h, rounding="x")
    with pytest.raises(ValueError, match=r"hessian must have shape \[40, 40\], got \[39, 39\]"):
        billm.quantize_weight(weight, h[1:, 1:])
    with pytest.raises(ValueError, match="weight must be finite"):
        billm.quantize_weight(weight.masked_fill(weight > 1, torch.nan), h)
