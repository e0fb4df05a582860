# SPDX-License-Identifier: Apache-2.0
"""Builds, verifies and times the variants of one family at one shape. A variant that is wrong is never timed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.bench.layers import relative_error
from bitmill.timing import ALONE, COLD_ROWS, Sample, Spread, copies_for, interleave, on_one_thread

from .peaks import Peaks
from .shapes import Problem

INTERRUPTED = "not measured: another process took the CPU during every sample"


class Missing(Exception):
    """A peer that is not installed."""

    label = "not installed"


class Unfit(Exception):
    """A peer that does not take this shape or this number of threads."""

    label = "not for this problem"


class Wrong(Exception):
    """A variant whose result is not the reference's."""

    label = "wrong"


@dataclasses.dataclass
class Prepared:
    """A variant at one shape, ready to run.

    Attributes:
        call: what is timed.
        expected: what `call` must answer; exactly if `tolerance` is 0, else within that relative error.
        input_bytes: of the activations.
        weight_bytes: of the weight as the variant holds it; a cold measurement rotates over copies of it.
        again: builds a copy with memory of its own.
        bound: the arithmetic peak that it is held against.
        sample: answers the seconds of one run, for code that times itself.
        multiplies: whether it does the product, or only something before it.
    """

    call: Callable[[], Any]
    expected: Tensor
    tolerance: float
    input_bytes: int
    weight_bytes: int
    again: Callable[[], Prepared] | None = None
    bound: str | None = None
    sample: Sample | None = None
    multiplies: bool = True


def layer_copies(
    module: nn.Module, x: Tensor, expected: Tensor, tolerance: float, weight_bytes: int, bound: str | None
) -> Prepared:
    """A module on x; copies are deep copies."""

    def again() -> Prepared:
        return layer_copies(copy.deepcopy(module), x, expected, tolerance, weight_bytes, bound)

    return Prepared(lambda: module(x), expected, tolerance, x.nbytes, weight_bytes, again, bound)


class Case:
    """The data of one shape, the same for every variant: x [m, k] and an nn.Linear with weight [n, k], on the CPU.

    Results are known there; a variant puts what it times on `device`.
    """

    def __init__(self, problem: Problem, threads: int, device: str = "cpu") -> None:
        self.problem, self.threads, self.device = problem, threads, device
        self.m, self.n, self.k = problem.m, problem.n, problem.k
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(self.m, self.k, generator=generator)
        self.linear = nn.Linear(self.k, self.n, device="meta")
        self.linear.weight = nn.Parameter(torch.randn(self.n, self.k, generator=generator) / self.k**0.5)
        self.linear.bias = nn.Parameter(torch.randn(self.n, generator=generator))
        self.linear.requires_grad_(False).eval()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A declared entry of a family. `origin`: "bitmill", "kernel" (ours, no op), "torch" (a baseline) or "peer"."""

    name: str
    build: Callable[[Case], Prepared]
    origin: str = "bitmill"
    baseline: str | None = None  # "fp32", "bf16" or "int8": what ratios are taken to


@dataclasses.dataclass(frozen=True)
class Family:
    """Variants that answer the same question. `macs` is False where nothing is multiplied: bytes count there.

    `problems` are those of a question that is not about a linear layer, `besides` come to those of linear layers.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    macs: bool = True
    problems: tuple[Problem, ...] = ()
    besides: tuple[Problem, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """What the JSON file holds for one variant at one shape; its numbers are None unless `status` is "ok"."""

    family: str
    problem: str
    m: int
    n: int
    k: int
    variant: str
    origin: str
    status: str
    cold: bool = False
    copies: int = 1
    moved: int = 0  # bytes that a call reads and writes: activations, weight and result
    samples: int = 0
    disturbed: int = 0  # samples thrown away because another process interrupted them
    microseconds: float | None = None
    low: float | None = None
    high: float | None = None
    x_fp32: float | None = None
    x_bf16: float | None = None
    x_int8: float | None = None
    x_one_thread: float | None = None  # of bitmill and torch on several threads: against themselves on one
    weight_bytes: int | None = None
    gmacs: float | None = None
    gigabytes: float | None = None
    intensity: float | None = None  # multiply-adds a byte
    bound: str | None = None  # the peak that it comes closest to, of those that could hold it back
    percent_of_peak: float | None = None


def as_tensor(value: Any) -> Tensor:
    return value.cpu() if isinstance(value, Tensor) else torch.from_numpy(value)


def verify(prepared: Prepared) -> int:
    """The bytes of the result; raises Wrong unless it is what it must be."""
    got, want = as_tensor(prepared.call()), prepared.expected
    if got.shape != want.shape:
        raise Wrong(f"shape {list(got.shape)}, expected {list(want.shape)}")
    if prepared.tolerance == 0:
        different = int((got.to(want.dtype) != want).sum())
        if different:
            raise Wrong(f"{different} of {want.numel()} results differ; they must be equal")
        return got.nbytes
    error = relative_error(got, want)
    if error > prepared.tolerance:
        raise Wrong(f"relative error {error:.2g}, at most {prepared.tolerance:.2g} allowed")
    return got.nbytes


def copies(prepared: Prepared, cold: bool) -> Iterator[Prepared]:
    """For a cold measurement, so many copies that all weights together exceed the caches; verified too."""
    if cold and prepared.again is not None:
        for _ in range(copies_for(prepared.weight_bytes) - 1):
            another = prepared.again()
            verify(another)
            yield another


@dataclasses.dataclass
class Ready:
    """A verified variant: its row so far, the sample that times it, and the peaks that could hold it back."""

    row: Row
    prepared: Prepared
    sample: Sample
    units: list[str]


def make_ready(row: Row, variant: Variant, case: Case, macs: bool, peaks: Peaks) -> Ready:
    """Build and verify; raises whatever says that this cannot be timed."""
    prepared = variant.build(case)
    moved = prepared.input_bytes + prepared.weight_bytes + verify(prepared)
    cold = macs and case.m <= COLD_ROWS and prepared.again is not None
    calls = [prepared.call, *(another.call for another in copies(prepared, cold))]
    sample = prepared.sample or peaks.stopwatch(calls)
    units = ["read"] * cold + [prepared.bound] * (prepared.bound is not None) if macs else ["copy"]
    row = dataclasses.replace(row, cold=cold, copies=len(calls), moved=moved, weight_bytes=prepared.weight_bytes)
    return Ready(row, prepared, sample, units)


def refusal(error: Exception) -> str:
    """What the table says instead of numbers."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, (Missing, Unfit, Wrong)):
        return f"{error.label}: {text}"
    return f"failed: {type(error).__name__}: {text}"


def finish(ready: Ready, times: dict[str, Spread], macs: int, baselines: dict[str, Ready]) -> Row:
    """The row with its numbers; `baselines` are those of the same problem."""
    row, taken, alone = ready.row, times[ready.row.variant], times.get(ready.row.variant + ALONE)
    macs *= ready.prepared.multiplies
    if taken.samples == 0:  # what is left measures the other process
        return dataclasses.replace(row, status=INTERRUPTED, disturbed=taken.disturbed)
    done = {"read": ready.prepared.weight_bytes, "copy": row.moved}
    shares = {unit: done.get(unit, macs) * times[f"peak {unit}"].median / taken.median for unit in ready.units}
    bound = max(shares, key=lambda unit: shares[unit], default=None)
    ratios = {
        f"x_{name}": times[baseline.row.variant].median / taken.median
        for name, baseline in baselines.items()
        # One in cache says nothing against one from memory.
        if baseline.row.cold == row.cold and times[baseline.row.variant].samples
    }
    return dataclasses.replace(
        row,
        samples=taken.samples,
        disturbed=taken.disturbed,
        microseconds=taken.median * 1e6,
        low=taken.low * 1e6,
        high=taken.high * 1e6,
        **ratios,
        x_one_thread=alone.median / taken.median if alone and alone.samples else None,
        gmacs=macs / taken.median / 1e9 if macs else None,
        gigabytes=row.moved / taken.median / 1e9,
        intensity=macs / row.moved if macs else None,
        bound=bound,
        percent_of_peak=100 * shares[bound] or None if bound else None,
    )


def measure(
    family: Family, problem: Problem, peaks: Peaks, seconds: float, progress: Callable[[], object] | None = None
) -> list[Row]:
    """One row a variant, in the family's order."""
    case = Case(problem, peaks.threads, peaks.device)
    rows: dict[str, Row] = {}
    ready: dict[str, Ready] = {}
    for variant in family.variants:
        rows[variant.name] = Row(family.name, problem.name, *problem[1:], variant.name, variant.origin, "ok")
        try:
            ready[variant.name] = make_ready(rows[variant.name], variant, case, family.macs, peaks)
        except Exception as error:  # whatever a peer raises; it must not stop the run
            rows[variant.name] = dataclasses.replace(rows[variant.name], status=refusal(error))
    samples = {name: one.sample for name, one in ready.items()}
    if peaks.threads > 1:  # other engines have their own ways to be told
        follow = (name for name, one in ready.items() if one.row.origin in ("bitmill", "torch"))
        samples |= on_one_thread(samples, follow)
    for unit in sorted({unit for one in ready.values() for unit in one.units}):
        samples[f"peak {unit}"] = peaks.sample(unit, case.x.nbytes)
    times = interleave(samples, seconds, progress)
    baselines = {v.baseline: ready[v.name] for v in family.variants if v.baseline and v.name in ready}
    macs = problem.m * problem.n * problem.k if family.macs else 0
    finished = {name: finish(one, times, macs, baselines) for name, one in ready.items()}
    return list({**rows, **finished}.values())
