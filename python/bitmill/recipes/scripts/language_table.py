# SPDX-License-Identifier: Apache-2.0
"""One causal language model quantised in every way: perplexity, bits a weight, bytes.

    python -m bitmill.recipes.scripts.language_table --model smollm2.gguf --calibration valid.gz --text test.gz \
        --out table

Each row is a run of `bitmill quantize` in a folder of its own under `--out`, and of `bitmill eval`. What is finished is
not done again, so a table that was stopped, or that gets more rows, goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...integrations.language import read_pretrained
from ..language_folder import Settings, evaluate_folder, quantize_folder

FRACTIONS = (50, 30, 20, 10, 5)
PB_LLM: dict[str, dict[str, str]] = {
    "rtn": {"rounding": "rtn", "metric": "magnitude"},
    "gptq-magnitude": {"rounding": "gptq", "metric": "magnitude"},
    "gptq-hessian": {"rounding": "gptq", "metric": "hessian"},
}
ORIGINAL = "float32"
ROWS: dict[str, dict[str, Any]] = {
    ORIGINAL: {},
    "fp4": {"method": "fp4"},
    "pb-llm-100-rtn": {"salient": 1.0, "structure": "column", **PB_LLM["rtn"]},
    **{
        f"pb-llm-{percent}-{way}": {"salient": percent / 100, **options}
        for way, options in PB_LLM.items()
        for percent in FRACTIONS
    },
    "billm": {"method": "billm"},
    "arb-rc": {"method": "arb-rc"},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Quantise a causal language model in every way, and measure what is left.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--model", required=True, help="folder of the model and its tokenizer, or GGUF file")
    p.add_argument("--calibration", required=True, help="text to calibrate on")
    p.add_argument("--text", required=True, help="text to measure the perplexity on")
    p.add_argument("--out", required=True, type=Path, help="folder of the table")
    p.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS], metavar="ROW", help=f"of {', '.join(ROWS)}")
    p.add_argument("--windows", type=int, default=64, help="windows to calibrate on")
    p.add_argument("--length", type=int, default=1024, help="tokens of every window")
    p.add_argument("--eval-windows", type=int, default=20, help="windows of the text to measure, one after another")
    p.add_argument("--plot", type=Path, default=None, help="PNG of perplexity over file size")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; the default is torch's")
    return p


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The row: from its folder if it is there, otherwise it is made."""
    file = args.out / f"{name}.json"
    asked = {"windows": args.windows, "length": args.length, "eval_windows": args.eval_windows}
    if file.exists() and (row := json.loads(file.read_text()))["asked"] == asked:
        return row
    if name == ORIGINAL:
        folder, facts = args.model, _float_facts(read_pretrained(args.model).model)
    else:
        folder = args.out / name
        settings = Settings(**ROWS[name], windows=args.windows, length=args.length)
        facts = quantize_folder(args.model, folder, settings, args.calibration)
    found = evaluate_folder(folder, args.text, args.length, windows=args.eval_windows)
    row = {"name": name, "asked": asked, **facts, **found}
    file.write_text(json.dumps(row, indent=1) + "\n")
    return row


def _float_facts(model: nn.Module) -> dict[str, Any]:
    return {"file_bytes": sum(p.nbytes for p in model.parameters()), "bits_per_weight": 32.0, "cpu_seconds": 0.0}


def render(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = ["| | perplexity | bits a weight | file, MB | CPU minutes |", "|---|---|---|---|---|"]
    for row in rows:
        value = row["perplexity"]
        text = f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if math.isfinite(value) else "inf"
        minutes = f"{row['cpu_seconds'] / 60:.1f}" if row["cpu_seconds"] else ""
        lines.append(
            f"| {row['name']} | {text} | {row['bits_per_weight']:.2f} | {row['file_bytes'] / 1e6:.1f} | {minutes} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over file size, a line for each way of rounding."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for way in PB_LLM:
        points = sorted(
            (row["file_bytes"] / 1e6, row["perplexity"])
            for row in rows
            if row["name"].endswith(way) and not row["name"].startswith("pb-llm-100")
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"PB-LLM, {way}") if points else None
    for row in rows:
        if not row["name"].startswith("pb-llm"):
            axes.plot(row["file_bytes"] / 1e6, row["perplexity"], "s", label=row["name"])
    axes.set(xscale="log", yscale="log", xlabel="file, MB", ylabel="perplexity")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.rows:
        rows.append(measure(args, name))
        print(render(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{render(rows)}")
    if args.plot is not None:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
