# SPDX-License-Identifier: Apache-2.0
"""How good an encoder in a folder is at a task: GLUE's for texts, image sets for images.

A text model with a classification head is scored as GLUE scores it. One without a head is scored by the similarities of
sentence embeddings, on a task whose labels are similarities (STS-B): an embedding is the mean of the last hidden states
of a sentence's tokens, a similarity the cosine of two.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.language import takes_images
from . import glue, images
from .language import random_windows, read_ids

IMAGES = "images"
TASKS = (*glue.TASKS, IMAGES)
BATCH = 64
MOST_TOKENS = 128  # of a sentence


def calibration_batches(
    path: str | os.PathLike[str], model: Any, tokenizer: Any, count: int, length: int, seed: int
) -> list[Any]:
    """Inputs of an encoder for calibration, drawn with `seed`.

    Args:
        path: a text of `read_ids`, or for a model of images a folder of `images.load_images`, whose training split is
            taken.
        count: windows of the text, or images.
        length: tokens of a window, special ones included.
    Raises:
        ValueError: for a text shorter than a window, or images of a size that the model does not take.
    """
    if takes_images(model):
        training, _ = images.load_images(Path(path))
        _require_size(model, training)
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
        return [training.batch(part)[0] for part in order[:count].split(BATCH)]
    first, last = ([token] if token is not None else [] for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    windows = random_windows(read_ids(path, tokenizer), count, length - len(first) - len(last), seed)
    return [torch.cat([w.new_tensor([first]), w, w.new_tensor([last])], 1) for w in windows]


def _require_size(model: Any, of: images.Images) -> None:
    wanted, got = model.config.image_size, list(of.pixels.shape[-2:])
    if got != [wanted, wanted]:
        raise ValueError(f"the images must have the {wanted} x {wanted} pixels that the model takes, got {got}")


class Found(NamedTuple):
    """Scores in percent, the task's own first, and how many examples; and what they were taken from: logits
    [n, classes], or embeddings of sentences [2 n, hidden]."""

    scores: dict[str, float]
    outputs: Tensor


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, task: str, data: str | os.PathLike[str]) -> Found:
    """Score a model on the task's dev split, or an image set's test split.

    Args:
        model: in eval mode, with its tokenizer, as `open_folder` answers them.
        task: of `TASKS`.
        data: the folder of the GLUE task, or of the image set.
    Raises:
        ValueError: for another task, or one that the model has no outputs for.
        FileNotFoundError: if the folder does not hold the data.
    """
    if task not in TASKS:
        raise ValueError(f"eval: task must be one of {', '.join(TASKS)}, got {task!r}")
    if takes_images(model) != (task == IMAGES):
        raise ValueError(f"eval: a model of {'images' if takes_images(model) else 'texts'} has no outputs for {task}")
    if task == IMAGES:
        _, test = images.load_images(Path(data))
        _require_size(model, test)
        logits = images.logits_of(lambda x: model(pixel_values=x).logits, test, BATCH)
        return Found({"accuracy": images.accuracy(logits, test), "examples": len(test)}, logits)
    chosen = glue.TASKS[task]
    if _has_head(model):
        if model.config.num_labels != chosen.outputs:
            raise ValueError(f"eval: {task} needs {chosen.outputs} outputs, the model has {model.config.num_labels}")
        found = _examples(data, chosen, model, tokenizer)
        outputs = glue.predict(lambda batch: model(**batch).logits, found, tokenizer.pad_token_id or 0, BATCH)
        return Found(_scores(chosen, outputs, found), outputs)
    if chosen.labels or len(chosen.sentences) != 2:
        raise ValueError(f"eval: {task} needs a model with a classification head; one without takes stsb")
    sides = [dataclasses.replace(chosen, sentences=(column,)) for column in chosen.sentences]
    pair = [_examples(data, side, model, tokenizer) for side in sides]
    a, b = (_embeddings(model, tokenizer, examples) for examples in pair)
    similarities = nn.functional.cosine_similarity(a, b).unsqueeze(-1)
    return Found(_scores(chosen, similarities, pair[0]), torch.cat((a, b)))


def _scores(task: glue.Task, logits: Tensor, of: glue.Examples) -> dict[str, float]:
    return {**glue.scores(task, logits, of.labels), "examples": len(of.labels)}


def _has_head(model: Any) -> bool:
    """Whether a text model answers logits."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _examples(data: str | os.PathLike[str], task: glue.Task, model: Any, tokenizer: Any) -> glue.Examples:
    most = min(MOST_TOKENS, model.config.max_position_embeddings)
    return glue.read_examples(Path(data), "dev", task, tokenizer, most)


def _embeddings(model: Any, tokenizer: Any, examples: glue.Examples) -> Tensor:
    """The mean of the last hidden states of every example's tokens, float32 [n, hidden]."""

    def mean(batch: dict[str, Tensor]) -> Tensor:
        del batch["labels"]
        mask = batch["attention_mask"].unsqueeze(-1)
        return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)

    return glue.predict(mean, examples, tokenizer.pad_token_id or 0, BATCH)
