# SPDX-License-Identifier: Apache-2.0
"""ARB-LLM: turns that never increase the error, against what they begin with; packed layers; a small model."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from bitmill.demo.model import Stories, StoriesConfig
from bitmill.nn import PackedZonedLinear
from bitmill.recipes import arb_llm, billm
from bitmill.recipes.gptq import output_error
from test_billm import hessian_for

each_variant = pytest.mark.parametrize("variant", arb_llm.VARIANTS)


def masks_of(n: int, k: int) -> list[tuple[Tensor, int]]:
    """Zones as a block has them, with an empty row in one and an empty zone."""
    salient, sparse = (torch.rand(k) < 0.2).expand(n, k), torch.rand(n, k) < 0.3
    sparse[1] = False
    return [
        (~salient & ~sparse, 1),
        (~salient & sparse, 1),
        (salient, 2),
        (torch.zeros(n, k, dtype=torch.bool), 2),
    ]


def weight_of(n: int = 40, k: int = 96) -> Tensor:
    """Rows and columns of different size, as a language model's weight has them."""
    return torch.randn(n, k) * torch.rand(n, 1) * (torch.rand(k) + 0.2) + 0.02


def error(weight: Tensor, zones: list[arb_llm.Signed], columns: Tensor | None = None) -> float:
    return (weight - torch.stack([zone.value(columns) for zone in zones]).sum(0)).square().sum().item()


def assert_falls(errors: list[float], strictly: bool = True) -> None:
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-5)
    assert not strictly or errors[-1] < 0.999 * errors[0]


def test_arb_never_increases_the_error_of_any_row() -> None:
    weight, plain = weight_of(), []
    for mask, order in masks_of(40, 96):
        zone = arb_llm.start(weight, mask, order)
        plain.append(billm.residual_binarize(weight, mask, order).value)
        torch.testing.assert_close(zone.value(), plain[-1])
        rows = [((weight - zone.value()) * mask).square().sum(1)]
        for _ in range(arb_llm.ITERATIONS):
            zone = arb_llm.refine(weight, zone, 1)
            rows.append(((weight - zone.value()) * mask).square().sum(1))
        assert all((after <= before * (1 + 1e-5) + 1e-9).all() for before, after in itertools.pairwise(rows))
        assert rows[-1].sum() < 0.99 * rows[0].sum() or not mask.any()
        assert (zone.value()[~mask] == 0).all() and torch.isfinite(zone.value()).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_nearest_signs_are_the_nearest_of_all(order: int) -> None:
    target, scale, columns = torch.randn(7, 30), torch.randn(order, 7), torch.randn(30)
    mask = torch.rand(7, 30) < 0.8
    for factor in (None, columns):
        signs = arb_llm.nearest_signs(target, scale, mask, factor)
        assert (signs[:, mask].abs() == 1).all() and (signs[:, ~mask] == 0).all()
        of = torch.ones(30) if factor is None else factor

        def distance(chosen: Tensor, of: Tensor = of) -> Tensor:
            return (target - (scale.unsqueeze(2) * chosen).sum(0) * of).abs()

        for candidate in itertools.product((-1.0, 1.0), repeat=order):
            other = torch.tensor(candidate).view(order, 1, 1).expand(order, 7, 30)
            assert (distance(signs)[mask] <= distance(other)[mask] + 1e-6).all()


def test_arb_x_never_increases_the_error_of_the_output() -> None:
    weight, gram = weight_of(), hessian_for(96)

    def of_output(zones: list[arb_llm.Signed]) -> float:
        left = weight - torch.stack([zone.value() for zone in zones]).sum(0)
        return ((left @ gram) * left).sum().item()

    zones = [arb_llm.refine(weight, arb_llm.start(weight, *part)) for part in masks_of(40, 96)]
    errors, signs = [of_output(zones)], [zone.sign for zone in zones]
    for _ in range(arb_llm.ITERATIONS):
        zones = arb_llm.refine_output(weight, zones, gram, 1)
        errors.append(of_output(zones))
    assert_falls(errors)
    assert all(torch.equal(zone.sign, sign) for zone, sign in zip(zones, signs, strict=True))
    # Without correlations every turn of a zone is its own least squares, as in ARB.
    whole = [arb_llm.start(weight, torch.ones(40, 96, dtype=torch.bool), 1)]
    (got,) = arb_llm.refine_output(weight, whole, torch.eye(96), 1)
    torch.testing.assert_close(got.mu, whole[0].mu + (weight - whole[0].value()).mean(1))


def test_arb_rc_never_increases_the_error() -> None:
    weight, masks = weight_of(), masks_of(40, 96)
    zones, columns = arb_llm.start_row_column(weight, masks)
    errors = [error(weight, zones, columns)]
    for _ in range(arb_llm.ITERATIONS):
        zones, columns = arb_llm.refine_row_column(weight, zones, columns, 1)
        errors.append(error(weight, zones, columns))
    assert_falls(errors)


def test_arb_rc_finds_a_weight_of_rows_and_columns() -> None:
    rows, columns = torch.rand(20, 1) + 0.1, torch.rand(48) + 0.1
    weight = rows * columns * torch.where(torch.rand(20, 48) < 0.5, 1.0, -1.0)
    whole = torch.ones(20, 48, dtype=torch.bool)
    zones, found = arb_llm.refine_row_column(weight, *arb_llm.start_row_column(weight, [(whole, 1)]))
    assert error(weight, zones, found) <= 1e-8 * weight.square().sum()


@pytest.mark.parametrize("split_salient", [False, True])
def test_better_fits_in_order(split_salient: bool) -> None:
    """ARB-RC <= ARB <= BiLLM <= one sign and one scale a row, for rows and columns of different size."""
    weight = torch.randn(64, 128) * (torch.rand(64, 1) + 0.2) * torch.exp(0.5 * torch.randn(128))
    h, settings = torch.eye(128), {"rounding": "rtn", "metric": "magnitude"}

    def error_of(value: Tensor) -> float:
        return (weight - value).norm().item()

    plain = error_of(weight.sign() * weight.abs().mean(1, keepdim=True))
    zoned = error_of(billm.quantize_weight(weight, h, **settings).value)
    arb, by_columns = (
        error_of(arb_llm.quantize_weight(weight, h, variant, split_salient, **settings).value)
        for variant in ("arb", "arb_rc")
    )
    assert by_columns < arb < zoned < plain


@each_variant
@pytest.mark.parametrize("split_salient", [False, True])
def test_the_packed_weight_is_the_one_that_was_found(variant: str, split_salient: bool) -> None:
    linear, h = nn.Linear(150, 20), hessian_for(150)
    with torch.no_grad():
        linear.weight[3] = 0.0
    for scale_bits in (16, 32):
        result = arb_llm.quantize_weight(linear.weight, h, variant, split_salient, block=64, scale_bits=scale_bits)
        config = arb_llm.config_of(variant, split_salient, 64, scale_bits)
        packed = billm.pack_linear(linear, result, config)
        assert torch.equal(packed.dequantize().weight, result.value) and torch.isfinite(result.value).all()
        x = torch.randn(5, 150)
        torch.testing.assert_close(packed(x), nn.functional.linear(x, result.value, linear.bias), rtol=1e-5, atol=1e-5)


@each_variant
def test_errors_are_carried_on(variant: str) -> None:
    weight, h = weight_of(24, 256), hessian_for(256)
    swept, plain = (arb_llm.quantize_weight(weight, h, variant, rounding=r, block=64).value for r in ("gptq", "rtn"))
    assert output_error(h, weight, swept) < output_error(h, weight, plain)


@each_variant
def test_a_model_is_packed(variant: str) -> None:
    config = StoriesConfig(dim=32, hidden=48, layers=2, heads=4, kv_heads=2, vocab=50, context=24)
    model, ids = Stories(config), torch.randint(50, (4, 20))
    errors = arb_llm.quantize_(model, [ids], variant, iterations=3, progress=False)
    layer = model.layers[1].w2
    assert len(errors) == 14 and type(layer) is PackedZonedLinear and all(0 < e < 1 for e in errors.values())
    assert layer.config == arb_llm.config_of(variant) and torch.isfinite(model(ids)).all()


def test_says_what_is_wrong() -> None:
    weight, h = torch.randn(4, 64), hessian_for(64)
    with pytest.raises(ValueError, match="variant must be one of arb, arb_x, arb_rc, got 'rc'"):
        arb_llm.quantize_weight(weight, h, "rc")
    with pytest.raises(ValueError, match="rounding must be one of gptq, rtn, got 'x'"):
        arb_llm.quantize_weight(weight, h, rounding="x")
    with pytest.raises(ValueError, match="ZonedConfig: block must be a positive multiple of 32"):
        arb_llm.quantize_(nn.Linear(4, 4), [], block=40)
