# SPDX-License-Identifier: Apache-2.0
"""The same questions on an NVIDIA GPU (`python -m benchmarks --device cuda`).

Results are compared with those of the CPU before anything is timed. A sample replays a CUDA graph of many calls between
two events, so it holds kernels and the gaps between them, and nothing of Python. With few rows the calls of a graph
take turns over copies of the weight that exceed the GPU's cache, as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.functional import linear

from bitmill import FP4Config, SalientConfig
from bitmill.timing import Sample, rotated

from . import families
from .families import binary, layer, product_op, torch_int8, torch_linear
from .peers import bitsandbytes_linear
from .runner import Case, Family, Prepared, Variant
from .shapes import GPU_CALLS, GPU_PRODUCTS, Problem

UNITS = {
    "popcount": "eight times int8, as the tensor cores' instructions are wide",
    "bf16": "F.linear of bfloat16, 8192 x 8192 x 8192",
    "int8": "torch._int_mm, 8192 x 8192 x 8192",
    "read": "copy of 256 MiB, read and written",
    "copy": "copy of 256 MiB, read and written",
}
SIDE, BUFFER = 8192, 256 << 20
CALLS = 20  # of a graph, at least


class GpuPeaks:
    """What torch reaches on the current GPU; the counterpart of `peaks.Peaks`."""

    device, units, threads = "cuda", UNITS, 1

    def __init__(self) -> None:
        square = torch.randint(-9, 9, (SIDE, SIDE), dtype=torch.int8, device="cuda")
        halves = square.bfloat16()
        source, target = (torch.zeros(BUFFER, dtype=torch.uint8, device="cuda") for _ in range(2))
        self._samples: dict[str, tuple[float, Sample]] = {
            "int8": (SIDE**3, self.stopwatch([lambda: torch._int_mm(square, square.T)])),
            "bf16": (SIDE**3, self.stopwatch([lambda: linear(halves, halves)])),
            "copy": (2 * BUFFER, self.stopwatch([lambda: target.copy_(source)])),
        }
        self._samples["popcount"] = (8 * SIDE**3, self._samples["int8"][1])
        self._samples["read"] = self._samples["copy"]

    def rate(self, unit: str, size: int = BUFFER) -> float:
        """Multiply-adds or bytes a second."""
        return 1 / self.sample(unit, size)()

    def sample(self, unit: str, size: int = BUFFER) -> Sample:
        """The seconds of one multiply-add or byte."""
        work, seconds = self._samples[unit]
        return lambda: seconds() / work

    def stopwatch(self, calls: Sequence[Callable[[], object]]) -> Sample:
        """A sample of calls that take turns: the mean over a replay of a CUDA graph of them."""
        call, count = rotated(calls), max(CALLS, len(calls))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()

        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / count

        return sample


def torch_fp8() -> Variant:
    """torch._scaled_mm of E4M3 operands with one scale each, bfloat16 out, no bias."""

    def build(case: Case) -> Prepared:
        x, weight = (t.to(torch.float8_e4m3fn) for t in (case.x, case.linear.weight * case.k**0.5))
        expected = linear(x.float(), weight.float())
        x, one = x.to(case.device), torch.ones((), device=case.device)

        def prepared() -> Prepared:
            own = weight.to(case.device, copy=True)
            call = partial(torch._scaled_mm, x, own.T, one, one, out_dtype=torch.bfloat16)
            return Prepared(call, expected, 2e-2, x.nbytes, own.nbytes, prepared)

        return prepared()

    return Variant("torch fp8 (_scaled_mm)", build, "torch")


HALF = torch.bfloat16
BASELINES = (torch_linear(HALF, "bf16"), torch_int8(), torch_fp8())
CASTS = tuple(v for f in families.FAMILIES if not f.macs for v in f.variants if v.origin == "bitmill")

FAMILIES = (
    Family(
        "product",
        "1-bit x 1-bit integer product, packed operands in, int32 out",
        (Variant("binary_matmul", product_op), torch_linear(HALF, "bf16", bias=False), torch_int8(), torch_fp8()),
        problems=(*GPU_PRODUCTS, *GPU_CALLS),
    ),
    Family(
        "w1a1",
        "layer with 1-bit weights and activations, bfloat16 in and out, packing of the activations included",
        (layer("binary, bfloat16", binary(), "popcount", HALF), *BASELINES),
        problems=GPU_PRODUCTS[1:],
    ),
    Family(
        "w1a16",
        "layer with 1-bit weights and bfloat16 activations",
        (layer("binary weight, bfloat16", binary(act_bits=32), "bf16", HALF), *BASELINES),
        problems=(*GPU_CALLS, *GPU_PRODUCTS[1:]),
    ),
    Family(
        "salient",
        "layer with 1-bit weights of which a fraction keeps 8 bits, bfloat16 in and out",
        (
            *(
                layer(f"salient {percent} %{form}", SalientConfig(percent / 100, structure=structure), "bf16", HALF)
                for percent in (5, 10, 30)
                for structure, form in (("element", ""), ("column", " columns"))
            ),
            *BASELINES,
        ),
        problems=GPU_CALLS,
    ),
    Family(
        "fp4",
        "layer with 4-bit weights, bfloat16 in and out",
        (
            *(layer(f"{name}, bfloat16", FP4Config(name), "bf16", HALF) for name in ("e2m1", "mxfp4", "nvfp4", "nf4")),
            *BASELINES,
            Variant("bitsandbytes FP4, bfloat16", bitsandbytes_linear("fp4", HALF), "peer"),
            Variant("bitsandbytes NF4, bfloat16", bitsandbytes_linear("nf4", HALF), "peer"),
        ),
        problems=GPU_CALLS,
    ),
    Family(
        "w4a4",
        "layer with 4-bit weights and activations, bfloat16 in and out, casting of the activations included",
        (
            *(layer(name, FP4Config(name, activations=name), "int8", HALF) for name in ("mxfp4", "nvfp4")),
            *BASELINES,
        ),
        problems=GPU_PRODUCTS[1:],
    ),
    Family(
        "cast",
        "float32 rows to bits and to FP4 codes",
        CASTS,
        macs=False,
        problems=(Problem("rows", 4096, 8192, 8192),),
    ),
)
