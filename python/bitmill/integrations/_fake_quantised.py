# SPDX-License-Identifier: Apache-2.0
"""Dense weights that hold few values a row: what their importers share.

A published program computes mu + alpha b in float32 and saves what that is in the checkpoint's dtype. To pack that
without loss is to find float32 numbers again whose sums round to what was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..convert import Filter, replace_modules, require_bare
from ..nn._module import require_finite
from ..recipes.layerwise import decoder_blocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def weight_of(linear: nn.Linear) -> Tensor:
    """The weight as float32 [n, k], which holds it exactly.

    Raises:
        ValueError: for a module that is not an nn.Linear, subclasses included, and a weight that is empty, not finite
            or of another dtype.
    """
    if type(linear) is not nn.Linear:
        raise ValueError(f"import_linear: linear must be a torch.nn.Linear, got {type(linear).__name__}")
    if linear.weight.dtype not in DTYPES:
        raise ValueError(
            "import_linear: weight must be float16, bfloat16 or float32,"
            f" got {str(linear.weight.dtype).removeprefix('torch.')}; load the checkpoint in the dtype that it was"
            " saved in"
        )
    if not linear.weight.numel():
        raise ValueError(f"import_linear: weight must have rows and columns, got {list(linear.weight.shape)}")
    require_finite("import_linear", linear.weight)
    return linear.weight.detach().float()


def linear_names(model: nn.Module, blocks: str | None) -> list[str]:
    """Of the nn.Linear layers of a model's decoder blocks."""
    prefix, _ = decoder_blocks(model, blocks)
    return [
        name for name, module in model.named_modules() if type(module) is nn.Linear and name.startswith(f"{prefix}.")
    ]


def import_linears(
    model: nn.Module, blocks: str | None, filter_fn: Filter | None, packed: Callable[[nn.Linear, str], nn.Module]
) -> list[str]:
    """Put packed(linear, name) in the place of every linear layer of the decoder blocks, or leave the model unchanged.

    Raises:
        ValueError: as `packed` raises it, the layer's name first.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    names = [
        name for name in linear_names(model, blocks) if filter_fn is None or filter_fn(model.get_submodule(name), name)
    ]
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            require_bare(linear)
            replacements[linear] = packed(linear, name)
        except ValueError as error:
            raise ValueError(f"import_: {name}: {error}") from None
    replace_modules(model, replacements)
    return names


class Values(NamedTuple):
    """The distinct values of each row, ascending.

    value [n, c], zeros after the last one; rank int64 [n, c]: which of them an entry is; occurrences int64 [n, c]: how
    many entries have it; number int64 [n]: how many there are.
    """

    value: Tensor
    rank: Tensor
    occurrences: Tensor
    number: Tensor


def distinct(part: Tensor) -> Values:
    """Of part [n, c], c > 0."""
    ordered, order = part.sort(1)
    run = torch.nn.functional.pad((ordered.diff() != 0).cumsum(1), (1, 0))
    return Values(
        torch.zeros_like(ordered).scatter_(1, run, ordered),
        torch.empty_like(run).scatter_(1, order, run),
        torch.zeros_like(run).scatter_add_(1, run, torch.ones_like(run)),
        run[:, -1] + 1,
    )


def rounding_range(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What rounds to each value in `dtype`: from the middle to its neighbour below to that above. All float64."""
    size = values.abs()
    mantissa, exponent = torch.frexp(size)
    finfo = torch.finfo(dtype)
    unit = torch.where(size > 0, torch.ldexp(torch.full_like(size, finfo.eps), exponent - 1), 0.0)
    unit = unit.clamp_min(finfo.tiny * finfo.eps)
    inner = size - unit * torch.where(mantissa == 0.5, 0.25, 0.5)  # below a power of two the neighbours are closer
    outer = size + unit / 2
    return torch.where(values < 0, -outer, inner), torch.where(values < 0, -inner, outer)


def mean_and_spread(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """mu and alpha, float32, so that fl32(mu - alpha) and fl32(mu + alpha) round to low <= high in `dtype`.

    The mean and half the difference of float32 pairs may need a bit more than there is: the middle of all means that
    are possible with one of three spreads then does. The third tensor, bool, is true where it was found, and mu and
    alpha are 0 elsewhere.
    """
    low, high = low.double(), high.double()
    (low_from, low_to), (high_from, high_to) = rounding_range(low, dtype), rounding_range(high, dtype)
    half = ((high - low) / 2).float()
    mu, alpha = torch.zeros_like(half), torch.zeros_like(half)
    found = torch.zeros_like(half, dtype=torch.bool)
    for spread in (half, half.nextafter(half * 2), half.nextafter(half / 2)):
        least = torch.maximum(high_from - spread, low_from + spread)
        most = torch.minimum(high_to - spread, low_to + spread)
        for mean in ((low + high) / 2, (least + most) / 2):
            m = mean.float()
            fits = (m - spread).to(dtype).double().eq(low) & (m + spread).to(dtype).double().eq(high) & ~found
            mu, alpha, found = torch.where(fits, m, mu), torch.where(fits, spread, alpha), found | fits
    return mu, alpha, found
