# SPDX-License-Identifier: Apache-2.0
"""GLUE tasks from their TSV files: reading, tokens, batches, and the metrics of the benchmark.

Files are `train.tsv` and `dev.tsv`, plain or with `.gz`, as GLUE ships them.
"""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """Where a task's columns are, and how it is scored.

    Attributes:
        sentences: columns of the one or two sentences.
        label: column of the label.
        labels: the classes, in the order of their numbers; empty for regression.
        metric: the first score of `scores`.
        header: whether the files have a first line with names.
    """

    sentences: tuple[int, ...]
    label: int
    labels: tuple[str, ...]
    metric: str = "accuracy"
    header: bool = True

    @property
    def outputs(self) -> int:
        return len(self.labels) or 1


TASKS = {
    "sst2": Task((0,), 1, ("0", "1")),
    "cola": Task((3,), 1, ("0", "1"), metric="matthews", header=False),
    "mrpc": Task((3, 4), 0, ("0", "1")),
    "rte": Task((1, 2), 3, ("entailment", "not_entailment")),
    "stsb": Task((7, 8), 9, (), metric="pearson"),
}


class Examples(NamedTuple):
    """Token ids and segment ids of every example, and its label (a float for regression)."""

    ids: list[list[int]]
    segments: list[list[int]]
    labels: list[float]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def batch(self, indices: Sequence[int], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """input_ids, token_type_ids and attention_mask [batch, longest] int64, and labels [batch]."""
        longest = max(len(self.ids[i]) for i in indices)

        def padded(rows: list[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

        ids = [self.ids[i] for i in indices]
        return {
            "input_ids": padded(ids, pad),
            "token_type_ids": padded([self.segments[i] for i in indices], 0),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": torch.tensor([self.labels[i] for i in indices], device=device),
        }


def read_rows(folder: str | Path, split: str) -> list[list[str]]:
    """Lines of `split`.tsv or `split`.tsv.gz, split at tabs and nowhere else, the header included.

    Raises:
        FileNotFoundError: if the folder has neither.
    """
    for path in (Path(folder) / f"{split}.tsv", Path(folder) / f"{split}.tsv.gz"):
        if path.exists():
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return [line.split("\t") for line in text.decode("utf-8-sig").split("\n") if line]
    raise FileNotFoundError(f"{folder} has neither {split}.tsv nor {split}.tsv.gz; give the folder of a GLUE task")


def read_examples(folder: str | Path, split: str, task: Task, tokenizer: Any, max_length: int) -> Examples:
    """Tokens of a split, cut to `max_length`; longer pairs lose tokens of their longer sentence first."""
    rows = read_rows(folder, split)[task.header :]
    first, *second = ([row[column].strip() for row in rows] for column in task.sentences)
    encoded = tokenizer(first, *second, truncation=True, max_length=max_length, return_token_type_ids=True)
    number = {name: float(i) for i, name in enumerate(task.labels)}
    texts = [row[task.label].strip() for row in rows]
    labels = [number[text] if number else float(text) for text in texts]
    if task.labels:
        labels = [int(label) for label in labels]
    return Examples(encoded["input_ids"], encoded["token_type_ids"], labels)


@torch.no_grad()
def predict(
    logits: Callable[[dict[str, Tensor]], Tensor],
    examples: Examples,
    pad: int,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits of every example, in order; batches hold examples of similar length."""
    order = sorted(range(len(examples.ids)), key=lambda i: len(examples.ids[i]))
    parts = [
        logits(examples.batch(order[i : i + batch_size], pad, device)).float().cpu()
        for i in range(0, len(order), batch_size)
    ]
    result = torch.cat(parts)
    return result[torch.tensor(order).argsort()]


def scores(task: Task, logits: Tensor, labels: Sequence[float]) -> dict[str, float]:
    """The metrics of GLUE in percent, the task's own first: accuracy, matthews and f1, or pearson and spearman."""
    target = torch.tensor(labels, dtype=torch.float64)
    if not task.labels:
        value = logits.squeeze(-1).double()
        return {"pearson": _correlation(value, target), "spearman": _correlation(_ranks(value), _ranks(target))}
    guess = logits.argmax(-1).double()
    hits, found, wanted = (guess * target).sum(), guess.sum(), target.sum()
    accuracy = {"accuracy": 100 * (guess == target).double().mean().item()}
    if len(task.labels) != 2:
        return accuracy
    f1 = 200 * (hits / (found + wanted).clamp_min(1)).item()
    values = {**accuracy, "matthews": _correlation(guess, target), "f1": f1}
    return {task.metric: values[task.metric], **values}


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    length = a.norm() * b.norm()
    return 100 * ((a @ b) / length).item() if length > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks, ties sharing their mean."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[group].double()
