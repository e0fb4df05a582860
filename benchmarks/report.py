# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the table on the terminal, the JSON file, and the README's performance section."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitmill import __version__
from bitmill.cli import cpu_name
from bitmill.ops import _machine

from . import gpu
from .peaks import UNITS, Peaks
from .runner import Family, Row
from .shapes import REPOSITORY

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def disturbed(rows: Sequence[Row]) -> float:
    """Share of all samples that were thrown away because another process interrupted them."""
    total = sum(row.samples + row.disturbed for row in rows)
    return sum(row.disturbed for row in rows) / total if total else 0.0


def machine(threads: int, peaks: Peaks, command: str) -> dict[str, Any]:
    """Everything that a number depends on."""
    return {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if peaks.device == "cuda" else None,
        "instruction_set": _machine.instruction_set(),
        "platform": platform.platform(),
        "date": datetime.date.today().isoformat(),
        "bitmill": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "threads": threads,
        "command": command,
        "peaks": {unit: peaks.rate(unit) for unit in peaks.units},
    }


def commit() -> str:
    """The commit, with "+changes" if the working tree differs from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def number(value: float | None, digits: int = 1) -> str:
    """`digits` decimals below 100, none from there on; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:,.{digits if abs(value) < 100 else 0}f}"


# Column, its width, and the terminal that it needs.
HEADS = (
    ("us", 9, 0),
    ("quartiles", 15, 120),
    ("x fp32", 7, 0),
    ("x bf16", 7, 0),
    ("x int8", 7, 0),
    ("x one thread", 12, 0),
    ("GMAC/s", 7, 0),
    ("GB/s", 6, 100),
    ("%", 4, 0),
)


def cells(row: Row) -> tuple[str, ...]:
    return (
        number(row.microseconds),
        f"{number(row.low)}..{number(row.high)}",
        number(row.x_fp32, 2),
        number(row.x_bf16, 2),
        number(row.x_int8, 2),
        number(row.x_one_thread, 2),
        number(row.gmacs),
        number(row.gigabytes),
        number(row.percent_of_peak, 0),
    )


def table(family: Family, rows: Sequence[Row], width: int | None = None) -> str:
    """One family as aligned text that fits `width` (default: the terminal's); some columns need a wide one."""
    width = max(80, width or shutil.get_terminal_size((120, 24)).columns)
    empty = () if any(row.x_one_thread for row in rows) else ("x one thread",)
    keep = [i for i, (head, _, needed) in enumerate(HEADS) if width >= needed and head not in empty]
    fixed = sum(HEADS[i][1] + 1 for i in keep) + len("  popcount, cold")
    names = min(max(len(row.variant) for row in rows), width - fixed)

    def line(first: str, values: Sequence[str], last: str = "") -> str:
        first = first if len(first) <= names else first[: names - 1] + "…"
        text = " ".join(f"{values[i]:>{HEADS[i][1]}}" for i in keep)
        return f"  {first:<{names}} {text} {last}".rstrip()

    lines = [f"{family.name}: {family.title}", line("", [head for head, _, _ in HEADS])]
    shape = None
    for row in rows:
        if shape != (row.m, row.n, row.k):
            shape = (row.m, row.n, row.k)
            size = f"{row.m} x {row.n} x {row.k}" if family.macs else f"{row.m} x {row.k}"
            lines.append(f"{size}, {row.problem}")
        if row.status != "ok":
            lines.append(f"  {row.variant}: {row.status}"[:width])
            continue
        lines.append(line(row.variant, cells(row), f"{row.bound or ''}{', cold' if row.cold else ''}"))
    return "\n".join(lines)


LEGEND = """\
us: median, and quartiles, of interleaved rounds. x fp32, x bf16, x int8: times faster than torch's F.linear (attention:
scaled_dot_product_attention, conv: conv2d) in that dtype and than torch._int_mm, in the same run. x one thread: than
the same on one thread, in the same run. %: of the peak named beside it, measured between the rounds.
cold: weights come from memory (copies of more than 200 MB in rotation), for every variant.
{where}; peaks at the start of the run:
{peaks}"""


def legend(facts: dict[str, Any]) -> str:
    peaks, units = facts["peaks"], gpu.UNITS if facts.get("gpu") else UNITS

    def rate(unit: str) -> str:
        if not peaks[unit]:
            return f"{unit}: none on this machine"
        scale = "GB/s" if unit in ("read", "copy") else "GMAC/s"
        return f"{unit}: {peaks[unit] / 1e9:,.0f} {scale}, {units[unit]}"

    where = "Calls from a CUDA graph" if facts.get("gpu") else f"{facts['threads']} thread(s)"
    return LEGEND.format(where=where, peaks="\n".join(f"  {rate(unit)}" for unit in units))


def as_json(facts: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    return {**facts, "rows": [dataclasses.asdict(row) for row in rows]}


def from_json(*runs: dict[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """The facts of the first run, the commands and rows of all.

    Raises ValueError for runs of different machines, versions or threads.
    """
    for key in ("cpu", "gpu", "torch", "threads", "instruction_set"):
        if len({run.get(key) for run in runs}) > 1:
            raise ValueError(f"runs reported together must have the same {key}, got {[run.get(key) for run in runs]}")
    rows = [Row(**row) for run in runs for row in run["rows"]]
    facts = {key: value for key, value in runs[0].items() if key != "rows"}
    return {**facts, "command": "; ".join(dict.fromkeys(run["command"] for run in runs))}, rows


# Columns of the README's first table: family and variant.
LAYERS = {
    "1 bit x 1 bit": ("w1a1", "binary"),
    "1 bit x int8": ("w1a8", "binary int8"),
    "1 bit x float32": ("w1a32", "binary weight"),
    "salient 10 %, int8": ("salient", "salient 10 % int8"),
    "FP4, int8": ("fp4", "e2m1 int8"),
    "FP4, bfloat16": ("fp4", "e2m1, bfloat16"),
    "MXFP4, bfloat16": ("fp4", "mxfp4, bfloat16"),
}


def markdown(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """The README section between the markers: speed-ups of the layers, and the engines side by side."""
    found = {(row.family, row.variant, row.m, row.n, row.k): row for row in rows if row.status == "ok"}
    shapes = list(dict.fromkeys((row.m, row.n, row.k) for row in rows if row.family in ("w1a1", "w1a32", "fp4")))
    layers = {head: key for head, key in LAYERS.items() if any((*key, *shape) in found for shape in shapes)}
    lines = [
        f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}, torch {facts['torch']}, bitmill"
        f" {facts['bitmill']} ({facts['commit']}), {facts['date']}; `{facts['command']}`.",
        "",
        "Times faster than `F.linear` in float32, in the same run; bfloat16 and int8 product are torch's own.",
        "",
        "| M x N x K | " + " | ".join(("float32, us", "bfloat16", "int8 product", *layers)) + " |",
        "|---" * (4 + len(layers)) + "|",
    ]
    for shape in shapes:
        base = next((found[key] for f in ("w1a1", "w1a32", "fp4") if (key := (f, "torch fp32", *shape)) in found), None)
        if base is None:
            continue
        torch_rows = [found.get((base.family, name, *shape)) for name in ("torch bf16", "torch int8 (_int_mm)")]
        ours = [found.get((*key, *shape)) for key in layers.values()]
        ratios = [number(row.x_fp32 if row else None) for row in (*torch_rows, *ours)]
        title = " x ".join(map(str, shape)) + (" (cold)" if base.cold else "")
        lines.append(f"| {title} | " + " | ".join((number(base.microseconds), *ratios)) + " |")
    lines += ["", "(cold): the weights come from memory, as in a large model, for every column.", ""]
    lines += engines(rows)
    lines += ["![times faster than F.linear in float32](benchmarks/plots/speedup.png)"]
    return "\n".join(lines)


ENGINE_SHAPES = ((128, 768, 768), (128, 768, 3072), (32, 4096, 4096), (1, 4096, 4096))


def engines(rows: Sequence[Row]) -> list[str]:
    """Our best against each other engine, in microseconds; nothing if none was timed."""
    lines = []
    for family, what in (("product", "1-bit product"), ("w1a1", "1-bit layer"), ("fp4", "4-bit layer")):
        for shape in ENGINE_SHAPES:
            here = [r for r in rows if r.family == family and (r.m, r.n, r.k) == shape and r.microseconds]
            peers = sorted((r for r in here if r.origin == "peer"), key=lambda r: r.microseconds or 0.0)
            ours = [r for r in here if r.origin == "bitmill" and peers and r.cold == peers[0].cold]
            if peers and ours:
                best = min(ours, key=lambda r: r.microseconds or 0.0)
                size = " x ".join(map(str, shape)) + (" (cold)" if best.cold else "")
                others = ", ".join(f"{r.variant} {number(r.microseconds)}" for r in peers)
                times = number((peers[0].microseconds or 0.0) / (best.microseconds or 1.0))
                lines.append(f"| {what} | {size} | {best.variant} {number(best.microseconds)} | {times} | {others} |")
    if lines:
        lines[:0] = ["| microseconds | M x N x K | bitmill | x best other | other engines |", "|---|---|---|---|---|"]
        lines.append("")
    return lines


def rewrite_readme(text: str, section: str) -> str:
    """`text` with `section` between the markers; raises ValueError without exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README must have one {BEGIN} and, after it, one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def write_readme(section: str, path: Path = REPOSITORY / "README.md") -> None:
    path.write_text(rewrite_readme(path.read_text(), section))
