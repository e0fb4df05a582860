# SPDX-License-Identifier: Apache-2.0
"""The peaks of this machine, measured between the rounds of a benchmark by bitmill's probes, on as many threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bitmill import _C
from bitmill.timing import Sample, rotated, stopwatch

UNITS = {
    "popcount": "xor + popcount + add of 1-bit operands (AVX2: lookup + add)",
    "fp32": "FMA of float32",
    "bf16": "dot product of bfloat16",
    "int8": "dot product of int8",
    "read": "sequential read from memory",
    "copy": "copy of as many bytes as the input has, read and written",
}
BUFFER = 128 << 20


class Peaks:
    """Probes on `threads` threads at once; rates are multiply-adds or bytes a second, of all threads together."""

    device = "cpu"
    units = UNITS

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._buffers = [(np.ones(BUFFER, np.uint8), np.ones(BUFFER, np.uint8)) for _ in range(threads)]

    def rate(self, unit: str, size: int = BUFFER) -> float:
        """0 where this machine has no such instructions. A copy moves `size` bytes, in cache if they fit."""
        size = min(size, BUFFER)
        probe: Callable[[int], float] = {
            "popcount": lambda _: _C.popcount_peak(),
            "fp32": lambda _: _C.float32_peak(),
            "bf16": lambda _: _C.bfloat16_peak(),
            "int8": lambda _: _C.int8_peak(),
            "read": lambda i: _C.read_bandwidth(self._buffers[i][0]),
            "copy": lambda i: 2 * _C.copy_bandwidth(self._buffers[i][0][:size], self._buffers[i][1][:size]),
        }[unit]
        return sum(self._pool.map(probe, range(self.threads)))

    def sample(self, unit: str, size: int = BUFFER) -> Sample:
        """The rate as a sample: the seconds of one multiply-add or byte; 0 without the instructions."""

        def sample() -> float:
            self.rate(unit, size)  # warm up
            rate = self.rate(unit, size)
            return 1 / rate if rate else 0.0

        return sample

    def stopwatch(self, calls: Sequence[Callable[[], object]]) -> Sample:
        """A sample of calls that take turns."""
        return stopwatch(rotated(calls))
