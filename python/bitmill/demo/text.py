# SPDX-License-Identifier: Apache-2.0
"""The evaluation text, its cut into stories, and the perplexity of a model on it.

The file has no end-of-text mark: stories and paragraphs are both followed by a blank line. A paragraph with a
typical opening ("Once upon a time", "There was", ...) starts a new story; stories that open otherwise stay with the
one before. No character is dropped: each story keeps the blank line at its end, the only end mark the text has, so
that it is predicted too; a story longer than the context continues in a further piece. Each piece starts with BOS.
"""

from __future__ import annotations

import gzip
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F

from bitmill.demo import DATA
from bitmill.demo.model import BOS, Stories
from bitmill.demo.tokenizer import Tokenizer

_OPENING = re.compile(r"(?<=\n\n)(?=Once upon a time|Once,? there |There (?:was|were|once) |Long ago|A long time ago)")
_IGNORE = -100


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a token, its exponential, and what it took."""

    loss: float
    perplexity: float
    tokens: int
    seconds: float


def read_text(path: str | PathLike[str] | None = None) -> str:
    """The text of `path` (gzip-ed UTF-8), or the first stories of TinyStories' validation split."""
    return gzip.decompress((Path(path) if path is not None else DATA / "valid-1k.txt.gz").read_bytes()).decode("utf-8")


def split_stories(text: str) -> list[str]:
    """The stories of text, in order; joined they are the text again."""
    return [story for story in _OPENING.split(text) if story]


def encode_pieces(
    tokenizer: Tokenizer, stories: Iterable[str], context: int = 512, tokens: int = -1
) -> list[list[int]]:
    """Pieces of at most `context` ids, each with BOS in front, in the order of the text.

    `tokens` >= 1 stops after the piece with which that many predicted tokens (ids without BOS) are reached.
    """
    if tokens != -1 and tokens < 1:
        raise ValueError(f"encode_pieces: tokens must be at least 1, or -1 for the whole text, got {tokens}")
    pieces: list[list[int]] = []
    total = 0
    for story in stories:
        ids = tokenizer.encode(story, bos=False)
        for start in range(0, len(ids), context - 1):
            pieces.append([BOS, *ids[start : start + context - 1]])
            total += len(pieces[-1]) - 1
            if -1 < tokens <= total:
                return pieces
    return pieces


def count_tokens(pieces: Iterable[Sequence[int]]) -> int:
    """How many tokens an evaluation of pieces predicts: all but the BOS of each."""
    return sum(len(piece) - 1 for piece in pieces)


@torch.no_grad()
def perplexity(
    model: Stories, pieces: Sequence[Sequence[int]], progress: Callable[[int], object] | None = None, batch: int = 16
) -> Evaluation:
    """Perplexity of model on pieces; `progress` is called with the number of tokens of each batch.

    Pieces of like length share a batch, padded on the right: causal attention never looks there, so padding costs
    time and changes nothing.
    """
    tokens = count_tokens(pieces)
    if tokens == 0:
        raise ValueError("perplexity: pieces must hold at least one token after BOS, got none")
    device = model.embedding.weight.device
    order = sorted(pieces, key=len)
    total = 0.0
    started = time.perf_counter()
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        shape = (len(group), len(group[-1]) - 1)
        inputs = torch.full(shape, BOS)
        targets = torch.full(shape, _IGNORE)
        for row, piece in enumerate(group):
            inputs[row, : len(piece) - 1] = torch.tensor(piece[:-1])
            targets[row, : len(piece) - 1] = torch.tensor(piece[1:])
        logits = model(inputs.to(device)).float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=_IGNORE, reduction="none"
        )
        total += float(losses.double().sum())
        if progress is not None:
            progress(count_tokens(group))
    loss = total / tokens
    # A broken model may reach losses whose exponential no float holds.
    value = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, value, tokens, time.perf_counter() - started)
