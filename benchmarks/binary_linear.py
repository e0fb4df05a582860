# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.binary_linear [--shape M,N,K] [--json]`: packed binary products against torch, one thread.

Two questions of one run: how close the integer product (packed rows in, int32 out, the kernel alone) comes to the peak
of xor + popcount + add that a probe measures between the rounds; and how many times faster PackedBinaryLinear (float32
in, float32 out, packing included) is than F.linear in float32 and bfloat16. Medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear
from tqdm import tqdm

from bitmill import _C, BinaryConfig, ops
from bitmill.cli import cpu_name
from bitmill.nn import BinaryLinear, PackedBinaryLinear

SHAPES = ((128, 768, 768), (128, 3072, 768), (128, 768, 3072), (1024, 768, 768), (32, 4096, 4096))


def verified(m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    """The variants of one shape, after a check of the packed ones against the training form."""
    layer = BinaryLinear(k, n, config=BinaryConfig("bibert")).eval()
    packed: PackedBinaryLinear = layer.pack()
    x = torch.randn(m, k)
    if not torch.equal(packed(x), layer(x)):
        raise RuntimeError(f"the packed layer differs from the training form at m, n, k = {m}, {n}, {k}")
    sign = ops.bitpack(x, levels="plus")[0]
    dot = ops.binary_matmul(sign, packed.weight, n, k)
    if not torch.equal(dot.float(), torch.where(x >= 0, 1.0, -1.0) @ torch.sign(packed.dequantize().weight).T):
        raise RuntimeError(f"the integer product is wrong at m, n, k = {m}, {n}, {k}")
    weight, bias = layer.weight.detach(), layer.bias.detach()
    half = [t.bfloat16() for t in (x, weight, bias)]
    return {
        "packed layer": lambda: packed(x),
        "integer product, as an op": lambda: ops.binary_matmul(sign, packed.weight, n, k),
        "F.linear float32": lambda: linear(x, weight, bias),
        "F.linear bfloat16": lambda: linear(*half),
    }


def measure(shape: tuple[int, int, int], rounds: int) -> dict[str, object]:
    """Median microseconds of each variant, and what follows from them."""
    variants = verified(*shape)
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks, products = [], []
    for _ in range(rounds):
        for name, call in variants.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
        peaks.append(_C.popcount_peak())
        products.append(_C.binary_matmul_seconds(*shape, 15))
    medians = {name: statistics.median(values) for name, values in times.items()}
    peak = statistics.median(peaks)
    rate = shape[0] * shape[1] * shape[2] / statistics.median(products)
    return {
        "shape": shape,
        "microseconds": medians,
        "x float32": medians["F.linear float32"] / medians["packed layer"],
        "x bfloat16": medians["F.linear bfloat16"] / medians["packed layer"],
        "product GMAC/s": rate / 1e9,
        "peak GMAC/s": peak / 1e9,
        "% of peak": 100 * rate / peak if peak else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.binary_linear", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", metavar="M,N,K", help="one shape instead of the list")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shapes = [tuple(map(int, options.shape.split(",")))] if options.shape else SHAPES
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [measure(shape, options.rounds) for shape in tqdm(shapes, disable=None)]
    facts = {"cpu": cpu_name(), "torch": torch.__version__, "threads": 1, "rows": rows}
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{facts['cpu']}, torch {facts['torch']}, 1 thread, medians of {options.rounds}")
    heads = ("packed us", "x float32", "x bfloat16", "product GMAC/s", "% of peak")
    print(f"{'M x N x K':>18} " + " ".join(f"{head:>14}" for head in heads))
    for row in rows:
        share = "-" if row["% of peak"] is None else f"{row['% of peak']:.0f}"
        size = " x ".join(map(str, row["shape"]))
        cells = (
            f"{row['microseconds']['packed layer']:.1f}",
            f"{row['x float32']:.1f}",
            f"{row['x bfloat16']:.1f}",
            f"{row['product GMAC/s']:.0f}",
            share,
        )
        print(f"{size:>18} " + " ".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
