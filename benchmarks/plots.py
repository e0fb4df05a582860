# SPDX-License-Identifier: Apache-2.0
"""PNG plots of a run: a roofline with the measured peaks, and speed-ups over float32 by shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .report import LAYERS
from .runner import Row

TORCH = {"torch bfloat16": ("w1a1", "torch bf16"), "torch int8 product": ("w1a1", "torch int8 (_int_mm)")}
COLOURS = {"bitmill": "tab:blue", "kernel": "tab:cyan", "torch": "0.55", "peer": "tab:orange"}


def write(
    facts: dict[str, Any], rows: Sequence[Row], folder: Path, names: Sequence[str] = ("roofline", "speedup")
) -> list[Path]:
    """Write a PNG for each name; answers the paths. What has no rows is left out."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    done = [row for row in rows if row.status == "ok" and row.gmacs]
    paths = []
    for name in names:
        figure = {"roofline": roofline, "speedup": speedup}[name](facts, done)
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=90, bbox_inches="tight")
    return paths


def caption(facts: dict[str, Any]) -> str:
    return f"{facts['cpu']}, {facts['threads']} thread(s), torch {facts['torch']}, {facts['date']}"


def roofline(facts: dict[str, Any], rows: Sequence[Row]) -> Any:
    """GMAC/s against multiply-adds a byte: a slope for memory, a ceiling for each kind of arithmetic."""
    from matplotlib import pyplot

    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 6))
    intensity = [row.intensity for row in rows if row.intensity]
    x = np.geomspace(min(intensity) / 2, max(intensity) * 2, 200)
    peaks = facts["peaks"]
    for unit in ("popcount", "int8", "bf16", "fp32"):
        if peaks[unit]:
            axes.plot(x, np.minimum(peaks[unit], x * peaks["read"]) / 1e9, color="0.3", linewidth=0.8)
            axes.annotate(unit, (x[-1], peaks[unit] / 1e9), ha="right", va="bottom", fontsize=8)
    for origin, colour in COLOURS.items():
        for cold, marker in ((False, "o"), (True, "v")):
            mine = [row for row in rows if row.origin == origin and row.cold == cold]
            label = f"{origin}{', weights from memory' if cold else ''}"
            axes.scatter(
                [row.intensity for row in mine], [row.gmacs for row in mine], s=14, color=colour, marker=marker,
                label=label if mine else None, alpha=0.8,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds a byte", ylabel="GMAC/s")
    axes.set_title(f"Roofline with measured peaks\n{caption(facts)}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def speedup(facts: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Bars: times faster than F.linear in float32, for each shape, of torch's dtypes and bitmill's layers."""
    from matplotlib import pyplot

    found = {(row.family, row.variant, row.m, row.n, row.k): row for row in rows if row.x_fp32}
    series = {
        "torch bfloat16": ("w1a1", "torch bf16"),
        "torch int8 product": ("w1a1", "torch int8 (_int_mm)"),
        **LAYERS,
    }
    keys = set(series.values())
    shapes = list(dict.fromkeys((row.m, row.n, row.k) for row in found.values() if (row.family, row.variant) in keys))
    series = {name: key for name, key in series.items() if any((*key, *shape) in found for shape in shapes)}
    if not series:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(shapes) + 1))
    thickness = 0.84 / len(series)
    palette = ["0.75", "0.5", *pyplot.get_cmap("tab10").colors]
    colours = {name: palette[i] for i, name in enumerate((*TORCH, *LAYERS))}
    for index, (name, key) in enumerate(series.items()):
        here = [(i, found[(*key, *shape)]) for i, shape in enumerate(shapes) if (*key, *shape) in found]
        bars = axes.barh(
            [i + (index - (len(series) - 1) / 2) * thickness for i, _ in here],
            [row.x_fp32 - 1 for _, row in here],
            thickness,
            left=1,  # a bar to the left is slower than float32
            label=name,
            color=colours[name],
        )
        axes.bar_label(bars, [f"{row.x_fp32:.1f}" for _, row in here], fontsize=5, padding=1)
    cold = {(row.m, row.n, row.k) for row in rows if row.cold}
    axes.set_yticks(
        range(len(shapes)), [" x ".join(map(str, s)) + (" (cold)" if s in cold else "") for s in shapes], fontsize=8
    )
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times faster than F.linear in float32")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_title(f"M x N x K; {caption(facts)}", fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
