# SPDX-License-Identifier: Apache-2.0
"""The forward and the straight-through gradient of every rule, once. All arithmetic is float32."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._groups import columns_of_groups
from .levels import level_scale, level_slope, planes_of, redistributed, weight_levels, with_slope
from .rules import WeightRule
from .saved import keep_flags, keep_levels, keep_slope, kept_flags, kept_levels, times_slope

ALPHA_FLOOR = 1e-5


class _StraightThrough(torch.autograd.Function):
    """Levels of x; the gradient is multiplied by the surrogate's slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: str, surrogate: str) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*keep_slope(ctx, x, surrogate))
        if levels == "sign":
            return torch.sign(x)
        if levels == "plus":
            return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return times_slope(ctx, grad, ctx.saved_tensors), None, None


def sign(x: Tensor, surrogate: str = "clip", zero: str = "torch") -> Tensor:
    """sgn(x) with a straight-through gradient.

    Args:
        x: any floating-point tensor.
        surrogate: window of the gradient; "clip" [|x| <= 1], "clip_open" [|x| < 1] (BiBERT's BinaryQuantizer).
        zero: "torch": sgn(0) = sgn(NaN) = 0; "plus": +1 where x >= 0, else -1.
    """
    return _StraightThrough.apply(x, "sign" if zero == "torch" else "plus", surrogate)


def boolean(x: Tensor, surrogate: str = "clip_open") -> Tensor:
    """[x > 0] in {0, 1} with a straight-through gradient (BiBERT's ZMeanBinaryQuantizer)."""
    return _StraightThrough.apply(x, "bool", surrogate)


def elastic_range(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """The lowest and the highest code of `elastic`."""
    if signed:
        return (-1, 1) if bits == 1 else (-(1 << (bits - 1)) + narrow, (1 << (bits - 1)) - 1)
    return 0, (1 << bits) - 1 - (narrow and bits > 1)


def elastic_units(x: Tensor, step: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor | None]:
    """x in steps, before rounding, and the minimum of the whole tensor where it is subtracted first (no gradient)."""
    if signed or bits == 1:
        return x / step, None
    minimum = x.min() if x.numel() else x.new_zeros(())
    return (x - minimum) / step, minimum


class _Elastic(torch.autograd.Function):
    """BiT's elastic quantiser: alpha times an integer code, with gradients to x and alpha."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, bits: int, signed: bool, zero: str, narrow: bool, normalised: bool
    ) -> Tensor:
        step = alpha.clamp_min(ALPHA_FLOOR)
        low, high = elastic_range(bits, signed, narrow)
        u, minimum = elastic_units(x, step, bits, signed)
        if signed and bits == 1:
            code = torch.sign(x) if zero == "torch" else torch.where(x >= 0, 1.0, -1.0)
            slope: tuple[Tensor | None, ...] = keep_levels(code, zero) if any(ctx.needs_input_grad) else ()
        else:
            code = u.round().clamp(low, high)
            slope = (torch.where(u < low, float(low), torch.where(u > high, float(high), code - u)),)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(keep_flags((u >= low) & (u <= high)), *slope)
        ctx.high, ctx.shape = high if normalised else None, x.shape
        return step * code if minimum is None else step * code + minimum

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, *kept = ctx.saved_tensors
        slope = kept[0] if len(kept) == 1 else kept_levels(kept[0], kept[1], ctx.shape)
        grad_alpha = (grad * slope).sum()
        if ctx.high is not None:
            count = torch.sym_max(grad.numel(), 1)  # symbolic under torch.compile: math.sqrt would fix the batch size
            grad_alpha = grad_alpha / torch.sym_sqrt(count * ctx.high)
        return grad * kept_flags(inside, ctx.shape), grad_alpha, *(None,) * 5


def elastic(
    x: Tensor,
    alpha: Tensor,
    bits: int = 1,
    signed: bool = True,
    zero: str = "torch",
    narrow: bool = False,
    normalised: bool = True,
) -> Tensor:
    """BiT's elastic binarization and its multi-bit (LSQ) relatives.

    Signed, 1 bit: alpha sgn(x). Otherwise alpha clamp(rint(x / alpha), low, high) with [-2^(b-1), 2^(b-1) - 1] or
    [0, 2^b - 1]; unsigned with b > 1 subtracts the minimum of the whole tensor first and adds it back.

    Args:
        x: float32, any shape.
        alpha: float32 scalar tensor, the step; bounded below by 1e-5.
        bits: 1 to 8.
        signed: whether levels are symmetric around 0.
        zero: sign of 0 for signed 1 bit, as in `sign`.
        narrow: without the lowest (signed) or the highest (unsigned) code of more bits than one: TBT's ternary levels.
        normalised: divide the gradient of alpha by sqrt(x.numel() high), as LSQ does; BinaryViT does not.
    Source: Liu et al., BiT, NeurIPS 2022, section 3 (learned step: Esser et al., LSQ, ICLR 2020).
    """
    return _Elastic.apply(x, alpha, bits, signed, zero, narrow, normalised)


def elastic_alpha(x: Tensor, bits: int = 1, signed: bool = True) -> Tensor:
    """The step that BiT's first-use rule gives for this input: 2 or 4 mean |x| / sqrt(highest code)."""
    high = max((1 << (bits - 1)) - 1, 1) if signed else (1 << bits) - 1
    return (2 if signed else 4) * x.abs().mean() / math.sqrt(high)


class _WeightSign(torch.autograd.Function):
    """scale * sgn(centred), with the surrogate window on `centred`; and the signs alone."""

    @staticmethod
    def forward(ctx: Any, centred: Tensor, scale: Tensor, surrogate: str, carries_scale: bool) -> tuple[Tensor, Tensor]:
        signs = torch.sign(centred)
        planes = keep_levels(signs) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(scale if carries_scale else None, *planes, *keep_slope(ctx, centred, surrogate))
        ctx.mark_non_differentiable(signs)
        return scale * signs, signs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale, sign, nonzero, *slope = ctx.saved_tensors
        grad_centred = times_slope(ctx, grad, slope)
        if scale is not None:
            grad_centred = grad_centred * scale
        grad_scale = None if sign is None else grad * kept_levels(sign, nonzero, grad.shape)
        return grad_centred, grad_scale, None, None


class BinarizedWeight(NamedTuple):
    """A weight [n, k] as levels times scales, and the value with the rule's gradient.

    One plane: value = scale * signs, signs [n, k] in {-1, 0, 1}, scale [n, groups]. More: value is the sum over planes
    of scale[:, p] * signs[:, p k : (p + 1) k], signs [n, planes k], scale [n, planes]. Levels "integer" have no planes:
    their signs are whole numbers.
    """

    value: Tensor
    signs: Tensor
    scale: Tensor
    is_plane: bool = True  # one plane of signs


def binarize_weight(
    weight: Tensor,
    rule: WeightRule,
    group_size: int | None = None,
    learned_scale: Tensor | None = None,
    tau: Tensor | None = None,
    terms: Tensor | None = None,
) -> BinarizedWeight:
    """Binarise a weight [n, k] by a rule; statistics of rows become statistics of groups of `group_size` columns.

    Args:
        learned_scale: float [n, planes] for rules with one; None for where it starts.
        tau, terms: the numbers of the epoch for ReCU's redistribution and the "fourier" surrogate (`set_epoch`).
    """
    w = weight.float()
    n, k = w.shape
    latent = w - _centre(w, rule, group_size)
    if rule.redistribute:
        latent = redistributed(latent, tau)
    scale = weight_scale(w.detach(), rule, group_size) if learned_scale is None else learned_scale.float()
    if rule.levels == "residual":
        return _residual_planes(latent, scale, rule)
    columns = columns_of_groups(scale, k, group_size)
    if rule.levels == "sign" and terms is None:
        value, signs = _WeightSign.apply(latent, columns.expand(n, k), rule.surrogate, rule.carries_scale)
        return BinarizedWeight(value, signs, scale)
    levels = weight_levels(latent.detach(), columns, rule)
    value = with_slope(latent, columns * levels, level_slope(latent.detach(), columns, rule, terms))
    signs, scale = planes_of(levels, scale, rule)
    return BinarizedWeight(value, signs, scale, rule.planes == 1)


def _residual_planes(latent: Tensor, scale: Tensor, rule: WeightRule) -> BinarizedWeight:
    """Each plane binarises what the ones before leave, and gradients flow through what they leave (BinaryDM)."""
    rest, values, signs = latent, [], []
    for s in scale.unbind(1):
        value, plane = _WeightSign.apply(rest, s.unsqueeze(1).expand_as(rest), rule.surrogate, rule.carries_scale)
        values.append(value)
        signs.append(plane)
        rest = rest - value
    return BinarizedWeight(torch.stack(values).sum(0), torch.cat(signs, 1), scale, len(signs) == 1)


def weight_scale(weight: Tensor, rule: WeightRule, group_size: int | None = None) -> Tensor:
    """The scale of a rule, float32 [n, groups], or [n, planes] for "residual"; for "learned" where it starts."""
    w = weight.float()
    if rule.scale == "none":
        return w.new_ones((w.shape[0], 1))
    if rule.scale == "row_max":
        return level_scale(w, rule)
    if rule.levels == "residual":
        rest, scales = w - _centre(w, rule, group_size), []
        for _ in range(rule.bits):
            scales.append(rest.abs().mean(-1, keepdim=True))
            rest = rest - scales[-1] * torch.sign(rest)
        return torch.cat(scales, 1)
    if rule.scale == "tensor":
        return rule.scale_factor * w.abs().mean().expand(w.shape[0], 1).contiguous()
    if rule.scale == "row_centred":
        w = w - _centre(w, rule, group_size)
    means = _group_means(w.abs(), group_size)
    return means if rule.scale_factor == 1 else means * rule.scale_factor


def _centre(w: Tensor, rule: WeightRule, group_size: int | None) -> Tensor:
    if rule.centre == "none":
        return w.new_zeros(())
    if rule.centre == "global":
        return w.detach().mean()
    return columns_of_groups(_group_means(w, group_size), w.shape[1], group_size)


def _group_means(w: Tensor, group_size: int | None) -> Tensor:
    if not group_size:
        return w.mean(-1, keepdim=True)
    return torch.cat([part.mean(-1, keepdim=True) for part in w.split(group_size, 1)], 1)
