# SPDX-License-Identifier: Apache-2.0
"""BiLLM after training: every block of columns in three zones, each binarised with scales of its own.

Salient columns get two rounds of signs (the second for what the first leaves); the other entries are split by magnitude
into concentrated and sparse ones, one round each. How many columns are salient and where the split lies is searched for
every block, on the values that GPTQ has left it. So a row has at most 8 values in a block: 1 sign bit a weight, a bit
for the zone or, in salient columns, the second sign, and 7 scales a row and block. `nn.PackedZonedLinear` stores that.

Source: Huang et al., BiLLM: Pushing the Limit of Post-Training Quantization for LLMs, ICML 2024, sections 3.2 and 3.3,
as its published code computes them; GPTQ carries errors from block to block only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ZonedConfig
from ..convert import Filter
from ..nn import PackedZonedLinear
from ..nn._module import require_finite
from ..ops.salient_scatter import rounded_to_float16
from ..ops.zoned import ZonedWeight
from . import layerwise
from .gptq import Hessian, factor, output_error, sweep
from .pb_llm import ROUNDING, saliency

METRICS = ("magnitude", "hessian")
CONCENTRATED, SPARSE, SALIENT = 1, 2, 3
ROUNDS = {CONCENTRATED: 1, SPARSE: 1, SALIENT: 2}  # signs of a weight
MOST_SALIENT = 49  # columns of a block
QUANTILES = 81  # candidates for the split, from 0.1 to 0.9


class Residual(NamedTuple):
    """value float32 [n, k]: sum of mu + alpha b over the rounds, 0 outside the mask. plus bool [order, n, k]: b = +1.

    alpha, mu float32 [order, n].
    """

    value: Tensor
    alpha: Tensor
    mu: Tensor
    plus: Tensor


def residual_binarize(weight: Tensor, mask: Tensor, order: int) -> Residual:
    """Binarise the entries of `mask`, bool [n, k], row by row, `order` times, each time what is left.

    mu is the mean of the row's entries, alpha the mean magnitude of entry - mu. sgn(0) = +1: a packed sign is a bit.
    """
    count = mask.sum(1, keepdim=True).clamp_min(1)
    value, alphas, mus, signs = torch.zeros_like(weight), [], [], []
    for _ in range(order):
        left = torch.where(mask, weight - value, 0.0)
        mu = left.sum(1, keepdim=True) / count
        centred = torch.where(mask, left - mu, 0.0)
        alpha = centred.abs().sum(1, keepdim=True) / count
        plus = centred >= 0
        value = value + torch.where(mask, mu + torch.where(plus, alpha, -alpha), 0.0)
        alphas.append(alpha.squeeze(1))
        mus.append(mu.squeeze(1))
        signs.append(plus)
    return Residual(value, torch.stack(alphas), torch.stack(mus), torch.stack(signs))


class Zones(NamedTuple):
    """zone uint8 [n, k]: CONCENTRATED, SPARSE or SALIENT; how many columns are salient; where the others are split."""

    zone: Tensor
    columns: int
    split: float


def search_zones(scores: Tensor, most: int = MOST_SALIENT) -> Zones:
    """Zones of a block with the least squared error when the scores themselves are binarised in them.

    Args:
        scores: float32 [n, k]: the weight itself, or its Hessian `saliency`.
        most: the largest number of salient columns to try. Not all columns are salient, unless there is one only.
    """
    k = scores.shape[1]
    ranking = scores.abs().sum(0).argsort(descending=True, stable=True)

    def error_of(columns: int) -> float:
        return binarization_error(*(scores[:, part] for part in (ranking[:columns], ranking[columns:])))

    columns = min(range(1, max(min(most + 1, k), 2)), key=error_of)
    salient, magnitude = torch.zeros(k, dtype=torch.bool, device=scores.device), scores.abs()
    salient[ranking[:columns]] = True
    split = search_split(scores[:, ~salient], 1, torch.where(salient, 0.0, magnitude))
    zone = torch.where(magnitude < split, CONCENTRATED, SPARSE).masked_fill(salient, SALIENT)
    return Zones(zone.to(torch.uint8), columns, split)


def binarization_error(*parts: Tensor) -> float:
    """The squared error of parts [n, columns] of which every one is binarised twice, row by row."""
    left = (part - residual_binarize(part, torch.ones_like(part, dtype=torch.bool), 2).value for part in parts)
    return torch.stack([values.square().sum() for values in left]).sum().item()


def search_split(scores: Tensor, order: int, population: Tensor) -> float:
    """Where to split scores [n, columns] by magnitude, so that both parts are binarised best.

    Args:
        order: rounds of signs.
        population: whose quantiles are tried. In the published code that of the other entries holds a 0 for every
            salient one.
    """
    magnitude = scores.abs()
    quantiles = torch.linspace(0.1, 0.9, QUANTILES, device=scores.device)

    def error_at(split: float) -> float:
        low = magnitude < split
        parts = (residual_binarize(scores, mask, order).value for mask in (low, ~low))
        return (scores - sum(parts)).square().sum().item()

    return min(torch.quantile(population.flatten(), quantiles).tolist(), key=error_at)


class Block(NamedTuple):
    """A block of columns [n, k] as a method's `Fit` gets it.

    weight: what is to be binarised. zones: which entry lies where. sparse bool [n, k]: the zone of every entry, salient
    columns by a split of their own. gram float32 [k, k]: the Hessian of the block's inputs.
    """

    weight: Tensor
    zones: Zones
    sparse: Tensor
    gram: Tensor

    def masks(self, split_salient: bool) -> list[tuple[Tensor, int]]:
        """The zones in the order in which their scales are stored, each with its number of signs a weight."""
        salient = self.zones.zone == SALIENT
        parts = [(~salient & ~self.sparse, 1), (~salient & self.sparse, 1)]
        if split_salient:
            return [*parts, (salient & ~self.sparse, 2), (salient & self.sparse, 2)]
        return [*parts, (salient, 2)]


Fit = Callable[[Block], ZonedWeight]
"""A block to signs and scales for its zones."""


def assemble(
    block: Block, zones: list[tuple[Tensor, Tensor, Tensor]], column_scale: Tensor | None = None
) -> ZonedWeight:
    """One weight of the zones' masks [n, k], signs bool [order, n, k] and numbers float32 [s, n], in their order."""
    first, second = torch.zeros_like(block.sparse), torch.zeros_like(block.sparse)
    for mask, plus, _ in zones:
        first |= mask & plus[0]
        if len(plus) > 1:
            second |= mask & plus[1]
    scale = torch.cat([numbers for _, _, numbers in zones]).T.unsqueeze(1)
    salient = (block.zones.zone == SALIENT)[0]
    return ZonedWeight(first, second, block.sparse, salient, scale, column_scale)


def fit_residual(block: Block) -> ZonedWeight:
    """BiLLM's own fit: every zone by `residual_binarize`. The means of the salient columns' two rounds become one."""
    zones = []
    for mask, order in block.masks(split_salient=False):
        got = residual_binarize(block.weight, mask, order)
        zones.append((mask, got.plus, torch.stack([got.mu.sum(0), *got.alpha])))
    return assemble(block, zones)


class Zoned(NamedTuple):
    """What `quantize_weight` returns.

    weight: signs, zones and scales. value float32 [n, k]: the weight that they are. zone uint8 [n, k], the number of
    salient columns of every block, and GPTQ's loss (0: rtn).
    """

    weight: ZonedWeight
    value: Tensor
    zone: Tensor
    columns: list[int]
    loss: float


@torch.no_grad()
def quantize_zones(
    weight: Tensor,
    hessian: Tensor,
    fit: Fit,
    metric: str = "hessian",
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
    scale_bits: int = 16,
    split_salient: bool = False,
) -> Zoned:
    """What BiLLM and ARB-LLM share: search the zones of every block, fit them, carry the error to the blocks after it.

    Args:
        fit: makes signs and scales of a block.
        split_salient: search a split of the salient columns too.
        The others are those of `quantize_weight`.
    Raises:
        ValueError: as `quantize_weight`.
    """
    if rounding not in ROUNDING:
        raise ValueError(f"quantize_weight: rounding must be one of {', '.join(ROUNDING)}, got {rounding!r}")
    if metric not in METRICS:
        raise ValueError(f"quantize_weight: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    require_finite("quantize_weight", weight)
    upper, dead = factor(hessian, damping)
    if len(upper) != weight.shape[1]:
        raise ValueError(
            f"quantize_weight: hessian must have shape [{weight.shape[1]}, {weight.shape[1]}],"
            f" got {list(hessian.shape)}"
        )
    w = weight.detach().float().masked_fill(dead, 0)
    blocks: list[tuple[Zones, ZonedWeight]] = []

    def quantise(part: Tensor, first: int) -> Tensor:
        here = slice(first, first + part.shape[1])
        scores = part if metric == "magnitude" else saliency(part, upper[here, here], metric)
        found = search_zones(scores)
        sparse = scores.abs() >= found.split
        salient = found.zone == SALIENT
        if split_salient:
            of_salient = scores[:, salient[0]]
            split = search_split(of_salient, 2, of_salient.abs())
            sparse = torch.where(salient, scores.abs() >= split, sparse)
        else:
            sparse &= ~salient
        got = fit(Block(part, found, sparse, hessian[here, here].float()))
        if scale_bits == 16:  # what is multiplied with is what is stored
            columns = None if got.column_scale is None else rounded_to_float16(got.column_scale)
            got = got._replace(scale=rounded_to_float16(got.scale), column_scale=columns)
        blocks.append((found, got))
        return got.value(block)

    if rounding == "gptq":
        swept = sweep(w, upper, quantise, block, step=block)
        value, loss = swept.quantised, swept.loss
    else:
        value = torch.cat([quantise(part, first * block) for first, part in enumerate(w.split(block, 1))], 1)
        loss = 0.0
    zones = [found for found, _ in blocks]
    found = torch.cat([z.zone for z in zones], 1)
    return Zoned(joined([part for _, part in blocks]), value, found, [z.columns for z in zones], loss)


def joined(parts: Sequence[ZonedWeight]) -> ZonedWeight:
    """One weight of blocks that stand side by side."""

    def beside(field: str, dim: int) -> Tensor:
        return torch.cat([getattr(part, field) for part in parts], dim)

    columns = None if parts[0].column_scale is None else beside("column_scale", 0)
    first, second, sparse = (beside(field, 1) for field in ("first", "second", "sparse"))
    return ZonedWeight(first, second, sparse, beside("salient", 0), beside("scale", 1), columns)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    metric: str = "hessian",
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
    scale_bits: int = 16,
) -> Zoned:
    """Binarise a weight in zones, knowing the Hessian of its layer's inputs.

    Args:
        weight: [n, k], any float dtype.
        hessian: float32 [k, k], `gptq.Hessian(...).matrix`.
        metric: what the search works on: "hessian" w^2 / U_jj^2 or "magnitude", the weight itself.
        rounding: "gptq", or "rtn" to leave every block's error where it is.
        damping: of `gptq.factor`.
        block: columns of a block.
        scale_bits: means and scales are rounded to float16, or with 32 they stay float32.
    Raises:
        ValueError: for a weight that is not finite, an unfit Hessian, or an unknown metric or rounding.
    """
    return quantize_zones(weight, hessian, fit_residual, metric, rounding, damping, block, scale_bits)


def pack_linear(linear: nn.Linear, result: Zoned, config: ZonedConfig) -> PackedZonedLinear:
    """The packed layer that takes the place of `linear`; its weight is exactly `result.value`."""
    return PackedZonedLinear.from_parts(result.weight, linear.bias, config).train(linear.training)


def quantize_(
    model: nn.Module,
    batches: Iterable[layerwise.Batch],
    metric: str = "hessian",
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
    scale_bits: int = 16,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Binarise and pack the nn.Linear layers of a model's decoder blocks, in place, block by block.

    Args:
        metric, rounding, damping, block, scale_bits: of `quantize_weight`; here block is a multiple of 32.
        model, batches, blocks, filter_fn, folder, progress: as `pb_llm.quantize_` has them.
    Returns:
        For every layer |X W^T - X Q^T| / |X W^T| on the calibration text.
    Raises:
        ValueError: as `pb_llm.quantize_`.
    """
    config = ZonedConfig(block, scale_bits=scale_bits)

    def quantise(linear: nn.Linear, hessian: Hessian) -> tuple[nn.Module, float]:
        result = quantize_weight(linear.weight, hessian.matrix, metric, rounding, damping, block, scale_bits)
        return pack_linear(linear, result, config), output_error(hessian.matrix, linear.weight, result.value)

    settings = {**config.to_dict(), "method": "billm", "metric": metric, "rounding": rounding, "damping": damping}
    return layerwise.quantize_blocks_(model, batches, quantise, settings, blocks, filter_fn, folder, progress)
