# SPDX-License-Identifier: Apache-2.0
"""BiLLM after training: every block of columns in three zones, each binarised with scales of its own.

Salient columns get two rounds of signs (the second for what the first leaves); the other entries are split by magnitude
into concentrated and sparse ones, one round each. How many columns are salient and where the split lies is searched for
every block, on the values that GPTQ has left it. So a row has at most 8 values in a block: 1 sign bit a weight, a bit
for the zone, the salient columns' second sign, and 7 scales a row and block. There is no packed form of it here yet:
layers stay nn.Linear.

Source: Huang et al., BiLLM: Pushing the Limit of Post-Training Quantization for LLMs, ICML 2024, sections 3.2 and 3.3,
as its published code computes them; GPTQ carries errors from block to block only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..convert import Filter
from ..nn._module import linear_from, require_finite
from . import layerwise
from .gptq import Hessian, factor, output_error, sweep
from .pb_llm import ROUNDING, saliency

METRICS = ("magnitude", "hessian")
CONCENTRATED, SPARSE, SALIENT = 1, 2, 3
ROUNDS = {CONCENTRATED: 1, SPARSE: 1, SALIENT: 2}
MOST_SALIENT = 49  # columns of a block
QUANTILES = 81  # candidates for the split, from 0.1 to 0.9


class Residual(NamedTuple):
    """value float32 [n, k]: sum of mu + alpha b over the rounds, 0 outside the mask. alpha, mu float32 [order, n]."""

    value: Tensor
    alpha: Tensor
    mu: Tensor


def residual_binarize(weight: Tensor, mask: Tensor, order: int) -> Residual:
    """Binarise the entries of `mask`, bool [n, k], row by row, `order` times, each time what is left.

    mu is the mean of the row's entries, alpha the mean magnitude of entry - mu; sgn(0) = 0.
    """
    count = mask.sum(1, keepdim=True).clamp_min(1)
    value, alphas, mus = torch.zeros_like(weight), [], []
    for _ in range(order):
        left = torch.where(mask, weight - value, 0.0)
        mu = left.sum(1, keepdim=True) / count
        centred = torch.where(mask, left - mu, 0.0)
        alpha = centred.abs().sum(1, keepdim=True) / count
        value = value + torch.where(mask, mu + alpha * torch.sign(centred), 0.0)
        alphas.append(alpha.squeeze(1))
        mus.append(mu.squeeze(1))
    return Residual(value, torch.stack(alphas), torch.stack(mus))


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
    n, k = scores.shape
    ranking = scores.abs().sum(0).argsort(descending=True, stable=True)

    def marked(columns: int) -> Tensor:
        chosen = torch.zeros(k, dtype=torch.bool, device=scores.device)
        return chosen.index_fill(0, ranking[:columns], True).expand(n, k)

    def error(*parts: Residual) -> float:
        left = scores
        for part in parts:
            left = left - part.value
        return left.square().mean().item()

    def error_of(columns: int) -> float:
        salient = marked(columns)
        return error(residual_binarize(scores, salient, 2), residual_binarize(scores, ~salient, 2))

    columns = min(range(1, max(min(most + 1, k), 2)), key=error_of)
    salient = marked(columns)
    twice, magnitude = residual_binarize(scores, salient, 2), scores.abs()
    others = torch.where(salient, 0.0, magnitude).flatten()
    splits = torch.quantile(others, torch.linspace(0.1, 0.9, QUANTILES, device=scores.device)).tolist()

    def error_at(split: float) -> float:
        low = ~salient & (magnitude < split)
        return error(twice, *(residual_binarize(scores, mask, 1) for mask in (low, ~salient & ~low)))

    split = min(splits, key=error_at)
    zone = torch.where(magnitude < split, CONCENTRATED, SPARSE).masked_fill(salient, SALIENT)
    return Zones(zone.to(torch.uint8), columns, split)


class Zoned(NamedTuple):
    """What `quantize_weight` returns.

    value float32 [n, k], zone uint8 [n, k], the number of salient columns of every block, and GPTQ's loss (0: rtn).
    """

    value: Tensor
    zone: Tensor
    columns: list[int]
    loss: float


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    metric: str = "hessian",
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
) -> Zoned:
    """Binarise a weight in zones, knowing the Hessian of its layer's inputs.

    Args:
        weight: [n, k], any float dtype.
        hessian: float32 [k, k], `gptq.Hessian(...).matrix`.
        metric: what the search works on: "hessian" w^2 / U_jj^2 or "magnitude", the weight itself.
        rounding: "gptq", or "rtn" to leave every block's error where it is.
        damping: of `gptq.factor`.
        block: columns of a block.
    Raises:
        ValueError: for a weight that is not finite, an unfit Hessian, or an unknown metric or rounding.
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
    zones = torch.zeros_like(w, dtype=torch.uint8)
    columns: list[int] = []

    def quantise(part: Tensor, first: int) -> Tensor:
        here = slice(first, first + part.shape[1])
        found = search_zones(part if metric == "magnitude" else saliency(part, upper[here, here], metric))
        zones[:, here] = found.zone
        columns.append(found.columns)
        values = (residual_binarize(part, found.zone == zone, order).value for zone, order in ROUNDS.items())
        return torch.stack([*values]).sum(0)

    if rounding == "gptq":
        swept = sweep(w, upper, quantise, block, step=block)
        return Zoned(swept.quantised, zones, columns, swept.loss)
    parts = [quantise(part, first * block) for first, part in enumerate(w.split(block, 1))]
    return Zoned(torch.cat(parts, 1), zones, columns, 0.0)


def quantize_(
    model: nn.Module,
    batches: Iterable[layerwise.Batch],
    metric: str = "hessian",
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Binarise the weights of the nn.Linear layers of a model's decoder blocks, in place, block by block.

    The layers are new nn.Linear ones with the binarised weight in the dtype of the old.

    Args:
        metric, rounding, damping, block: of `quantize_weight`.
        model, batches, blocks, filter_fn, folder, progress: as `pb_llm.quantize_` has them.
    Returns:
        For every layer |X W^T - X Q^T| / |X W^T| on the calibration text.
    Raises:
        ValueError: as `pb_llm.quantize_`.
    """

    def quantise(linear: nn.Linear, hessian: Hessian) -> tuple[nn.Module, float]:
        value = quantize_weight(linear.weight, hessian.matrix, metric, rounding, damping, block).value
        error = output_error(hessian.matrix, linear.weight, value)
        return linear_from(value, linear.bias, linear.weight.dtype, linear.training), error

    settings = {"method": "billm", "metric": metric, "rounding": rounding, "damping": damping, "block": block}
    return layerwise.quantize_blocks_(model, batches, quantise, settings, blocks, filter_fn, folder, progress)
