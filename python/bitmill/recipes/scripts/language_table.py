# SPDX-License-Identifier: Apache-2.0
"""One causal language model quantised in every way: perplexity, bits a weight, bytes, speed and memory.

    python -m bitmill.recipes.scripts.language_table --model smollm2.gguf --calibration valid.gz --text test.gz \
        --out table

Each row is a run of `bitmill quantize` in a folder of its own under `--out`, and of `bitmill eval`. What is finished is
not done again, so a table that was stopped, or that gets more rows, goes on. `--int8` measures the perplexity with int8
activations too, where layers can have them. `--speed` then measures tokens a second and peak memory of the rows,
against the float32 model in the same run, and again whenever it is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import FP4Config, strict_json
from ...bench.folders import measure as measure_folders
from ...bench.folders import takes_int8
from ...bench.language import DEFAULT_TOKENS, FLOAT32
from ...integrations.language import read_pretrained
from ..language_folder import (
    Settings,
    digest_of_data,
    digest_of_model,
    evaluate_folder,
    open_folder,
    quantize_folder,
)

FRACTIONS = (50, 30, 20, 10, 5)
PB_LLM: dict[str, dict[str, str]] = {
    "rtn": {"rounding": "rtn", "metric": "magnitude"},
    "gptq-magnitude": {"rounding": "gptq", "metric": "magnitude"},
    "gptq-hessian": {"rounding": "gptq", "metric": "hessian"},
}
# With activations of 4 bits too.
LLM_FP4: dict[str, dict[str, Any]] = {
    "int4-a4": {"search": "minmax", "format": "e1m2", "shift": False},
    "fp4-a4": {"search": "minmax", "shift": False},
    "llm-fp4-baseline-a4": {"shift": False},
    "llm-fp4-a4": {},
    "llm-fp4-paper-a4": {"search": "paper"},
}
ORIGINAL = "float32"
ROWS: dict[str, dict[str, Any]] = {
    ORIGINAL: {},
    "fp4": {"method": "fp4"},  # E2M1 by the largest magnitude of a row
    "int4": {"method": "fp4", "format": "e1m2"},  # whose values are -7 ... 7
    "llm-fp4": {"method": "llm-fp4"},
    **{name: {"method": "llm-fp4", "activations": "fp4", **options} for name, options in LLM_FP4.items()},
    "nf4": {"method": "nf4"},
    "bnb-fp4": {"method": "bnb-fp4"},
    "nvfp4": {"method": "nvfp4"},
    "nvfp4-a4": {"method": "nvfp4", "activations": "fp4"},
    **{f"mxfp4-{rule}": {"method": "mxfp4", "scale_rule": rule} for rule in FP4Config.SCALE_RULES},
    **{
        f"mxfp4-{rule}-a4": {"method": "mxfp4", "scale_rule": rule, "activations": "fp4"}
        for rule in FP4Config.SCALE_RULES
    },
    "pb-llm-100-rtn": {"salient": 1.0, "structure": "column", **PB_LLM["rtn"]},
    **{
        f"pb-llm-{percent}-{way}": {"salient": percent / 100, **options}
        for way, options in PB_LLM.items()
        for percent in FRACTIONS
    },
    "billm": {"method": "billm"},
    "arb-rc": {"method": "arb-rc"},
}


class Family(NamedTuple):
    """Rows that look alike in the plot: those whose names end in `way`, or in one of several."""

    name: str
    way: str | tuple[str, ...]
    marker: str
    colour: str
    side: str  # of a point where its label stands, or "column"

    def label(self, row: str) -> str:
        """The salient percentage, or the name of the format, or the family's."""
        if row.startswith("pb-llm"):
            return f"{row.split('-')[2]} %"
        return self.name if isinstance(self.way, str) else row


FOUR_BITS = ("fp4", "nf4", "int4", *(f"mxfp4-{rule}" for rule in FP4Config.SCALE_RULES))
# The sides keep labels apart: at one file size the three of PB-LLM stand in this order, from above. 4-bit formats are
# too close to each other for that, and share a column.
FAMILIES = (
    Family("PB-LLM, rounded", "-rtn", "o", "tab:blue", "above"),
    Family("PB-LLM, GPTQ, by magnitude", "-gptq-magnitude", "s", "tab:orange", "right"),
    Family("PB-LLM, GPTQ, by the Hessian", "-gptq-hessian", "^", "tab:green", "below"),
    Family("4-bit weights", FOUR_BITS, "D", "tab:purple", "column"),
    Family("activations of 4 bits too", ("-a4",), "X", "tab:pink", "column"),
    Family("BiLLM", "billm", "v", "tab:red", "left"),
    Family("ARB-RC", "arb-rc", "P", "tab:brown", "left"),
)
# Where a label stands, in points from its point, and how it is aligned there.
SIDES = {
    "above": ((2, 6), "left", "bottom"),
    "below": ((-2, -6), "right", "top"),
    "left": ((-8, 0), "right", "center"),
    "right": ((7, 2), "left", "bottom"),
}
LABEL = 8  # points high
# Columns and their widths, at least.
COLUMNS = {
    "": 24,
    "perplexity": 10,
    "bits": 5,
    "file, MB": 8,
    "CPU min": 7,
    "prompt/s": 12,
    "decode/s": 11,
    "peak, MB": 8,
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
    p.add_argument("--int8", action="store_true", help="measure perplexities with int8 activations too")
    p.add_argument(
        "--speed", action="store_true", help="measure speed and peak memory of the rows, or measure them again"
    )
    p.add_argument("--prompt", type=int, default=DEFAULT_TOKENS, help="tokens of the prompt that is timed")
    p.add_argument("--plot", type=Path, default=None, help="PNG of perplexity over file size; needs matplotlib")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; the default is torch's")
    return p


def asked_of(args: argparse.Namespace, settings: tuple[str, ...], data: tuple[str, ...]) -> dict[str, Any]:
    """What makes the rows what they are: the values of settings, and the contents of the model and of the data."""
    return {
        **{name: getattr(args, name) for name in settings},
        "model": digest_of_model(Path(args.model)),
        **{name: digest_of_data(Path(getattr(args, name))) for name in data},
    }


def known_row(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a file, if it is of what is asked; rows of earlier versions name no contents."""
    row = strict_json.read(file) if file.exists() else None
    return row if row is not None and {**asked, **row["asked"]} == asked else None


def measure(args: argparse.Namespace, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The row: from its file if that is there and of what is asked, otherwise it is made."""
    if (row := known_row(args.out / f"{name}.json", asked)) is not None:
        return row
    if name == ORIGINAL:
        folder, facts = args.model, float_facts(read_pretrained(args.model).model)
    else:
        folder = args.out / name
        settings = Settings(**ROWS[name], windows=args.windows, length=args.length)
        facts = quantize_folder(args.model, folder, settings, args.calibration)
    found = evaluate_folder(folder, args.text, args.length, windows=args.eval_windows)
    row = {"name": name, "asked": asked, **facts, **found}
    _write(args.out, row)
    return row


def measure_int8(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Put the perplexity with int8 activations into the row and its file, None where there is no choice of them."""
    folder = args.out / row["name"]
    row["int8_perplexity"] = None
    if row["name"] != ORIGINAL and takes_int8(open_folder(folder).model):
        found = evaluate_folder(folder, args.text, args.length, windows=args.eval_windows, activations="int8")
        row["int8_perplexity"] = found["perplexity"]
    _write(args.out, row)


def _write(out: Path, row: dict[str, Any]) -> None:
    strict_json.write(out / f"{row['name']}.json", row)


def float_facts(model: nn.Module) -> dict[str, Any]:
    """Of a model that is not quantised, what `quantize_folder` answers of others."""
    return {"file_bytes": sum(p.nbytes for p in model.parameters()), "bits_per_weight": 32.0, "cpu_seconds": 0.0}


def measure_speeds(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Put what `bench.folders.measure` finds into the rows and their files, under the key "inference"."""
    named = {FLOAT32 if row["name"] == ORIGINAL else row["name"]: row for row in rows}
    folders = {name: args.out / name for name in named if name != FLOAT32}
    for group in measure_folders(args.model, folders, args.prompt, progress=True):
        for name in [name for name in group if name in named]:
            named[name]["inference"] = group[name]
            _write(args.out, named[name])
            report(named[name])
        if (disturbed := group[FLOAT32]["disturbed"]) > 0.2:
            print(f"Other processes interrupted {100 * disturbed:.0f} % of the samples: better run it alone.")


def render(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, and below it how its speeds were measured, if they were."""
    lines = [[*COLUMNS], *(line for row in rows for line in _lines(row))]
    widths = [max(least, *map(len, cells)) for least, *cells in zip(COLUMNS.values(), *lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    table = [_join(line, widths) for line in (lines[0], rule, *lines[1:])]
    conditions = dict.fromkeys(_conditions(row["inference"]) for row in rows if "inference" in row)
    return "\n".join([*table, *(f"\n{text}" for text in conditions)])


def report(row: dict[str, Any]) -> None:
    """Print the row alone."""
    print("\n".join(_join(line, [*COLUMNS.values()]) for line in _lines(row)), flush=True)


def _join(cells: list[str], widths: list[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"


def _lines(row: dict[str, Any]) -> list[list[str]]:
    """The cells of the row, with the activations that it was made for, and those of a second line for int8 activations
    where they were measured."""
    found = row.get("inference", {})
    memory, int8, int8_perplexity = found.get("memory"), found.get("int8"), row.get("int8_perplexity")
    line = [
        row["name"],
        _perplexity(row["perplexity"]),
        f"{row['bits_per_weight']:.2f}",
        f"{row['file_bytes'] / 1e6:.1f}",
        f"{row['cpu_seconds'] / 60:.1f}" if row["cpu_seconds"] else "-",
        *_speeds(found.get("fp4") or found.get("float")),
        f"{memory['peak'] / 1e6:,.0f}" if memory else "-",
    ]
    if not int8 and not int8_perplexity:
        return [line]
    return [line, ["  int8 activations", _perplexity(int8_perplexity), *[""] * 3, *_speeds(int8), ""]]


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _speeds(found: dict[str, Any] | None) -> list[str]:
    """Tokens a second of the prompt and of the steps."""
    if found is None:
        return ["-", "-"]
    rates = found["prompt"], found["step"]
    return [f"{rate['per_second']:,.0f} ({rate['x_float32']:.1f}x)" for rate in rates]


def _conditions(found: dict[str, Any]) -> str:
    return textwrap.fill(
        f"prompt/s, decode/s: tokens a second of a prompt of {found['tokens']} and of {found['steps']} steps after it,"
        f" and how many times float32's that is, as transformers runs it, in the same run. peak: memory of loading and"
        f" of this, on top of Python, torch and transformers. {found['cpu']}, {found['threads']} thread(s), torch"
        f" {found['torch']}, transformers {found['transformers']}, bitmill {found['bitmill']}.",
        110,
    )


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Perplexity over file size: a labelled point a row, joined where only the salient fraction differs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row["name"] == ORIGINAL:
            label = f"{ORIGINAL}, {row['file_bytes'] / 1e6:.0f} MB"
            axes.axhline(row["perplexity"], color="0.5", linestyle="--", linewidth=1, label=label)
    column: list[Point] = []
    for family in FAMILIES:
        points = sorted(
            Point(row["file_bytes"] / 1e6, row["perplexity"], family.label(row["name"]), family.colour)
            for row in rows
            if row["name"].endswith(family.way) and math.isfinite(row["perplexity"])
        )
        if not points:
            continue
        sizes, values, *_ = zip(*points, strict=True)
        width = 1 if isinstance(family.way, str) and len(points) > 1 else 0
        axes.plot(sizes, values, marker=family.marker, color=family.colour, linewidth=width, label=family.name)
        if family.side == "column":
            column += points
        else:
            for point in points:
                _annotate(axes, point, *SIDES[family.side])
    axes.set(yscale="log", xlabel="file, MB", ylabel="perplexity, lower is better")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.1, y=0.08)
    axes.set_ylim(bottom=1)  # the least there is
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _annotate_column(figure, axes, column)
    figure.savefig(path, dpi=150)


class Point(NamedTuple):
    """Of the plot: megabytes, perplexity, and the label with its colour."""

    size: float
    value: float
    label: str
    colour: str


def _annotate(axes: Any, point: Point, offset: tuple[float, float], ha: str, va: str, **line: Any) -> None:
    """Write a label `offset` points beside its point; `line` is of the line between the two."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3}  # where lines cross the label
    style: dict[str, Any] = {"ha": ha, "va": va, "color": point.colour, "fontsize": LABEL, "bbox": box}
    axes.annotate(point.label, (point.size, point.value), offset, textcoords="offset points", **style, **line)


def _annotate_column(figure: Any, axes: Any, points: list[Point]) -> None:
    """Labels under each other to the left of all points, each as high as its point or as the label above lets it."""
    figure.draw_without_rendering()  # only then it is known where points are
    places = {point: axes.transData.transform((point.size, point.value)) * 72 / figure.dpi for point in points}
    lowest = math.inf
    for point in sorted(points, key=lambda point: -point.value):
        x, y = places[point]
        lowest = min(y, lowest - 1.2 * LABEL)
        offset = min(left for left, _ in places.values()) - 2.5 * LABEL - x, lowest - y
        line = {"arrowstyle": "-", "color": point.colour, "linewidth": 0.5, "shrinkA": 0, "relpos": (1, 0.5)}
        _annotate(axes, point, offset, "right", "center", arrowprops=line)


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    asked = asked_of(args, ("windows", "length", "eval_windows"), ("calibration", "text"))
    rows = []
    for name in args.rows:
        rows.append(measure(args, name, asked))
        if args.int8 and "int8_perplexity" not in rows[-1]:
            measure_int8(args, rows[-1])
        report(rows[-1])
    if args.speed:
        measure_speeds(args, rows)
    print(f"\n{render(rows)}")
    if args.plot is not None:
        plot(rows, args.plot, f"{Path(args.model).name} on {Path(args.text).name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
