# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of BiLLM's published program, packed without loss.

The program writes dense matrices of float16 that only look quantised: in every row and block of columns there are at
most 8 numbers, 4 of them, mu +- alpha +- beta, in the block's salient columns, and in the others mu +- alpha of the
concentrated zone and of the sparse one, each rounded to float16. It saves neither scales nor salient columns nor zones.
All follow from the numbers: salient are columns that leave every row at most 4 values in them and 4 in the others; any
two values make a zone. Rounded to the checkpoint's dtype, the packed weight is the checkpoint's, number for number.

Source: Aaronhuang-778/BiLLM, method braq (Huang et al., ICML 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ZonedConfig
from ..convert import Filter
from ..nn import PackedZonedLinear
from ..ops.zoned import ZonedWeight
from ..recipes.billm import joined
from ._fake_quantised import distinct, import_linears, mean_and_spread, rounding_range, weight_of

DEFAULT = ZonedConfig(scale_bits=32)
REMEDY = "give the block and the salient columns that the checkpoint was made with"
MOST = 4  # values of a row in the salient columns of a block, and in the others
SEARCH_ROWS, SEARCH_STEPS = 256, 500  # the rows that the search for salient columns looks at, and where it gives up
PAIRS = (((1, 2), (0, 3)), ((0, 1), (2, 3)), ((0, 2), (1, 3)))  # 4 values as two zones, the concentrated one first
# Which corners of the rectangle mu +- alpha +- beta, the lowest first, 1 to 4 values can be.
CORNERS = ((0,), (0, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3))


class _UnfitError(Exception):
    """A block is not as the program writes it: the row, what is wrong with it, and the remedy."""

    def __init__(self, row: int, reason: str, remedy: str = REMEDY) -> None:
        self.row, self.reason, self.remedy = row, reason, remedy


class _Fit(NamedTuple):
    """Two bits for each of 4 values, bool [n, 4], their scales, float32 [n, s], and whether these fit, bool [n]."""

    first: Tensor
    second: Tensor
    scale: Tensor
    fits: Tensor


def _no_fit(values: Tensor, scales: int) -> _Fit:
    bits = torch.zeros_like(values, dtype=torch.bool)
    return _Fit(bits, bits.clone(), values.new_zeros(len(values), scales), bits[:, 0].clone())


def _fit_zones(values: Tensor, dtype: torch.dtype) -> _Fit:
    """values [n, 4], ascending, as two zones of two; first is the sign, second the zone, scale mu and alpha of both."""
    fit, place = _no_fit(values, 4), torch.arange(MOST, device=values.device)
    for concentrated, sparse in PAIRS:
        low, high = ([pair[i] for pair in (concentrated, sparse)] for i in (0, 1))
        mu, alpha, found = mean_and_spread(values[:, low], values[:, high], dtype)
        new = (found.all(1) & ~fit.fits).unsqueeze(1)
        fit = _Fit(
            torch.where(new, (place == high[0]) | (place == high[1]), fit.first),
            torch.where(new, (place == sparse[0]) | (place == sparse[1]), fit.second),
            torch.where(new, torch.stack([mu, alpha], 2).flatten(1), fit.scale),
            fit.fits | new.squeeze(1),
        )
    return fit


def _fit_residual(values: Tensor, count: Tensor, dtype: torch.dtype) -> _Fit:
    """The first `count` of values [n, 4], ascending, as mu +- alpha +- beta; first and second are the signs."""
    fit = _no_fit(values, 3)
    for corners in CORNERS:
        rows = ((count == len(corners)) & ~fit.fits).nonzero().flatten()
        fit.scale[rows], fit.fits[rows] = _rectangle(values[rows, : len(corners)], corners, dtype)
        for i, corner in enumerate(corners):
            fit.first[rows, i], fit.second[rows, i] = corner >= 2, corner % 2 == 1
    return fit


def _rectangle(values: Tensor, corners: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mu, alpha and beta, float32 [n, 3], so that (mu +- alpha) +- beta at these corners round to values [n, c].

    The diagonals of a rectangle agree, v0 + v3 = v1 + v2; those of rounded values are brought to agree, each value
    giving way in proportion to what it may. That gives mu and alpha; beta is the middle of what suits their float32
    sums. Also returns whether it does, bool [n].
    """
    exact = values.double()
    at = _all_corners(exact, corners)
    low, high = torch.full_like(at, -torch.inf), torch.full_like(at, torch.inf)
    low[:, corners], high[:, corners] = rounding_range(exact, dtype)
    if len(corners) == 4:
        middle, width = (low + high) / 2, (high - low) / 2
        outwards = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=at.dtype, device=at.device)
        excess = (middle * outwards).sum(1, keepdim=True)
        at = middle - excess / width.sum(1, keepdim=True) * outwards * width
    v0, v1, v2, v3 = at.split(1, 1)
    mu, alpha = ((v0 + v1 + v2 + v3) / 4).float(), ((v2 + v3 - v0 - v1) / 4).float()
    centre = torch.cat([mu - alpha, mu + alpha], 1).repeat_interleave(2, 1)
    added = torch.arange(4, device=at.device) % 2 == 1
    least = torch.where(added, low - centre, centre - high).amax(1, keepdim=True)
    most = torch.where(added, high - centre, centre - low).amin(1, keepdim=True)
    beta = ((least + most) / 2).float()
    sums = torch.where(added, centre + beta, centre - beta)[:, corners]
    return torch.cat([mu, alpha, beta], 1), (sums.to(dtype).float() == values).all(1)


def _all_corners(values: Tensor, corners: tuple[int, ...]) -> Tensor:
    """All four corners [n, 4] of the rectangle that has values [n, c] at some."""
    at = values[:, :1].repeat(1, 4)
    at[:, corners] = values
    if len(corners) == 2:
        at[:, 2] = values[:, 1]
    if len(corners) == 3:
        (missing,) = {0, 1, 2, 3} - set(corners)
        at[:, missing] = values.sum(1) - 2 * at[:, 3 - missing]
    return at


def _pack_block(part: Tensor, salient: Tensor, dtype: torch.dtype, split: bool) -> ZonedWeight:
    """A block [n, c] with these columns, bool [c], salient."""
    first, second, sparse = (torch.zeros_like(part, dtype=torch.bool) for _ in range(3))
    scales = []
    for columns, residual in ((~salient, False), (salient, not split)):
        if not columns.any():
            scales.append(part.new_zeros(len(part), 3 if residual else 4))
            continue
        found, where = distinct(part[:, columns]), "salient" if columns is salient else "other"
        if (found.number > MOST).any():
            row = int(found.number.argmax())
            raise _UnfitError(row, f"has {int(found.number[row])} values in the {where} columns, not at most {MOST}")
        place = torch.arange(MOST, device=part.device).minimum(found.number.unsqueeze(1) - 1)
        values = found.value.gather(1, place)  # the last one again where there are less than 4
        fit = _fit_residual(values, found.number, dtype) if residual else _fit_zones(values, dtype)
        if not fit.fits.all():
            row = int((~fit.fits).nonzero()[0])
            numbers = ", ".join(f"{value:.6g}" for value in found.value[row, : int(found.number[row])].tolist())
            form = "mu +- alpha +- beta" if residual else "two zones whose means float32 can hold"
            remedy = "load the checkpoint in the dtype that it was saved in"
            remedy += ", or take split_salient=True, which stores any four float16 values" if residual else ""
            raise _UnfitError(row, f"has {numbers} in the {where} columns, which are not {form}", remedy)
        first[:, columns] = fit.first.gather(1, found.rank)
        (second if residual else sparse)[:, columns] = fit.second.gather(1, found.rank)
        scales.append(fit.scale)
    if split:  # beta is 0 in both of the salient zones
        mu_alpha = scales[1].unflatten(1, (2, 2))
        scales[1] = torch.nn.functional.pad(mu_alpha, (0, 1)).flatten(1)
    return ZonedWeight(first, second, sparse, salient, torch.cat(scales, 1).unsqueeze(1))


def _search_block(part: Tensor, dtype: torch.dtype, split: bool) -> ZonedWeight:
    """A block [n, c] whose salient columns are not known: the first choice that fits."""
    found = distinct(part)
    row = int(found.number.argmax())
    values, reason = int(found.number[row]), f"not at most {2 * MOST}"
    if values <= 2 * MOST:
        unfit, rows = None, found.number.topk(min(SEARCH_ROWS, len(part))).indices
        for side in _sides(found.rank[rows]):
            for salient in sorted((side, ~side), key=lambda columns: int(columns.sum())):
                try:
                    return _pack_block(part, salient, dtype, split)
                except _UnfitError as error:
                    unfit = unfit or error
        if unfit:
            raise unfit
        reason = f"and no salient columns were found that leave every row at most {MOST} values in them and in the rest"
    raise _UnfitError(row, f"has {values} values, {reason}")


def _sides(rank: Tensor) -> Iterator[Tensor]:
    """Ways to part columns in two so that no row has more than 4 values on either side, as bool [c]; in depth first.

    Args:
        rank: int64 [n, c], below 8: which of the row's values an entry is.
    """
    start = torch.full_like(rank[0], -1)
    start[0] = 0
    stack = [start]
    for _ in range(SEARCH_STEPS):
        if not stack:
            return
        settled = _settle(stack.pop(), rank)
        if settled is None:
            continue
        side, new = settled
        if (side >= 0).all():
            yield side == 1
            continue
        column = int(torch.where(side < 0, new.amin(0), -1).argmax())  # the one that decides most
        first = int(new[1, column] <= new[0, column])
        for choice in (1 - first, first):
            stack.append(side.index_fill(0, torch.tensor(column, device=side.device), choice))


def _settle(side: Tensor, rank: Tensor) -> tuple[Tensor, Tensor] | None:
    """Give a side to the columns that fit one only, or that bring no row a new value there.

    Args:
        side: int64 [c]: 0, 1, or -1 for none yet.
    Returns:
        side, and in how many rows a column would bring a new value to each, int64 [2, c]; None where it cannot be.
    """
    n, c = rank.shape
    while True:
        seen = torch.zeros(2, n, 2 * MOST, dtype=torch.bool, device=rank.device)
        for i in (0, 1):
            seen[i].scatter_(1, rank[:, side == i], True)
        count, new = seen.sum(2, keepdim=True), ~seen.gather(2, rank.expand(2, n, c))
        brings = new.sum(1).masked_fill((count + new > MOST).any(1), n + 1)
        least, to = brings.min(0)
        undecided = side < 0
        if (count > MOST).any() or (least[undecided] > n).any():
            return None
        clear = undecided & ((least == 0) | (brings.amax(0) > n))
        if not clear.any():
            return side, brings
        side = torch.where(clear, to, side)


@torch.no_grad()
def import_linear(
    linear: nn.Linear, config: ZonedConfig = DEFAULT, salient_columns: Tensor | None = None
) -> PackedZonedLinear:
    """Pack a linear layer of a checkpoint that BiLLM's program wrote.

    Args:
        linear: float16, as the program saves it, or bfloat16. float32 numbers must be what sums in float32 can give, as
            those of float16 scales are.
        config: block as the checkpoint was made with, and scale_bits=32; the sums of float16 scales round otherwise.
            split_salient=True stores the salient columns of a row and block as two zones of two values, so that any
            four float16 values fit, rounded or not: for a float16 checkpoint in a float32 model.
        salient_columns: bool [in_features]; None to find columns that can be salient. Where several choices explain
            the numbers, as in layers of few rows, it may be another than the program's, which changes no number.
    Returns:
        A layer whose dequantised weight, rounded to the dtype of `linear`, equals its weight.
    Raises:
        ValueError: for anything that is not such a weight, with the row, the block and the reason. A weight that equals
            its zone's mean, which the program leaves there, is one: its row has a value too many.
    """
    w, dtype = weight_of(linear), linear.weight.dtype
    if config.scale_bits != 32 or not config.centre or config.column_scale:
        raise ValueError(
            "import_linear: config must have scale_bits=32, centre=True and column_scale=False, got"
            f" scale_bits={config.scale_bits}, centre={config.centre} and column_scale={config.column_scale}; take"
            " ZonedConfig(block, scale_bits=32)"
        )
    k = w.shape[1]
    if salient_columns is not None and (salient_columns.shape != (k,) or salient_columns.dtype != torch.bool):
        raise ValueError(
            f"import_linear: salient_columns must be bool [{k}],"
            f" got {str(salient_columns.dtype).removeprefix('torch.')} {list(salient_columns.shape)}"
        )
    blocks = []
    for first in range(0, k, config.block):
        part = w[:, first : first + config.block]
        try:
            if salient_columns is None:
                blocks.append(_search_block(part, dtype, config.split_salient))
            else:
                salient = salient_columns[first : first + config.block].to(w.device)
                blocks.append(_pack_block(part, salient, dtype, config.split_salient))
        except _UnfitError as unfit:
            raise ValueError(
                f"import_linear: the weight must be as BiLLM's program writes it, row {unfit.row}, columns {first} to"
                f" {first + part.shape[1] - 1}, {unfit.reason}; {unfit.remedy}"
            ) from None
    return PackedZonedLinear.from_parts(joined(blocks), linear.bias, config).train(linear.training)


def import_(
    model: nn.Module,
    config: ZonedConfig = DEFAULT,
    salient_columns: Mapping[str, Tensor] | None = None,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
) -> list[str]:
    """Pack the linear layers of a model's decoder blocks, in place. Arguments as `import_linear`, and:

    Args:
        model: with the checkpoint's weights, such as transformers loads it, in the dtype that they were saved in.
        salient_columns: by the layers' names; those of a layer without are found.
        blocks: the name of the nn.ModuleList that holds the blocks; None finds it.
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: as `import_linear`, the layer's name first. The model is unchanged then.
    """
    known = salient_columns or {}
    return import_linears(model, blocks, filter_fn, lambda linear, name: import_linear(linear, config, known.get(name)))
