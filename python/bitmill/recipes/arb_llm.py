# SPDX-License-Identifier: Apache-2.0
"""ARB-LLM after training: BiLLM's zones, with scales, means and signs refined in turn until they fit each other.

"arb"     w ~ mu + alpha b of a zone; mu, alpha and b by turns, each the best one for the other two.
"arb_x"   then mu and alpha again, for the error of the layer's output Tr((W - Q) S (W - Q)^T), S = X^T X, instead of
          the weight's; signs stay.
"arb_rc"  w ~ alpha_row alpha_column b without means: the scales of rows and of columns by turns.
Salient columns have two signs: mu + alpha b1 + beta b2, of which b1 and b2 are the nearest of four. With
`split_salient`, the column-group bitmap, they are split into a concentrated and a sparse zone like the others. No step
can increase the error that it works on. Search, carrying of errors and packed form are BiLLM's.

Source: Li et al., ARB-LLM: Alternating Refined Binarizations for Large Language Models, ICLR 2025 (arXiv 2410.03129),
sections 3.2 to 3.5 and algorithms 1 and 2; no code was published when this was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ZonedConfig
from ..convert import Filter
from ..ops.zoned import ZonedWeight
from . import billm, layerwise
from .billm import Block, Fit, Zoned, assemble, residual_binarize
from .gptq import Hessian, output_error

VARIANTS = ("arb", "arb_x", "arb_rc")
ITERATIONS = 15


class Signed(NamedTuple):
    """One zone: w ~ mu + sum_o scale[o] sign[o] in its mask [n, k]; sign float32 [order, n, k], 0 outside the mask.

    scale float32 [order, n]; mu float32 [n], 0 in a form without means.
    """

    mask: Tensor
    sign: Tensor
    scale: Tensor
    mu: Tensor

    def value(self, columns: Tensor | None = None) -> Tensor:
        """What the zone adds to the weight; `columns` [k] scales the signs."""
        signs = self.sign if columns is None else self.sign * columns
        return (self.scale.unsqueeze(2) * signs).sum(0) + self.mu.unsqueeze(1) * self.mask


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Row sums of `values` over those of `weights`; 0 where a row has no weight."""
    total = weights.sum(1)
    return torch.where(total > 0, values.sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


def nearest_signs(target: Tensor, scale: Tensor, mask: Tensor, columns: Tensor | None = None) -> Tensor:
    """sign float32 [order, n, k] whose sum of scale[o] sign[o], times `columns`, is nearest to `target` [n, k].

    scale: float32 [order, n]. Of equally near ones +1 is taken. 0 outside the mask.
    """
    order = len(scale)
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], device=scale.device)] * order).view(-1, order)
    best, nearest = torch.full_like(target, torch.inf), scale.new_zeros(order, *target.shape)
    for candidate in signs:
        level = (candidate @ scale).unsqueeze(1)
        distance = (target - (level if columns is None else level * columns)).abs()
        closer = distance < best
        best = torch.where(closer, distance, best)
        nearest = torch.where(closer, candidate.view(order, 1, 1), nearest)
    return nearest * mask


def start(weight: Tensor, mask: Tensor, order: int) -> Signed:
    """BiLLM's fit of a zone."""
    got = residual_binarize(weight, mask, order)
    return Signed(mask, torch.where(got.plus, 1.0, -1.0) * mask, got.alpha, got.mu.sum(0))


def refine(weight: Tensor, zone: Signed, iterations: int = ITERATIONS) -> Signed:
    """ARB: mu, each scale and the signs by turns; no turn increases the error of any row.

    Args:
        weight: float32 [n, k].
    """
    mask = zone.mask.to(weight.dtype)
    for _ in range(iterations):
        zone = zone._replace(mu=zone.mu + _mean((weight - zone.value()) * mask, mask))
        for o in range(len(zone.scale)):
            left = weight - zone.value() + zone.scale[o].unsqueeze(1) * zone.sign[o]
            scale = zone.scale.clone()
            scale[o] = _mean(zone.sign[o] * left, mask)
            zone = zone._replace(scale=scale)
        zone = zone._replace(sign=nearest_signs(weight - zone.mu.unsqueeze(1), zone.scale, zone.mask))
    return zone


def refine_output(weight: Tensor, zones: list[Signed], gram: Tensor, iterations: int = ITERATIONS) -> list[Signed]:
    """ARB-X: means and scales of all zones by turns, each the best one for Tr((W - Q) S (W - Q)^T); signs stay.

    The error is a quadratic form of a row's numbers, so the turns work on its matrix [numbers, numbers] alone.

    Args:
        weight: float32 [n, k].
        gram: S, symmetric float32 [k, k]; any positive multiple does.
    """
    directions = torch.cat([torch.cat([zone.mask.to(weight.dtype).unsqueeze(0), zone.sign]) for zone in zones])
    numbers = torch.cat([torch.cat([zone.mu.unsqueeze(0), zone.scale]) for zone in zones]).T.contiguous()
    seen = directions @ gram
    quadratic = torch.einsum("ink,jnk->nij", seen, directions)
    linear = torch.einsum("ink,nk->ni", seen, weight)
    diagonal = quadratic.diagonal(dim1=1, dim2=2)
    tiny = 1e-12 * diagonal.amax()  # a zone that is empty, or whose inputs are 0, keeps its numbers
    for _ in range(iterations):
        for i in range(numbers.shape[1]):
            slope = linear[:, i] - (quadratic[:, i] * numbers).sum(1)
            here = diagonal[:, i]
            numbers[:, i] += torch.where(here > tiny, slope / here.clamp_min(torch.finfo(here.dtype).tiny), 0.0)
    refined, at = [], 0
    for zone in zones:
        order = len(zone.scale)
        refined.append(zone._replace(mu=numbers[:, at], scale=numbers[:, at + 1 : at + 1 + order].T))
        at += 1 + order
    return refined


def start_row_column(weight: Tensor, zones: list[tuple[Tensor, int]]) -> tuple[list[Signed], Tensor]:
    """ARB-RC's start: means of magnitudes, of rows, then of columns, then of what a second sign has left."""
    rows = [_mean(weight.abs() * mask, mask.float()) for mask, _ in zones]
    size = torch.stack([mean.unsqueeze(1) * mask for mean, (mask, _) in zip(rows, zones, strict=True)]).sum(0)
    columns = _mean((weight.abs() / size.masked_fill(size == 0, 1.0)).T, torch.ones_like(weight).T)
    signed = []
    for mean, (mask, order) in zip(rows, zones, strict=True):
        left, signs, scales = weight * mask, [], [mean]
        for o in range(order):
            signs.append(torch.where(left >= 0, 1.0, -1.0) * mask)
            if o:
                scales.append(_mean(left * signs[o] * columns, columns.square() * mask))
            left = left - scales[o].unsqueeze(1) * signs[o] * columns
        signed.append(Signed(mask, torch.stack(signs), torch.stack(scales), weight.new_zeros(len(weight))))
    return signed, columns


def refine_row_column(
    weight: Tensor, zones: list[Signed], columns: Tensor, iterations: int = ITERATIONS
) -> tuple[list[Signed], Tensor]:
    """ARB-RC: scales of rows, of columns, and signs by turns; no turn increases the error of the weight.

    Args:
        weight: float32 [n, k].
        columns: float32 [k], the columns' scales, which all zones share.
    """
    for _ in range(iterations):
        refined = []
        for zone in zones:
            for o in range(len(zone.scale)):
                left = weight - zone.value(columns) + zone.scale[o].unsqueeze(1) * zone.sign[o] * columns
                scale = zone.scale.clone()
                scale[o] = _mean(zone.sign[o] * left * columns, columns.square() * zone.mask)
                zone = zone._replace(scale=scale)
            refined.append(zone)
        rows = torch.stack([zone.value() for zone in refined]).sum(0)
        size = rows.square().sum(0)
        columns = torch.where(size > 0, (weight * rows).sum(0) / size.clamp_min(torch.finfo(size.dtype).tiny), columns)
        zones = [z._replace(sign=nearest_signs(weight, z.scale, z.mask, columns)) for z in refined]
    return zones, columns


def fit_of(variant: str, split_salient: bool, iterations: int) -> Fit:
    """What a variant makes of a block."""

    def stored(block: Block, zones: list[Signed], means: bool, columns: Tensor | None = None) -> ZonedWeight:
        numbers = [torch.cat([z.mu.unsqueeze(0), z.scale]) if means else z.scale for z in zones]
        parts = [(z.mask, z.sign >= 0, s) for z, s in zip(zones, numbers, strict=True)]
        return assemble(block, parts, columns)

    def arb(block: Block) -> ZonedWeight:
        masks = block.masks(split_salient)
        zones = [refine(block.weight, start(block.weight, *part), iterations) for part in masks]
        if variant == "arb_x":
            zones = refine_output(block.weight, zones, block.gram, iterations)
        return stored(block, zones, True)

    def arb_rc(block: Block) -> ZonedWeight:
        zones, columns = start_row_column(block.weight, block.masks(split_salient))
        zones, columns = refine_row_column(block.weight, zones, columns, iterations)
        return stored(block, zones, False, columns)

    return arb_rc if variant == "arb_rc" else arb


def config_of(variant: str, split_salient: bool = True, block: int = 128, scale_bits: int = 16) -> ZonedConfig:
    """The packed form of a variant's layers.

    Raises:
        ValueError: for an unknown variant, or a value that a ZonedConfig refuses.
    """
    if variant not in VARIANTS:
        raise ValueError(f"arb_llm: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    by_columns = variant == "arb_rc"
    return ZonedConfig(block, not by_columns, by_columns, split_salient, scale_bits)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    variant: str = "arb_rc",
    split_salient: bool = True,
    metric: str = "hessian",
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
    scale_bits: int = 16,
    iterations: int = ITERATIONS,
) -> Zoned:
    """Binarise a weight in zones, knowing the Hessian of its layer's inputs.

    Args:
        weight: [n, k], any float dtype.
        hessian: float32 [k, k], `gptq.Hessian(...).matrix`.
        variant: "arb", "arb_x" or "arb_rc".
        split_salient: two zones for the salient columns too.
        metric, rounding, damping, block, scale_bits: of `billm.quantize_weight`; block is a multiple of 32.
        iterations: turns of the refinement.
    Raises:
        ValueError: as `billm.quantize_weight`, or for an unknown variant.
    """
    config_of(variant, split_salient, block, scale_bits)
    fit = fit_of(variant, split_salient, iterations)
    return billm.quantize_zones(weight, hessian, fit, metric, rounding, damping, block, scale_bits, split_salient)


def quantize_(
    model: nn.Module,
    batches: Iterable[layerwise.Batch],
    variant: str = "arb_rc",
    split_salient: bool = True,
    metric: str = "hessian",
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
    scale_bits: int = 16,
    iterations: int = ITERATIONS,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Binarise and pack the nn.Linear layers of a model's decoder blocks, in place, block by block.

    Args:
        variant, split_salient, metric, rounding, damping, block, scale_bits, iterations: of `quantize_weight`.
        model, batches, blocks, filter_fn, folder, progress: as `pb_llm.quantize_` has them.
    Returns:
        For every layer |X W^T - X Q^T| / |X W^T| on the calibration text.
    Raises:
        ValueError: as `pb_llm.quantize_`, or for an unknown variant.
    """
    config = config_of(variant, split_salient, block, scale_bits)

    def quantise(linear: nn.Linear, hessian: Hessian) -> tuple[nn.Module, float]:
        settings = (variant, split_salient, metric, rounding, damping, block, scale_bits, iterations)
        result = quantize_weight(linear.weight, hessian.matrix, *settings)
        return billm.pack_linear(linear, result, config), output_error(hessian.matrix, linear.weight, result.value)

    settings = {
        **config.to_dict(),
        **{"method": variant, "metric": metric, "rounding": rounding, "damping": damping, "iterations": iterations},
    }
    return layerwise.quantize_blocks_(model, batches, quantise, settings, blocks, filter_fn, folder, progress)
