# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: verifies every variant, times a family's interleaved, prints ratios, writes JSON and plots.

Exit code 0; 1 if a variant of bitmill is wrong or fails, or the machine is too busy for --readme; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bitmill import strict_json
from bitmill.cli.arguments import parse_shape, parse_threads
from bitmill.timing import COLD_ROWS

from . import gpu, plots, report, shapes
from .families import FAMILIES
from .peaks import Peaks
from .runner import Family, Row, measure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Verified, interleaved benchmarks.")
    names = ", ".join(family.name for family in FAMILIES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--family", action="append", metavar="NAME", help=f"only this one, or several: {names}")
    parser.add_argument("--shape", metavar="M,N,K", type=parse_shape, help="one shape (default: the headline shapes)")
    parser.add_argument("--model", metavar="NAME", help="the shapes of the models with NAME in their name")
    parser.add_argument("--peers", action="store_true", help="time other engines too (benchmarks/requirements.txt)")
    parser.add_argument("--threads", metavar="N", type=parse_threads, default=1, help="threads (default: 1)")
    parser.add_argument("--seconds", metavar="S", type=float, default=1.0, help="aim for each variant (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time; the fewest rounds")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number and the machine's facts here")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="write roofline.png and speedup.png here")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's performance section and its plot")
    parser.add_argument(
        "--load", metavar="FILE", type=Path, nargs="+", help="report on JSON of earlier runs together, time nothing"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.seconds <= 60:
        parser.error("argument --seconds: expected more than 0 and at most 60")
    if options.threads > (cpus := len(os.sched_getaffinity(0))):
        parser.error(f"argument --threads: this process may use {cpus} CPU(s), got {options.threads}")
    if options.shape and options.model:
        parser.error("give --shape or --model, not both")
    if (options.plots or options.readme) and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots and --readme need matplotlib: pip install matplotlib")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    families = gpu.FAMILIES if options.device == "cuda" else FAMILIES
    known, names = {family.name: family for family in families}, ", ".join(family.name for family in families)
    for name in options.family or ():
        if name not in known:
            parser.error(f"no family is called {name!r}; known: {names}")
    options.families = [known[name] for name in options.family or known]
    try:
        options.problems = shapes.select(options.model, options.shape)
        options.earlier = [strict_json.read(path) for path in options.load or ()]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    on_gpu = options.device == "cuda" or any(earlier.get("gpu") for earlier in options.earlier)
    if on_gpu and (options.readme or options.plots or options.model or options.threads > 1):
        parser.error("runs on a GPU go without --readme, --plots, --model and --threads")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.load:
        facts, rows = report.from_json(*options.earlier)
    else:
        if options.device == "cpu":
            torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = os.environ["BNN_NUM_THREADS"] = str(options.threads)  # for engines loaded later
        peaks = gpu.GpuPeaks() if options.device == "cuda" else Peaks(options.threads)
        facts = report.machine(options.threads, peaks, command(options))
        rows = run(options, peaks)
    if options.json:
        strict_json.write(options.json, report.as_json(facts, rows))
    for family in gpu.FAMILIES if facts.get("gpu") else FAMILIES:
        mine = [row for row in rows if row.family == family.name]
        if mine:
            print(report.table(family, mine), end="\n\n")
    print(f"{facts.get('gpu') or facts['cpu']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}")
    print(report.legend(facts))
    busy = report.disturbed(rows) > 0.2
    if busy:
        print(f"Other processes interrupted {100 * report.disturbed(rows):.0f} % of the samples: better run it alone.")
    if options.plots:
        plots.write(facts, rows, options.plots)
    if options.readme and busy:
        print("The README stays as it is: its numbers must come from a quiet machine.", file=sys.stderr)
        return 1
    if options.readme:
        plots.write(facts, rows, shapes.REPOSITORY / "benchmarks" / "plots", ("speedup",))
        report.write_readme(report.markdown(facts, rows))
    return int(any(row.origin in ("bitmill", "kernel") and row.status.startswith(("wrong", "failed")) for row in rows))


def command(options: argparse.Namespace) -> str:
    """The command that measures the same again; where its results went does not matter."""
    words = ["python -m benchmarks"] + ["--device cuda"] * (options.device == "cuda")
    words += [f"--family {name}" for name in options.family or ()]
    words += [f"--shape {','.join(map(str, options.shape))}"] if options.shape else []
    words += [f"--model {options.model}"] if options.model else []
    words += ["--peers"] * options.peers + ["--quick"] * options.quick
    words += [f"--{key} {value:g}" for key in ("threads", "seconds") if (value := getattr(options, key)) != 1]
    return " ".join(words)


def workload(options: argparse.Namespace) -> list[tuple[Family, shapes.Problem]]:
    """Pairs of family and shape; what multiplies nothing gets each [m, k] once, and few rows only on request."""
    work = []
    for family in options.families:
        if not options.peers:
            variants = tuple(variant for variant in family.variants if variant.origin != "peer")
            family = dataclasses.replace(family, variants=variants)
        seen = set()
        wanted = (options.model or "").lower()
        own = tuple(p for p in (*family.problems, *family.besides) if wanted in p.name.lower())
        layers = tuple(problem for problem in options.problems if problem not in shapes.OTHERS)
        for problem in options.problems if options.shape else own if family.problems else (*layers, *own):
            size: Sequence[int] = problem[1:] if family.macs else (problem.m, problem.k)
            only_the_call = not family.macs and problem.m <= COLD_ROWS and not options.shape
            if size not in seen and not only_the_call:
                work.append((family, problem))
            seen.add(size)
    return work


@torch.inference_mode()
def run(options: argparse.Namespace, peaks: Peaks) -> list[Row]:
    """All rows, in order of family and shape."""
    rows: list[Row] = []
    with tqdm(workload(options), disable=None) as bar:
        for family, problem in bar:
            bar.set_description(f"{family.name} {problem.m} x {problem.n} x {problem.k}")
            rows += measure(family, problem, peaks, options.seconds / (10 if options.quick else 1), bar.refresh)
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        sys.exit(0)
