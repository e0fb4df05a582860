# SPDX-License-Identifier: Apache-2.0
"""Timing on a machine that others use too: all variants interleaved in one process, medians and quartiles.

A sample is a function that runs something and answers the seconds it took. `interleave` runs one of each, round after
round, so a slow moment of the machine meets all of them, and only ratios within one run mean anything. A sample during
which the operating system took the CPU away, from a long one often, is thrown away: it measures the other process.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

Sample = Callable[[], float]

ROUNDS = 31  # the fewest that a median and quartiles are taken from
SHORTEST = 5e-4  # seconds; a faster call is repeated within a sample, until what ran before it hardly matters
LONG = 0.1  # seconds; a slower call needs no other before it that warms the caches
HARMLESS = 5  # preemptions a second, which take 2 % of the time at 4 ms each
ALONE = ": one thread"  # of names, see `on_one_thread`
COLD_BYTES = 200 << 20  # of weights in rotation: more than caches hold
COLD_ROWS = 8  # with no more rows than this a product waits for its weight, which a real model reads from memory
MAX_ELEMENTS, MAX_MACS = 1 << 28, 1 << 33  # of one matrix and of one product: 1 GiB in float32, a second or so


def check_shape(m: int, n: int, k: int) -> None:
    """Raises ValueError for sizes that are not positive, or too large to time in a moment."""
    if min(m, n, k) < 1:
        raise ValueError(f"every size of M,N,K must be at least 1, got {m},{n},{k}")
    if max(m * n, m * k, n * k) > MAX_ELEMENTS or m * n * k > MAX_MACS:
        raise ValueError(
            f"M,N,K must make matrices of at most {MAX_ELEMENTS:,} elements and a product of at most {MAX_MACS:,}"
            f" multiply-adds, got {m},{n},{k}"
        )


class Spread(NamedTuple):
    """Median and quartiles in seconds of `samples` samples; `disturbed` more were thrown away."""

    median: float
    low: float
    high: float
    samples: int
    disturbed: int


class Taken:
    """The samples of one variant, those apart that another process disturbed."""

    def __init__(self) -> None:
        self.clean: list[float] = []
        self.disturbed: list[float] = []

    def add(self, sample: Sample) -> None:
        """Take a sample; up to twice more if it was disturbed."""
        for _ in range(3):
            before = preemptions()
            seconds = sample()
            if preemptions() - before <= int(HARMLESS * seconds):
                self.clean.append(seconds)
                return
            self.disturbed.append(seconds)

    def spread(self) -> Spread:
        """Of the clean samples; of all if none is clean. Raises ValueError for no samples."""
        seconds = self.clean or self.disturbed
        if not seconds:
            raise ValueError("spread: there must be at least one sample, got none")
        low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return Spread(middle, low, high, len(self.clean), len(self.disturbed))


def preemptions() -> int:
    """How often another process has taken a CPU from a thread of this one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def stopwatch(call: Callable[[], object]) -> Sample:
    """A sample of a call: one run to warm up, unless it is `LONG`, then so many that they take `SHORTEST` seconds, and
    their mean."""
    call()
    once = math.inf
    for attempt in range(5):
        start = time.perf_counter()
        call()
        once = min(once, time.perf_counter() - start)
        if once > (2 * SHORTEST if attempt else LONG):  # it will not be repeated; the first may have been interrupted
            break
    repeat = max(1, math.ceil(SHORTEST / max(once, 1e-7)))

    def sample() -> float:
        if once < LONG:
            call()
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat

    return sample


def on_one_thread(samples: Mapping[str, Sample], names: Iterable[str]) -> dict[str, Sample]:
    """The samples of these names, each with one of torch's threads; `ALONE` ends their new names."""

    def alone(sample: Sample) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return sample()
        finally:
            torch.set_num_threads(threads)

    return {name + ALONE: partial(alone, samples[name]) for name in names}


def rotated(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call of the next one each time: over copies of a weight that together exceed the caches, each is cold."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def copies_for(weight_bytes: int) -> int:
    """How many copies of a weight exceed `COLD_BYTES`."""
    return COLD_BYTES // max(weight_bytes, 1) + 1


def interleave(
    samples: Mapping[str, Sample], seconds: float = 1.0, progress: Callable[[], object] | None = None
) -> dict[str, Spread]:
    """Run every sample once a round, for about `seconds` each, but at least `ROUNDS` rounds.

    The order changes with every round, so that none always follows the one that leaves the caches at their worst.

    A sample that would take longer than that skips rounds; it runs at least 5 times.

    Args:
        samples: name to sample.
        seconds: the aim for each sample.
        progress: called after every round.
    Returns:
        name to the spread of its samples.
    """
    costs = {}
    for name, sample in samples.items():
        start = time.perf_counter()
        sample()
        costs[name] = time.perf_counter() - start
    strides = {name: min(max(1, round(cost * ROUNDS / seconds)), ROUNDS // 5) for name, cost in costs.items()}
    round_cost = sum(cost / strides[name] for name, cost in costs.items())
    rounds = min(max(ROUNDS, int(seconds * len(samples) / max(round_cost, 1e-9))), 8 * ROUNDS)
    taken = {name: Taken() for name in samples}
    collecting = gc.isenabled()
    gc.disable()
    try:
        order, shuffle = list(samples.items()), random.Random(0).shuffle
        for index in range(rounds):
            shuffle(order)
            for name, sample in order:
                if index % strides[name] == 0:
                    taken[name].add(sample)
            if progress is not None:
                progress()
    finally:
        if collecting:
            gc.enable()
    return {name: values.spread() for name, values in taken.items()}
