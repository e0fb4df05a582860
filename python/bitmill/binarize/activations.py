# SPDX-License-Identifier: Apache-2.0
"""Activations as levels: one function for every rule, used by the training form and by the packed form alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._surrogates import fourier_slope, surrogate_slope
from ..ops.bitpack import mean_by_halves
from ..ops.integer_linear import plane_sum
from .functions import ALPHA_FLOOR, BinarizedWeight, elastic, elastic_range, elastic_units, sign
from .levels import LLMQAT_EPSILON, levels_a_unit, with_slope
from .products import exact_linear, linear_gradients
from .rules import ActivationRule

MIN_WIDTH = 1e-3  # of an interval between thresholds
RANGE_EPSILON = 1e-8


class Thresholds(NamedTuple):
    """What N2UQ learns: widths [2^b - 1] of the intervals, where the first starts, and the scales around the step."""

    widths: Tensor
    start: Tensor
    in_scale: Tensor
    out_scale: Tensor


class QuantizedActivation(NamedTuple):
    """value = step * code + offset with the rule's gradient; whole numbers code in [low, high], float32, detached.

    step is None (for 1), a scalar tensor, or one a row [..., 1]; offset is None (for 0) or like step.
    """

    value: Tensor
    code: Tensor
    step: Tensor | None
    offset: Tensor | None
    low: int
    high: int


def quantize_activation(
    x: Tensor,
    rule: ActivationRule,
    bits: int = 1,
    signed: bool = True,
    zero: str = "torch",
    shift: Tensor | None = None,
    alpha: Tensor | None = None,
    thresholds: Thresholds | None = None,
    terms: Tensor | None = None,
    with_value: bool = True,
) -> QuantizedActivation:
    """Quantise activations by a rule.

    Args:
        x: float32 [..., k].
        bits, signed, zero: of the levels, as in BinaryConfig.
        shift: float [k] for rules with a shift.
        alpha: scalar tensor for rules with a learned scale.
        thresholds: for rules with thresholds.
        terms: of the "fourier" surrogate; None for those of the last epoch.
        with_value: False where nobody takes a gradient: `value` is then the code, which saves half of the work.
    """
    unshifted, x = x, x if shift is None else x + shift
    if rule.scale == "learned":
        assert alpha is not None
        return _elastic(x, alpha.float(), bits, signed, zero, rule, with_value)
    if rule.scale == "thresholds":
        assert thresholds is not None
        return _by_thresholds(x, thresholds, with_value)
    if rule.scale in ("tensor_range", "row_range"):
        return _by_range(x, rule, bits, signed, with_value)
    level = sign(x, rule.surrogate, zero)
    if terms is not None and rule.surrogate == "fourier":
        level = with_slope(x, level, fourier_slope(x.detach(), terms))
    if rule.shift == "gradient":
        level = level + (sign(unshifted, zero=zero) - level).detach()
    if rule.scale == "row_mean":
        rows = mean_by_halves(x.detach().abs()).unsqueeze(-1)
        return QuantizedActivation(rows * level, level.detach(), rows, None, -1, 1)
    return QuantizedActivation(level, level.detach(), None, None, -1, 1)


def quantized_linear(
    x: QuantizedActivation, weight: BinarizedWeight, bias: Tensor | None, group_size: int | None = None
) -> Tensor:
    """x.value @ weight.value.T + bias in float32, computed as integers: what the packed form computes, bit for bit."""
    if x.low >= -1 and x.high <= 1 and x.offset is None and weight.is_plane:
        scalar = x.step is not None and x.step.dim() == 0
        step, rows = (x.step, None) if scalar else (None, x.step)
        return exact_linear(x.value, weight, bias, step=step, rows=rows, group_size=group_size)
    step = weight.scale.new_ones(()) if x.step is None else x.step
    most = max(-x.low, x.high)
    return _SerialLinear.apply(x.value, weight.value, bias, x.code, weight.signs, weight.scale, step, x.offset, most)


class _SerialLinear(torch.autograd.Function):
    """`integer_linear` from dense planes; gradients as F.linear(x_value, w_value, bias) has them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_value: Tensor,
        w_value: Tensor,
        bias: Tensor | None,
        code: Tensor,
        signs: Tensor,
        scale: Tensor,
        step: Tensor,
        offset: Tensor | None,
        most: int,
    ) -> Tensor:
        ctx.save_for_backward(x_value, w_value)
        k = max(code.shape[-1], 1)
        exact = torch.float32 if most * k < 1 << 24 else torch.float64
        planes = [plane.to(exact) for plane in signs.split(k, 1)]
        dots = [code.to(exact) @ plane.T for plane in planes]
        return plane_sum(dots, [plane.sum(1) for plane in planes], scale, bias, step, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_value, w_value = ctx.saved_tensors
        return *linear_gradients(ctx, grad, x_value, w_value), *(None,) * 6


def _elastic(
    x: Tensor, alpha: Tensor, bits: int, signed: bool, zero: str, rule: ActivationRule, with_value: bool
) -> QuantizedActivation:
    low, high = elastic_range(bits, signed, rule.narrow)
    step = alpha.detach().clamp_min(ALPHA_FLOOR)
    if signed and bits == 1:
        value = elastic(x, alpha, bits, signed, zero)
        return QuantizedActivation(value, sign(x.detach(), zero=zero), step, None, low, high)
    units, minimum = elastic_units(x.detach(), step, bits, signed)
    code = _whole(units, low, high)
    value = elastic(x, alpha, bits, signed, zero, rule.narrow) if with_value else code
    return QuantizedActivation(value, code, step, minimum, low, high)


def _whole(units: Tensor, low: int, high: int) -> Tensor:
    """Clipped and rounded to even, in place; NaN is 0, as in the sign."""
    return units.nan_to_num_(0.0).clamp_(low, high).round_()


def _by_range(x: Tensor, rule: ActivationRule, bits: int, signed: bool, with_value: bool) -> QuantizedActivation:
    """LLM-QAT's levels of a row, TBT's of the whole tensor: top / max |x| a unit, or minimum to maximum.

    A row's range has LLM-QAT's two epsilons of 1e-6, a tensor's has none (TBT clips it to the window first).
    """
    seen, per_row = x.detach(), rule.scale == "row_range"
    if not per_row:
        seen = seen.clamp(-rule.window, rule.window)
    top = (1 << (bits - signed)) - 1
    if signed and per_row:
        unit = levels_a_unit(seen, top)
        step, offset = 1 / (unit + LLMQAT_EPSILON), None
        units = seen * unit
    elif signed:
        largest = _extreme(seen.abs(), torch.amax, per_row)
        units, step, offset = torch.where(largest > 0, seen * (top / largest), 0.0), largest / top, None
    else:
        offset = _extreme(seen, torch.amin, per_row)
        span = _extreme(seen, torch.amax, per_row) - offset + RANGE_EPSILON
        units, step = (seen - offset).div_(span).mul_(top), span / top
    low = -top if signed else 0
    value = code = _whole(units, low, top)
    if with_value:
        slope = surrogate_slope(x.detach() / rule.window, rule.surrogate)
        value = with_slope(x, step * code if offset is None else step * code + offset, slope)
    return QuantizedActivation(value, code, step, offset, low, top)


def _extreme(x: Tensor, function: Any, per_row: bool) -> Tensor:
    """The smallest or largest element of each row [..., 1] or of the tensor []; 0 where there is none."""
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], 1) if per_row else ())
    return function(x, -1, keepdim=True) if per_row else function(x)


class _ThresholdCount(torch.autograd.Function):
    """2 / K times the number of thresholds below x, with the generalised straight-through gradient (N2UQ, eq. 7)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(x, widths, start)
        return threshold_code(x, widths, start) * (2 / len(widths))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, widths, start = ctx.saved_tensors
        wide = widths.clamp_min(MIN_WIDTH)
        edges = torch.cat((start.reshape(1), start + wide.cumsum(0)))
        grad_x = torch.zeros_like(grad)
        inside, own = [], []
        for k in range(len(widths)):
            segment = (x > edges[k]) & (x <= edges[k + 1])
            g = torch.where(segment, grad * (2 / len(widths) / wide[k]), 0.0)
            grad_x = grad_x + g
            inside.append(g.sum())
            own.append((g * torch.where(segment, (x - edges[k]) / wide[k], 0.0)).sum())
        sums = torch.stack(inside)
        later = sums.sum() - sums.cumsum(0)
        grad_widths = torch.where(widths > MIN_WIDTH, -torch.stack(own) - later, 0.0)
        return grad_x, grad_widths, -sums.sum().reshape(start.shape)


def threshold_code(x: Tensor, widths: Tensor, start: Tensor) -> Tensor:
    """How many thresholds lie strictly below each element: float32 whole numbers 0 ... len(widths).

    The first threshold is start + widths[0] / 2; between the k-th and the next lie half of both widths.
    """
    wide = widths.clamp_min(MIN_WIDTH)
    thresholds = start + wide.cumsum(0) - wide / 2
    code = torch.zeros_like(x)
    for k in range(len(widths)):
        code.add_(x > thresholds[k])
    return code


def threshold_levels(x: Tensor, thresholds: Thresholds) -> Tensor:
    """N2UQ's learned thresholds with uniform levels: out_scale (2 / K) #{k: in_scale x > t_k}, K = 2^b - 1.

    Gradients flow to x and to all four parameters: a level's derivative is (2 / K) / widths[k] inside interval k.
    Source: Liu et al., Nonuniform-to-Uniform Quantization, CVPR 2022, section 3.2.
    """
    widths, start, in_scale, out_scale = (t.float() for t in thresholds)
    return out_scale * _ThresholdCount.apply(in_scale * x, widths, start)


def _by_thresholds(x: Tensor, thresholds: Thresholds, with_value: bool) -> QuantizedActivation:
    widths, start, in_scale, out_scale = (t.detach().float() for t in thresholds)
    top = len(widths)
    code = threshold_code(in_scale * x.detach(), widths, start)
    value = threshold_levels(x, thresholds) if with_value else code
    return QuantizedActivation(value, code, out_scale * (2 / top), None, 0, top)
