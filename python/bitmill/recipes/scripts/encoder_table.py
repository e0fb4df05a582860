# SPDX-License-Identifier: Apache-2.0
"""One encoder of texts or images with 4-bit weights, and 4-bit activations, in every format: score, bits, bytes.

    python -m bitmill.recipes.scripts.encoder_table --model MiniLM --calibration train.gz --task stsb --data STS-B \
        --out table

Each row is a run of `bitmill quantize` in a folder of its own under `--out`, and of `bitmill eval --task`. What is
finished is not done again. "cosine" is the mean, over the examples, of the cosine between a row's outputs (embeddings
of sentences, or logits) and those of the float32 model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ... import strict_json
from ..encoder_folder import TASKS, evaluate
from ..language_folder import Settings, open_folder, quantize_folder
from .language_table import ORIGINAL, asked_of, float_facts, known_row
from .language_table import ROWS as LANGUAGE_ROWS

ROWS = {
    name: options
    for name, options in LANGUAGE_ROWS.items()
    if name == ORIGINAL or options.get("method") in ("fp4", "llm-fp4", "nf4", "bnb-fp4", "nvfp4", "mxfp4")
}
HEAD = f"| {'':<19} | {'score':>6} | {'cosine':>7} | {'bits':>5} | {'file, MB':>8} |"
RULE = f"| {'-' * 19} | {'-' * 5}: | {'-' * 6}: | {'-' * 4}: | {'-' * 7}: |"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Quantise an encoder to every 4-bit format, and measure what is left.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--model", required=True, help="folder of the model")
    p.add_argument("--calibration", required=True, help="text, or folder of an image set, to calibrate on")
    p.add_argument("--task", required=True, choices=TASKS, help="to score")
    p.add_argument("--data", required=True, help="folder of the task")
    p.add_argument("--out", required=True, type=Path, help="folder of the table")
    p.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS], metavar="ROW", help=f"of {', '.join(ROWS)}")
    p.add_argument("--windows", type=int, default=64, help="windows or images to calibrate on")
    p.add_argument("--length", type=int, default=128, help="tokens of every window")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; the default is torch's")
    return p


def measure(
    args: argparse.Namespace, name: str, asked: dict[str, Any], wanted: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """The row, from its file if that is there and of what is asked, and the outputs of float32, which `wanted` are for
    other rows."""
    file = args.out / f"{name}.json"
    if wanted is not None and (row := known_row(file, asked)) is not None:
        return row, wanted
    if name == ORIGINAL:
        model, tokenizer = open_folder(args.model)
        facts = float_facts(model)
    else:
        settings = Settings(**ROWS[name], windows=args.windows, length=args.length)
        facts = quantize_folder(args.model, args.out / name, settings, args.calibration)
        model, tokenizer = open_folder(args.out / name)
    found = evaluate(model, tokenizer, args.task, args.data)
    wanted = found.outputs if wanted is None else wanted
    cosine = cosine_similarity(found.outputs.double(), wanted.double()).mean().item()
    row = {"name": name, "asked": asked, **facts, **found.scores, "score": next(iter(found.scores.values()))}
    row["cosine"] = cosine
    strict_json.write(file, row)
    return row, wanted


def render(row: dict[str, Any]) -> str:
    return (
        f"| {row['name']:<19} | {row['score']:6.2f} | {row['cosine']:7.4f} | {row['bits_per_weight']:5.2f} |"
        f" {row['file_bytes'] / 1e6:8.1f} |"
    )


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    asked = asked_of(args, ("windows", "length", "task"), ("calibration", "data"))
    _, wanted = measure(args, ORIGINAL, asked, None)
    print(HEAD, RULE, sep="\n", flush=True)
    for name in args.rows:
        row, _ = measure(args, name, asked, wanted)
        print(render(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
