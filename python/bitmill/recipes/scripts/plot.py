# SPDX-License-Identifier: Apache-2.0
"""A table and, with --plot, a plot of runs, from their folders' logs and results.

    python -m bitmill.recipes.scripts.plot RUNS/bibert RUNS/bit-multi --plot accuracy.png

A folder's stages (`w1a2` of a multi-distilled run) come before it on the same line of the plot.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ... import strict_json


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Lines of the log that have scores; steps and seconds of earlier stages are added to those of later ones."""
    found: list[dict[str, Any]] = []
    for log in [*sorted(folder.glob("*/log.jsonl")), folder / "log.jsonl"]:
        if not log.exists():
            continue
        last = found[-1] if found else {"step": 0, "seconds": 0.0}
        lines = [strict_json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if "best" in line:
                total = {key: line[key] + last[key] for key in ("step", "seconds")}
                found.append({**line, **total, "metric": next(k for k in line if k not in ("step", "seconds"))})
    return found


def table(folders: list[Path]) -> str:
    """Markdown: steps, minutes, the best score of a run, that of its packed model, and the packed file's size."""
    rows = ["| run | steps | minutes | best | packed | bits a weight | file |", "|---|---|---|---|---|---|---|"]
    for folder in folders:
        lines, path = evaluations(folder), folder / "result.json"
        if not lines:
            continue
        result = strict_json.read(path) if path.exists() else {}
        last = lines[-1]
        packed = f"{result['packed'][last['metric']]:.1f}" if "packed" in result else "-"
        bits = f"{result['bits_per_weight']:.3f}" if "packed" in result else "-"
        size = f"{result['file_bytes'] / 2**20:.2f} MiB" if "packed" in result else "-"
        best = f"{last['best']:.1f} {last['metric']}"
        rows.append(
            f"| {folder.name} | {last['step']} | {last['seconds'] / 60:.0f} | {best} | {packed} | {bits} | {size} |"
        )
    return "\n".join(rows)


def plot(folders: list[Path], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for folder in folders:
        lines = evaluations(folder)
        if lines:
            axes.plot([e["step"] for e in lines], [e[e["metric"]] for e in lines], marker=".", label=folder.name)
            axes.set_ylabel(f"{lines[-1]['metric']} on dev, %")
    axes.set_xlabel("steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="A table and a plot of runs.")
    p.add_argument("folders", nargs="+", type=Path, help="folders of runs")
    p.add_argument("--plot", default=None, help="file to draw the scores over steps into; needs matplotlib")
    args = p.parse_args(argv)
    print(table(args.folders))
    if args.plot is not None:
        plot(args.folders, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
