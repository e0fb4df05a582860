# SPDX-License-Identifier: Apache-2.0
"""`bitmill bench`: will a packed layer be faster than nn.Linear on this machine? Verified, then timed side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..config import BinaryConfig, Config, FP4Config, SalientConfig
from ..convert import LAYERS
from ..nn._module import PackedModule
from ..ops import _machine
from ..timing import COLD_ROWS, check_shape, copies_for, interleave, rotated, stopwatch

KINDS: dict[str, tuple[str, Config]] = {
    "binary": ("1-bit weights, 1-bit activations", BinaryConfig("bibert")),
    "binary-weight": ("1-bit weights, float activations", BinaryConfig("bibert", act_bits=32)),
    "salient": ("1-bit weights, 10 % of them 8-bit", SalientConfig(fraction=0.1)),
    "fp4": ("4-bit weights, E2M1", FP4Config("e2m1")),
    "mxfp4": ("4-bit weights, MXFP4", FP4Config("mxfp4")),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_SHAPE = (128, 768, 768)  # one projection of BERT-base, 128 tokens
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative error against the training form


class LayerTime(NamedTuple):
    """One row: microseconds, ratios to nn.Linear, bytes of the weight with its scales, and what that means."""

    kind: str
    what: str
    kernel: str
    microseconds: float
    low: float
    high: float
    x_float32: float
    x_bfloat16: float
    weight_bytes: int
    float32_bytes: int
    verdict: str


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Frobenius norms; 0 / 0 is 0, and anything that is not finite is infinitely wrong."""
    if not torch.isfinite(got).all():
        return float("inf")
    difference, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return difference / size if size else float(difference > 0) and float("inf")


def buffer_bytes(module: nn.Module) -> int:
    """Bytes of the weight as stored, with its scales, without the bias."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return sum(t.nbytes for name, t in tensors if name != "bias")


def in_rotation(module: nn.Module, x: Tensor, cold: bool) -> Callable[[], object]:
    """The module on x; cold, over copies of it that together exceed the caches."""
    if not cold:
        return lambda: module(x)
    modules = [module, *(copy.deepcopy(module) for _ in range(copies_for(buffer_bytes(module)) - 1))]
    return rotated([lambda layer=layer: layer(x) for layer in modules])  # type: ignore[misc]


@torch.inference_mode()
def run(
    kinds: tuple[str, ...] = tuple(KINDS),
    shape: tuple[int, int, int] = DEFAULT_SHAPE,
    dtype: torch.dtype = torch.float32,
    seconds: float = 0.5,
    progress: bool = False,
) -> dict[str, Any]:
    """Time packed layers against nn.Linear in float32 and bfloat16, on the threads that torch has.

    Args:
        kinds: keys of `KINDS`.
        shape: M rows of K columns times a weight [N, K].
        dtype: of the packed layers' activations.
        seconds: the aim for each variant.
        progress: show a bar if stderr is a terminal.
    Returns:
        What `bitmill bench --json` prints.
    Raises:
        ValueError: for a shape out of range.
        RuntimeError: if a layer does not compute what its training form computes.
    """
    check_shape(*shape)
    m, n, k = shape
    cold = m <= COLD_ROWS
    linear = nn.Linear(k, n)
    x = torch.randn(m, k)
    half = copy.deepcopy(linear).bfloat16()
    x_half = x.bfloat16()
    calls = {"float32": in_rotation(linear, x, cold), "bfloat16": in_rotation(half, x_half, cold)}
    packed: dict[str, PackedModule] = {}
    for kind in kinds:
        config = KINDS[kind][1]
        training: Any = LAYERS[type(config)].from_linear(linear, config).eval()
        packed[kind] = training.pack()
        error = relative_error(packed[kind](x.to(dtype)), training(x.to(dtype)))
        if error > TOLERANCE[dtype]:
            raise RuntimeError(
                f"the packed {kind} layer differs from its training form by {error:.2g}, relative, at {m} x {n} x {k}"
            )
        calls[kind] = in_rotation(packed[kind], x.to(dtype), cold)
    samples = {name: stopwatch(call) for name, call in calls.items()}
    with tqdm(desc="timing", unit=" rounds", leave=False, disable=None if progress else True) as bar:
        times = interleave(samples, seconds, bar.update)
    rows = []
    for kind in kinds:
        time, size = times[kind], buffer_bytes(packed[kind])
        to_float32, to_bfloat16 = (times[name].median / time.median for name in ("float32", "bfloat16"))
        rows.append(
            LayerTime(
                kind,
                KINDS[kind][0],
                _machine.kernel_of(packed[kind].kernel),
                time.median * 1e6,
                time.low * 1e6,
                time.high * 1e6,
                to_float32,
                to_bfloat16,
                size,
                4 * n * k,
                verdict(kind, to_float32, to_bfloat16, 4 * n * k / size),
            )._asdict()
        )
    return {
        "bitmill": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "cold": cold,
        "linear_float32_microseconds": times["float32"].median * 1e6,
        "linear_bfloat16_microseconds": times["bfloat16"].median * 1e6,
        "disturbed": sum(time.disturbed for time in times.values()) / sum(sum(time[3:]) for time in times.values()),
        "layers": rows,
    }


def verdict(kind: str, to_float32: float, to_bfloat16: float, smaller: float) -> str:
    """One plain sentence; within 5 % counts as equal, because a machine is not that steady."""

    def against(ratio: float, dtype: str) -> str:
        if 0.95 < ratio < 1.05:
            return f"as fast as {dtype}"
        return f"{ratio:.1f} times faster than {dtype}" if ratio > 1 else f"{1 / ratio:.1f} times slower than {dtype}"

    speed = f"{against(to_float32, 'float32')} and {against(to_bfloat16, 'bfloat16')}"
    if max(to_float32, to_bfloat16) <= 1.05:
        return f"{kind} saves memory here ({smaller:.0f} times), not time: {speed}."
    if min(to_float32, to_bfloat16) >= 0.95:
        return f"{kind} pays off here: {speed}, weight {smaller:.0f} times smaller."
    return f"{kind} depends on what you have: {speed}, weight {smaller:.0f} times smaller."


def render(result: dict[str, Any]) -> str:
    """The result as a person reads it, up to 80 columns."""
    m, n, k = result["shape"]
    lines = [
        f"{m} rows x weight {n} x {k}, {result['dtype']} activations, {result['threads']} thread(s), torch"
        f" {result['torch']}",
    ]
    if result["cold"]:
        lines.append("Weights come from memory, not from cache, as in a large model.")
    lines += ["", f"{'layer':<16} {'us':>10} {'x float32':>10} {'x bfloat16':>11} {'weight bytes':>13} {'smaller':>8}"]
    for name in ("float32", "bfloat16"):
        us, size = result[f"linear_{name}_microseconds"], n * k * (4 if name == "float32" else 2)
        ratios = [result[f"linear_{other}_microseconds"] / us for other in ("float32", "bfloat16")]
        lines.append(_row(f"Linear {name}", us, ratios[0], ratios[1], size, 4 * n * k / size))
    for row in result["layers"]:
        smaller = row["float32_bytes"] / row["weight_bytes"]
        lines.append(
            _row(row["kind"], row["microseconds"], row["x_float32"], row["x_bfloat16"], row["weight_bytes"], smaller)
        )
    lines += ["", *(row["verdict"] for row in result["layers"])]
    if result["disturbed"] > 0.2:
        share = f"{100 * result['disturbed']:.0f} %"
        lines.append(
            f"Other processes interrupted {share} of the samples, which were thrown away: better run it alone."
        )
    slow = [row["kind"] for row in result["layers"] if row["kernel"] in ("torch", "generic")]
    if slow:
        lines.append(f"No kernel for this CPU's instructions runs for: {', '.join(slow)} (see `bitmill info`).")
    return "\n".join(lines)


def _row(name: str, us: float, to_float32: float, to_bfloat16: float, size: int, smaller: float) -> str:
    return f"{name:<16} {us:>10,.1f} {to_float32:>10.2f} {to_bfloat16:>11.2f} {size:>13,} {smaller:>7.1f}x"
