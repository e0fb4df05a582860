# SPDX-License-Identifier: Apache-2.0
"""Levels of weights beyond the sign: rounding to whole numbers, their planes of signs, and ReCU's redistribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops._surrogates import fourier_slope, surrogate_slope
from .rules import WeightRule

STATSQ_END = 1 - 1e-6  # u = W / s is clipped to [-1, this], so that it does not round up to a level too many
LLMQAT_EPSILON = 1e-6
STD_EPSILON = 1e-5


class _WithSlope(torch.autograd.Function):
    """`value`, with the gradient of slope * x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def with_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A straight-through step: `value` (detached), whose derivative with respect to x is taken to be `slope`."""
    return _WithSlope.apply(x, value.detach(), slope.detach())


def levels_a_unit(x: Tensor, top: int) -> Tensor:
    """LLM-QAT's whole numbers in each row: top / (max |x| + 1e-6), float32 [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True) if x.numel() else x.new_zeros((*x.shape[:-1], 1))
    return top / (largest + LLMQAT_EPSILON)


def level_scale(weight: Tensor, rule: WeightRule) -> Tensor:
    """What a whole number of a row stands for, float32 [n, 1] (LLM-QAT, equation 2)."""
    return 1 / (levels_a_unit(weight, _top(rule)) + LLMQAT_EPSILON)


def _top(rule: WeightRule) -> int:
    """The largest level."""
    if rule.levels == "integer":
        return (1 << (rule.bits - 1)) - 1
    return (1 << rule.bits) - 1 if rule.levels in ("mid_rise", "uniform") else 1


def weight_levels(weight: Tensor, scale: Tensor, rule: WeightRule) -> Tensor:
    """Whole numbers [n, k], float32, so that scale times them stands for the weight. A row without a scale is 0.

    ternary   rint(clip(t, -1, 1)), t = W / scale                              TBT, equation 5
    mid_rise  2 rint(clip(t / 2, -h, h (1 - 1e-6)) - 1/2) + 1, h = 2^(b-1)     OFQ, StatsQ
    uniform   2 rint((clip(t, -m, m) + m) / 2) - m, m = 2^b - 1                N2UQ, equation 8
    integer   rint(W q / (max |W| + 1e-6)), q = 2^(b-1) - 1                    LLM-QAT, equation 2
    """
    if rule.levels == "integer":
        return (weight * levels_a_unit(weight, _top(rule))).round()
    t, top = torch.where(scale > 0, weight / scale, 0.0), _top(rule)
    if rule.levels == "ternary":
        return t.clamp(-1, 1).round() + 0.0  # which a table shows: no -0
    if rule.levels == "mid_rise":
        half = 1 << (rule.bits - 1)
        return 2 * ((t / 2).clamp(-half, half * STATSQ_END) - 0.5).round() + 1
    if rule.levels == "uniform":
        return 2 * ((t.clamp(-top, top) + top) / 2).round() - top
    return torch.sign(weight)


def level_slope(latent: Tensor, scale: Tensor, rule: WeightRule, terms: Tensor | None) -> Tensor:
    """The derivative that stands for that of scale * level: the surrogate's window, times or divided by the scale."""
    u = latent / rule.window
    if rule.surrogate == "fourier" and terms is not None:
        slope = fourier_slope(u, terms)
    else:
        slope = surrogate_slope(u, rule.surrogate)
    if rule.carries_scale:
        slope = slope * scale
    if rule.divides_span:
        slope = torch.where(scale > 0, slope / (scale * _top(rule)), 0.0)
    return slope


def planes_of(levels: Tensor, scale: Tensor, rule: WeightRule) -> tuple[Tensor, Tensor]:
    """Odd levels as `rule.planes` planes of signs side by side, [n, planes k], and scales [n, planes].

    sum_j 2^j s_j with signs s_j is an odd number, and every odd number of b bits is one of them. Other levels stay.
    """
    if rule.planes < 2:
        return levels, scale
    code = ((levels + _top(rule)) / 2).to(torch.uint8)
    signs = [((code >> j) & 1).float() * 2 - 1 for j in range(rule.planes)]
    return torch.cat(signs, 1), torch.cat([scale * (1 << j) for j in range(rule.planes)], 1)


def redistributed(centred: Tensor, tau: Tensor | None) -> Tensor:
    """ReCU's rows: clamp(W 2 sqrt(2) / std, -Q, Q) with Q = -mean |..| ln(2 - 2 tau) of the whole tensor (equation 11).

    Gradients flow through the standard deviation and stop where values are clamped; Q gets none.
    """
    rows = centred * (2 * math.sqrt(2)) / _std(centred)
    if tau is None or not rows.numel():
        return rows
    quantile = -rows.detach().abs().mean() * torch.log(2 - 2 * tau.float())
    quantile = quantile.nan_to_num(0.0, posinf=math.inf)  # rows of zeros and nothing to clamp
    return rows.clamp(-quantile, quantile)


def standardised(x: Tensor) -> Tensor:
    """Rows divided by sqrt(var + 1e-5), as ReCU trains its activations; the gradient flows through the variance."""
    return x / _std(x)


def _std(x: Tensor) -> Tensor:
    """sqrt(var + 1e-5) of each row, with Bessel's correction where a row has more than one value."""
    count = x.shape[-1]
    deviation = x - x.sum(-1, keepdim=True) / max(count, 1)
    variance = deviation.square().sum(-1, keepdim=True) / max(count - 1, 1)
    return (variance + STD_EPSILON).sqrt()


def learned_noise(v: Tensor, inner: Tensor | None, outer: Tensor | None) -> Tensor:
    """FDA's noise adaptation of rows [..., k]: relu(v inner^T) outer^T + 0.1 sin v (section 3.3).

    inner is [k // 64, k] and outer [k, k // 64]; both None for k < 64.
    """
    wave = 0.1 * torch.sin(v)
    if inner is None or outer is None:
        return wave
    return torch.relu(v @ inner.float().T) @ outer.float().T + wave
