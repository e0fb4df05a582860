# SPDX-License-Identifier: Apache-2.0
"""Train a BiT from its full-precision teacher, at once or by way of 2-bit activations, pack it, and score it.

    python -m bitmill.recipes.scripts.bit --data SST-2 --teacher teacher --out bit --schedule multi

"multi" spends half of the epochs on a student with 2-bit activations, in the folder `w1a2`, which is the start and the
teacher of the binary one; "single" all of them on the binary student.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import strict_json
from .. import bit
from ..bibert import outputs_of
from .common import Batch, export, load_model, parser, read_splits, start, train


def distillation(student: Any, teacher: Any) -> Callable[[Batch], Tensor]:
    teacher.train()  # as published: with its dropout

    def loss(batch: Batch) -> Tensor:
        del batch["labels"]
        with torch.no_grad():
            theirs = outputs_of(teacher, batch)
        return bit.distillation_loss(outputs_of(student, batch), theirs)

    return loss


def main(argv: list[str] | None = None) -> int:
    p = parser("Train a BiT from its full-precision teacher.", lr=1e-4, epochs=10)
    p.add_argument("--teacher", required=True, help="folder that scripts.finetune wrote")
    p.add_argument("--schedule", default="multi", choices=("single", "multi"), help="precisions on the way")
    args = p.parse_args(argv)
    task = start(args)
    teacher, tokenizer = load_model(args.teacher, task)
    examples = read_splits(args, task, tokenizer)
    stages = {"multi": (("w1a2", 2), (".", 1)), "single": ((".", 1),)}[args.schedule]
    for folder, bits in stages:
        student, _ = load_model(args.teacher, task)
        bit.binarize_(student, bits)
        if folder != stages[0][0]:
            bit.successor(student, teacher)
        place = Path(args.out) / folder
        loss = distillation(student, teacher.to(args.device))
        train(args, task, student, loss, examples, place, args.epochs / len(stages), bit.STEP_LR)
        teacher = student
    print(strict_json.dumps(export(args, task, teacher, examples, tokenizer)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
