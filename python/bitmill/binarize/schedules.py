# SPDX-License-Identifier: Apache-2.0
"""What follows the epoch: one number a schedule, a buffer of each layer, so a checkpoint resumes where it stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Schedule(NamedTuple):
    """A number before the first `set_epoch`, and its rule (epoch, epochs) -> number."""

    start: float
    at: Callable[[int, int], float]


def _recu_quantile(epoch: int, epochs: int) -> float:
    slope = 0.14 / (math.e - 1)
    return slope * math.exp(epoch / epochs) + 0.85 - slope


SCHEDULES = {
    # Xu et al., ReCU, ICCV 2021: the quantile at which weights are clamped, 0.85 to 0.99; 1 clamps nothing
    "tau": Schedule(1.0, _recu_quantile),
    # Xu et al., FDA, NeurIPS 2021: the last term of the sine series, 9 to 18, and the size of the noise, 0.1 to 0
    "terms": Schedule(9.0, lambda epoch, epochs: 9.0 + int(9 * epoch / epochs)),
    "noise": Schedule(0.0, lambda epoch, epochs: 0.05 * (1 + math.cos(math.pi * (epoch + 1) / epochs))),
}


def epoch_numbers(names: tuple[str, ...], device: torch.device | None = None) -> dict[str, torch.Tensor | None]:
    """The buffers of a layer, float32 scalars: every schedule's start, None for those that are not named."""
    starts = {name: schedule.start for name, schedule in SCHEDULES.items()}
    return {name: torch.full((), start, device=device) if name in names else None for name, start in starts.items()}


class FollowsEpoch(nn.Module):
    """A layer with the buffers of `epoch_numbers`."""

    tau: torch.Tensor | None
    terms: torch.Tensor | None
    noise: torch.Tensor | None

    @torch.no_grad()
    def on_epoch(self, epoch: int, epochs: int) -> bool:
        """Set the numbers of an epoch; answers whether there are any."""
        numbers = {name: t for name in SCHEDULES if (t := getattr(self, name)) is not None}
        for name, t in numbers.items():
            t.fill_(SCHEDULES[name].at(epoch, epochs))
        return bool(numbers)


def set_epoch(model: nn.Module, epoch: int, epochs: int) -> list[str]:
    """Tell every layer of the model which epoch begins, before its first batch.

    ReCU's clamping quantile and FDA's series and noise follow it; other methods have nothing to follow.

    Args:
        epoch: 0 ... epochs - 1.
        epochs: of the whole training.
    Returns:
        The names of the layers that follow the epoch.
    Raises:
        ValueError: for an epoch outside.
    """
    if not (type(epoch) is int and type(epochs) is int and 0 <= epoch < epochs):
        raise ValueError(f"set_epoch: epoch must be a whole number from 0 to epochs - 1, got {epoch!r} of {epochs!r}")
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, FollowsEpoch)]
    return [name for name, layer in layers if layer.on_epoch(epoch, epochs)]
