# SPDX-License-Identifier: Apache-2.0
"""The rules by which a weight becomes partially binary: masks, statistics and codes."""

from __future__ import annotations

import pytest
import torch

from bitmill.config import SalientConfig
from bitmill.ops.salient_scatter import (
    binary_statistics,
    high_bit_codes,
    high_bit_scales,
    rounded_to_float16,
    salient_columns,
    salient_mask,
    salient_quantiles,
)
from salient_inputs import layer_of


def test_rounded_to_float16_is_exact() -> None:
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2
    for w in (halves, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(1e9))):
        for signed in (w, -w):
            assert torch.equal(rounded_to_float16(signed), signed.half().float())
    assert torch.equal(rounded_to_float16(torch.tensor([1e-45, 0.0])), torch.zeros(2))
    w = torch.randn(1000) * 10 ** torch.linspace(-9, 3, 1000)
    assert torch.equal(torch.compile(rounded_to_float16, fullgraph=True)(w), w.half().float())


def test_salient_mask_takes_the_largest() -> None:
    weight = torch.randn(13, 50)
    for fraction in (0.05, 0.1, 0.5, 0.9):
        mask = salient_mask(weight, fraction)
        binarised = int((1 - fraction) * weight.numel()) + 1
        assert int((~mask).sum()) == binarised
        assert weight.abs()[mask].min() > weight.abs()[~mask].max()
    assert not salient_mask(weight, 0).any() and salient_mask(weight, 1).all()
    assert not salient_mask(torch.ones(4, 8), 0.5).any()  # ties are binarised
    for shape in ((0, 5), (5, 0)):
        assert salient_mask(torch.empty(shape), 0.3).shape == shape
    assert salient_mask(torch.empty(3, 4, device="meta"), 0.3).is_meta
    grouped = salient_mask(weight, 0.3, 32)
    for columns in (slice(0, 32), slice(32, 50)):
        assert torch.equal(grouped[:, columns], salient_mask(weight[:, columns], 0.3))


def test_salient_columns_are_those_of_the_largest_sums() -> None:
    weight = torch.randn(13, 50)
    for fraction, count in ((0.0, 0), (0.1, 5), (0.33, 16), (1.0, 50)):
        mask = salient_columns(weight, fraction)
        assert torch.equal(mask, mask[:1].expand(13, 50)) and int(mask[0].sum()) == count
        sums = weight.abs().sum(0)
        if 0 < count < 50:
            assert sums[mask[0]].min() > sums[~mask[0]].max()
    for shape in ((0, 5), (5, 0)):
        assert salient_columns(torch.empty(shape), 0.3).shape == shape
    assert salient_columns(torch.empty(3, 4, device="meta"), 0.3).is_meta
    layer = layer_of(SalientConfig(structure="column", fraction=0.2))
    layer.mask[3, 3] ^= True
    with pytest.raises(ValueError, match="whole columns"):
        layer.pack()


def test_binary_statistics_by_hand() -> None:
    weight = torch.tensor([[1.0, 3.0, -2.0, 100.0], [5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    alpha, mu = binary_statistics(weight, mask)
    torch.testing.assert_close(mu, torch.tensor([[2 / 3], [5.0], [0.0]]))
    torch.testing.assert_close(alpha, torch.tensor([[(1 / 3 + 7 / 3 + 8 / 3) / 3], [0.0], [0.0]]))
    alpha, mu = binary_statistics(weight, mask, scale="official")
    torch.testing.assert_close(mu, torch.tensor([[0.5], [5.0], [0.0]]))
    torch.testing.assert_close(alpha, torch.tensor([[(0.5 + 2.5 + 2.5 + 0.5) / 4], [0.0], [0.0]]))
    alpha, mu = binary_statistics(weight, mask, centre=False)
    assert mu is None
    torch.testing.assert_close(alpha, torch.tensor([[2.0], [5.0], [0.0]]))


@pytest.mark.parametrize("scale", ["unbiased", "official"])
def test_binary_statistics_of_groups_are_those_of_their_columns(scale: str) -> None:
    weight = torch.randn(5, 70)
    mask = salient_mask(weight, 0.3)
    alpha, mu = binary_statistics(weight, mask, 32, scale)
    assert alpha.shape == mu.shape == (5, 3)
    for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 70))):
        a, b = binary_statistics(weight[:, columns], mask[:, columns], 0, scale)
        torch.testing.assert_close(alpha[:, group : group + 1], a)
        torch.testing.assert_close(mu[:, group : group + 1], b)


def test_high_bit_codes_are_within_half_a_step() -> None:
    weight = torch.cat([torch.randn(6, 40), torch.rand(2, 40), -torch.rand(2, 40), torch.zeros(1, 40)])
    scale, zero = high_bit_scales(weight)
    codes = high_bit_codes(weight, scale, zero)
    value = scale.unsqueeze(1) * (codes.float() - zero.unsqueeze(1))
    assert ((value - weight).abs() <= 0.5001 * scale.unsqueeze(1)).all()
    assert (value[-1] == 0).all()
    tiny = torch.full((1, 4), 1e-45)
    scale, zero = high_bit_scales(tiny)  # a step that underflows counts as a row of zeros
    codes = high_bit_codes(tiny, scale, zero)
    assert torch.isfinite(scale).all() and (scale * (codes.float() - zero) == 0).all()
    assert high_bit_codes(torch.empty(2, 0), *high_bit_scales(torch.empty(2, 0))).shape == (2, 0)


def test_salient_quantiles_take_both_ends() -> None:
    weight = torch.randn(13, 50) + 0.3
    for fraction in (0.05, 0.1, 0.5):
        mask = salient_quantiles(weight, fraction)
        low, high = weight[mask & (weight < 0.3)], weight[mask & (weight > 0.3)]
        assert abs(len(low) - len(high)) <= 2 and abs(int(mask.sum()) - fraction * weight.numel()) <= 2
        assert low.max() < weight[~mask].min() and high.min() > weight[~mask].max()
    assert not salient_quantiles(weight, 0.0).any() and not salient_quantiles(torch.ones(3, 4), 0.5).any()
    assert salient_quantiles(torch.ones(0, 4), 0.5).shape == (0, 4)
