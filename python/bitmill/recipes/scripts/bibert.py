# SPDX-License-Identifier: Apache-2.0
"""Train a BiBERT from its full-precision teacher, pack it, and score the packed model.

    python -m bitmill.recipes.scripts.bibert --data SST-2 --teacher teacher --out bibert

Variants: "bibert"; "no-dmd" with mean squared errors of hidden states instead of direction matching; "baseline" with
the sign of the softmax besides, the fully binarized baseline of the paper.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ...integrations.transformers import Projections
from .. import bibert
from .common import Batch, export, load_model, parser, read_splits, start, train

VARIANTS = {"bibert": ("bool", True), "no-dmd": ("bool", False), "baseline": ("sign_softmax", False)}


def main(argv: list[str] | None = None) -> int:
    p = parser("Train a BiBERT from its full-precision teacher.", lr=1e-4, epochs=10)
    p.add_argument("--teacher", required=True, help="folder that scripts.finetune wrote")
    p.add_argument("--variant", default="bibert", choices=tuple(VARIANTS), help="what is left out")
    args = p.parse_args(argv)
    task = start(args)
    attention, matching = VARIANTS[args.variant]
    (teacher, tokenizer), (student, _) = load_model(args.teacher, task), load_model(args.teacher, task)
    examples = read_splits(args, task, tokenizer)
    bibert.binarize_(student, attention)
    teacher.to(args.device).eval()
    inner = [Projections(model) if matching else None for model in (student, teacher)]

    def loss(batch: Batch) -> Tensor:
        labels = batch.pop("labels")
        ours = bibert.outputs_of(student, batch, inner[0])
        with torch.no_grad():
            theirs = bibert.outputs_of(teacher, batch, inner[1])
        return (bibert.direction_matching_loss if matching else bibert.mse_loss)(ours, theirs, labels)

    train(args, task, student, loss, examples)
    for projections in inner:
        if projections is not None:
            projections.remove()
    print(json.dumps(export(args, task, student, examples[1], tokenizer)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
