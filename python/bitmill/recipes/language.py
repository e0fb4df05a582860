# SPDX-License-Identifier: Apache-2.0
"""Text for language models: windows to calibrate on, and perplexity as published results count it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def random_windows(ids: Tensor, count: int, length: int, seed: int = 0) -> list[Tensor]:
    """`count` batches of one sequence, int64 [1, length], from random places of a text's ids, int64 [tokens].

    Raises:
        ValueError: if the text is shorter than one window.
    """
    _require_window("random_windows", ids, length)
    starts = torch.randint(ids.numel() - length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return [ids[start : start + length].unsqueeze(0) for start in starts.tolist()]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, length: int) -> float:
    """exp of the mean loss on a text's ids, int64 [tokens], cut into windows of `length` one after another.

    Each window stands alone: its first token is not predicted. What is left of the text behind the last whole window
    does not count. The model is called with int64 [1, length] in the mode that it is in; it returns logits, or an
    output of transformers.

    Raises:
        ValueError: if the text is shorter than one window, or a window has nothing to predict.
    """
    _require_window("perplexity", ids, length, least=2)
    windows = ids[: ids.numel() // length * length].view(-1, length)
    total = 0.0
    for window in windows:
        output = model(window.unsqueeze(0))
        logits = output if isinstance(output, Tensor) else output.logits
        total += nn.functional.cross_entropy(logits[0, :-1].float(), window[1:]).item()
    loss = total / len(windows)
    # A broken model may reach losses whose exponential no float holds.
    return math.exp(loss) if loss < 700 else math.inf


def _require_window(function: str, ids: Tensor, length: int, least: int = 1) -> None:
    if length < least:
        raise ValueError(f"{function}: length must be at least {least}, got {length}")
    if ids.dim() != 1 or ids.numel() < length:
        raise ValueError(
            f"{function}: ids must be one-dimensional with at least {length} tokens, got {list(ids.shape)}; take"
            " more text or shorter windows"
        )
