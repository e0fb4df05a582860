# SPDX-License-Identifier: Apache-2.0
"""Text for language models: windows to calibrate on, and perplexity as published results count it."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def read_ids(path: str | os.PathLike[str], tokenizer: Any) -> Tensor:
    """The ids of a text, int64 [tokens], without special tokens; UTF-8, gzip-ed if the name ends in .gz.

    Raises:
        ValueError: if it is not such a text.
        OSError: if it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"read_ids: {os.fspath(path)} must be UTF-8 text, gzip-ed in a .gz: {error}") from None
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def random_windows(ids: Tensor, count: int, length: int, seed: int = 0) -> list[Tensor]:
    """`count` batches of one sequence, int64 [1, length], from random places of a text's ids, int64 [tokens].

    Raises:
        ValueError: if the text is shorter than one window.
    """
    _require_window("random_windows", ids, length)
    starts = torch.randint(ids.numel() - length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return [ids[start : start + length].unsqueeze(0) for start in starts.tolist()]


class Perplexity(NamedTuple):
    """exp of the mean loss of `tokens` predicted tokens in `windows` windows."""

    value: float
    tokens: int
    windows: int


def perplexity(model: nn.Module, ids: Tensor, length: int) -> float:
    """`measure_perplexity` of the whole text in windows one after another."""
    return measure_perplexity(model, ids, length).value


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    ids: Tensor,
    length: int,
    stride: int | None = None,
    windows: int | None = None,
    bos: int | None = None,
) -> Perplexity:
    """exp of the mean loss on a text's ids, int64 [tokens], cut into windows of `length`.

    Each window stands alone. Every token with something before it in its window is predicted once: with a stride, in
    the first window that has it. What is left of the text behind the last whole window does not count. The model is
    called with int64 [1, length] in the mode that it is in; it returns logits, or an output of transformers.

    Args:
        stride: tokens from the start of one window to the next, at most the tokens of a window, which is None's too.
        windows: the most windows to take, from the start of the text; None: all.
        bos: a token to put in front of each window, which then holds one less of the text and predicts its first;
            None: none.
    Raises:
        ValueError: if the text is shorter than one window, a window has nothing to predict, or for another stride or
            number of windows.
    """
    _require_window("perplexity", ids, length, least=2)
    width = length if bos is None else length - 1
    step = width if stride is None else stride
    if not 1 <= step <= width:
        raise ValueError(f"perplexity: stride must be from 1 to the tokens of a window, {width}, got {step}")
    if windows is not None and windows < 1:
        raise ValueError(f"perplexity: windows must be at least 1, got {windows}")
    front = ids.new_tensor([] if bos is None else [bos])
    starts = range(0, ids.numel() - width + 1, step)[:windows]
    total, tokens = 0.0, 0
    for start in starts:
        window = torch.cat((front, ids[start : start + width]))
        output = model(window.unsqueeze(0))
        logits = output if isinstance(output, Tensor) else output.logits
        fresh = min(step, length - 1) if start else length - 1  # at the window's end, in no window before
        losses = nn.functional.cross_entropy(logits[0, -fresh - 1 : -1].float(), window[-fresh:], reduction="sum")
        total, tokens = total + losses.item(), tokens + fresh
    loss = total / tokens
    # A broken model may reach losses whose exponential no float holds.
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, tokens, len(starts))


def _require_window(function: str, ids: Tensor, length: int, least: int = 1) -> None:
    if length < least:
        raise ValueError(f"{function}: length must be at least {least}, got {length}")
    if ids.dim() != 1 or ids.numel() < length:
        raise ValueError(
            f"{function}: ids must be one-dimensional with at least {length} tokens, got {list(ids.shape)}; take"
            " more text or shorter windows"
        )
