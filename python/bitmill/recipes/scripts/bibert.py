# SPDX-License-Identifier: Apache-2.0
"""Train a BiBERT from its full-precision teacher, pack it, and score the packed model.

    python -m bitmill.recipes.scripts.bibert --data SST-2 --teacher teacher --out bibert

Variants: "bibert"; "no-dmd" with mean squared errors of hidden states instead of direction matching; "baseline" with
the sign of the softmax besides, the fully binarized baseline of the paper; "naive" with signs that are not centred
besides, trained on the labels alone; "threshold" like it, with the softmax thresholded at one half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import strict_json
from ...integrations.transformers import Projections
from .. import bibert
from .common import Batch, export, load_model, parser, read_splits, start, train

VARIANTS = {  # attention, method, what is distilled
    "bibert": ("bool", "bibert", "directions"),
    "no-dmd": ("bool", "bibert", "hidden"),
    "baseline": ("sign_softmax", "bibert", "hidden"),
    "naive": ("sign_softmax", "sign", "nothing"),
    "threshold": ("thresholded_softmax", "sign", "nothing"),
}


def main(argv: list[str] | None = None) -> int:
    p = parser("Train a BiBERT from its full-precision teacher.", lr=1e-4, epochs=10)
    p.add_argument("--teacher", required=True, help="folder that scripts.finetune wrote")
    p.add_argument("--variant", default="bibert", choices=tuple(VARIANTS), help="what is left out")
    args = p.parse_args(argv)
    task = start(args)
    attention, method, distilled = VARIANTS[args.variant]
    matching = distilled == "directions"
    (teacher, tokenizer), (student, _) = load_model(args.teacher, task), load_model(args.teacher, task)
    examples = read_splits(args, task, tokenizer)
    bibert.binarize_(student, attention, method)
    teacher.to(args.device).eval()
    inner = [Projections(model) if matching else None for model in (student, teacher)]

    def loss(batch: Batch) -> Tensor:
        labels = batch.pop("labels")
        if distilled == "nothing":
            return bibert.task_loss(student(**batch).logits, labels)
        ours = bibert.outputs_of(student, batch, inner[0])
        with torch.no_grad():
            theirs = bibert.outputs_of(teacher, batch, inner[1])
        return (bibert.direction_matching_loss if matching else bibert.mse_loss)(ours, theirs, labels)

    train(args, task, student, loss, examples)
    for projections in inner:
        if projections is not None:
            projections.remove()
    print(strict_json.dumps(export(args, task, student, examples, tokenizer)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
