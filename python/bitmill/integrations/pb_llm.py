# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of PB-LLM's published program, packed without loss.

The program writes dense matrices of float16 that only look quantised: in every row and group of columns the binarised
weights are two numbers, mu - alpha and mu + alpha, and the salient ones whole multiples of a step of the row, each
rounded to float16. Beside them it leaves a mask of the binarised weights. alpha, mu, step, zero and codes follow from
the numbers alone; rounded to the checkpoint's dtype, the packed weight is the checkpoint's weight, number for number.

Source: hahnyuan/PB-LLM, gptq_pb (Shang et al., ICLR 2024).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..config import SalientConfig
from ..convert import Filter
from ..nn import PackedSalientLinear
from ..nn.salient import QuantisedWeight, Scales
from ..ops._groups import columns_of_groups
from ._fake_quantised import distinct, import_linears, linear_names, mean_and_spread, rounding_range, weight_of

DEFAULT = SalientConfig(metric="hessian", scale="official")
REMEDY = "give the mask, the group size, the bits and the fraction that the checkpoint was made with"


def _refuse(row: int, reason: str) -> NoReturn:
    raise ValueError(f"import_linear: the weight must be as PB-LLM's program writes it, row {row} {reason}; {REMEDY}")


class _Pairs(NamedTuple):
    """The two values of the binarised weights of each row group, [n, groups], low <= high; 0 where there are none."""

    low: Tensor
    high: Tensor

    def columns(self, k: int, group_size: int) -> tuple[Tensor, Tensor]:
        return columns_of_groups(self.low, k, group_size), columns_of_groups(self.high, k, group_size)


def _pairs_of_mask(weight: Tensor, mask: Tensor, group_size: int) -> _Pairs:
    """Of the weights that the mask does not mark; they must have no third value."""
    infinity = torch.tensor(torch.inf, dtype=weight.dtype, device=weight.device)
    low = torch.where(mask, infinity, weight)
    high = torch.where(mask, -infinity, weight)
    width = group_size or weight.shape[1]
    lows = torch.stack([part.amin(1) for part in low.split(width, 1)], 1)
    highs = torch.stack([part.amax(1) for part in high.split(width, 1)], 1)
    empty = lows > highs
    pairs = _Pairs(lows.masked_fill(empty, 0), highs.masked_fill(empty, 0))
    low, high = pairs.columns(weight.shape[1], group_size)
    third = ~mask & (weight != low) & (weight != high)
    if third.any():
        row, column = third.nonzero()[0].tolist()
        first = column // width * width
        last = min(first + width, weight.shape[1])
        values = weight[row, first:last][~mask[row, first:last]].unique().numel()
        _refuse(row, f"has {values} values outside of the mask in columns {first} to {last - 1}, not two")
    return pairs


def _pairs_of_counts(weight: Tensor, group_size: int) -> _Pairs:
    """The two most frequent values of each row group."""
    lows, highs = [], []
    for part in weight.split(group_size or weight.shape[1], 1):
        found = distinct(part)
        two = found.occurrences.topk(min(2, part.shape[1]), 1)
        values = found.value.gather(1, two.indices)
        values = torch.where(two.values > 0, values, values[:, :1])  # a single value twice
        lows.append(values.amin(1))
        highs.append(values.amax(1))
    return _Pairs(torch.stack(lows, 1), torch.stack(highs, 1))


def _step(values: Tensor, levels: int, dtype: torch.dtype) -> tuple[float, int] | None:
    """The step s and the zero z, so that fl32(s (code - z)) with codes 0 ... levels rounds to each of `values`.

    Args:
        values: float64 [m], distinct, exactly as the checkpoint has them in `dtype`.
    Returns:
        The largest such step and its zero, or None.
    """
    nonzero = values[values != 0]
    if not nonzero.numel():
        return 1.0, 0
    size = nonzero.abs()
    below, above = rounding_range(size, dtype)
    # The largest value is some multiple of the step: try them all.
    largest = torch.arange(1, levels + 1, dtype=torch.float64, device=values.device).unsqueeze(1)
    multiple = (size * (largest / size.max())).round()
    least, most = (below / multiple).amax(1), (above / multiple).amin(1)
    signed = multiple * nonzero.sign()
    zero = (-signed.amin(1)).clamp_min(0)
    possible = (multiple > 0).all(1) & (least <= most) & (signed.amax(1) + zero <= levels)
    for i in possible.nonzero().flatten().tolist():
        middle = ((least[i] + most[i]) / 2).float()
        for step in (middle, middle.nextafter(middle * 2), middle.nextafter(middle / 2)):
            if torch.equal((step * signed[i].float()).to(dtype).double(), nonzero):
                return step.item(), int(zero[i])
    return None


def _codes(weight: Tensor, mask: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes [n, k] of the salient weights, and the scale and zero [n] of each row; of 16 bits the weights."""
    if bits == 16:
        unfit = mask & (weight.half().float() != weight)
        if unfit.any():
            _refuse(int(unfit.any(1).nonzero()[0]), "has salient weights that a float16 cannot hold")
        return weight, None, None
    levels, exact = (1 << bits) - 1, weight.double()
    if levels * torch.finfo(dtype).eps > 0.5:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"import_linear: weight must be float16 or float32 for {bits} bits, got {name}, which does not tell so many"
            " multiples of a step apart; take bits=16"
        )
    scale, zero = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0])
    for row in mask.any(1).nonzero().flatten().tolist():
        values = exact[row][mask[row]].unique()
        found = _step(values, levels, dtype)
        if found is None:
            _refuse(
                row, f"has {values.numel()} salient values that are not whole multiples of a step, as {bits} bits are"
            )
        scale[row], zero[row] = found
    scale, zero = scale.to(weight.device), zero.to(weight.device)
    codes = (exact / scale.double().unsqueeze(1)).round() + zero.unsqueeze(1)
    return codes.clamp(0, levels).to(torch.uint8), scale, zero


@torch.no_grad()
def import_linear(
    linear: nn.Linear, config: SalientConfig = DEFAULT, mask: Tensor | None = None
) -> PackedSalientLinear:
    """Pack a linear layer of a checkpoint that PB-LLM's program wrote.

    Args:
        linear: float16, as the program saves it, or float32; bfloat16 with bits=4 or 16.
        config: bits and group_size as the checkpoint was made with; bits=16 takes salient weights of any values.
            Without a mask, at most config.fraction of the weights may be salient.
        mask: bool [out_features, in_features], true where a weight is salient (`read_masks`); None to take the two most
            frequent values of each row group for the binarised ones. Salient weights that happen to have one of these
            values are then stored as binarised ones, which changes no number.
    Returns:
        A layer whose dequantised weight, rounded to the dtype of `linear`, equals its weight.
    Raises:
        ValueError: for anything that is not such a weight, with the row and the reason.
    """
    w, group_size = weight_of(linear), config.group_size or 0
    n, k = w.shape
    if mask is not None and (mask.shape != w.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"import_linear: mask must be bool {[n, k]}, got {str(mask.dtype).removeprefix('torch.')}"
            f" {list(mask.shape)}"
        )
    if mask is None:
        pairs = _pairs_of_counts(w, group_size)
        low, high = pairs.columns(k, group_size)
        mask = (w != low) & (w != high)
        if int(mask.sum()) > config.fraction * mask.numel():
            row = int(mask.sum(1).argmax())
            share = f"{mask.float().mean():.1%} of the layer, at most {config.fraction:.1%}"
            _refuse(row, f"has {int(mask[row].sum())} weights besides the two most frequent values ({share})")
    else:
        mask = mask.to(w.device)
        pairs = _pairs_of_mask(w, mask, group_size)
    _, high = pairs.columns(k, group_size)
    mu, alpha, found = mean_and_spread(pairs.low, pairs.high, linear.weight.dtype)
    if not found.all():
        _refuse(int((~found).any(1).nonzero()[0]), "has two values so far apart that float32 cannot hold their mean")
    codes, scale, zero = _codes(w, mask, config.bits, linear.weight.dtype)
    config = dataclasses.replace(config, centre=bool(mu.any()))
    scales = Scales(alpha, mu if config.centre else None, scale, zero, config.bits, group_size)
    parts = QuantisedWeight(w == high, codes, scales)
    return PackedSalientLinear.from_parts(parts, mask, linear.bias, config).train(linear.training)


def import_(
    model: nn.Module,
    config: SalientConfig = DEFAULT,
    masks: Mapping[str, Tensor] | None = None,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
) -> list[str]:
    """Pack the linear layers of a model's decoder blocks, in place. Arguments as `import_linear`, and:

    Args:
        model: with the checkpoint's weights, such as transformers loads it.
        masks: by the layers' names (`read_masks`); a layer without one is taken by its values.
        blocks: the name of the nn.ModuleList that holds the blocks; None finds it.
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: as `import_linear`, the layer's name first. The model is unchanged then.
    """
    masks = masks or {}
    return import_linears(model, blocks, filter_fn, lambda linear, name: import_linear(linear, config, masks.get(name)))


def read_masks(folder: str | os.PathLike[str], model: nn.Module, blocks: str | None = None) -> dict[str, Tensor]:
    """The masks that the program left in `outputs/mask`, for the linear layers of a model's decoder blocks.

    Its files, mask_FRACTION_MODELLAYER.pkl, mark the binarised weights; these masks mark the others.

    Raises:
        ValueError: if a layer has no file, or several of different fractions or models.
    """
    files = sorted(Path(folder).glob("mask_*.pkl"))
    masks: dict[str, Tensor] = {}
    for name in linear_names(model, blocks):
        found = [file for file in files if file.name.endswith(f"{name}.pkl")]
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(f"read_masks: {folder} must hold one file for layer {name}, got {names}")
        masks[name] = ~torch.load(found[0], map_location="cpu", weights_only=True).bool()
    return masks
