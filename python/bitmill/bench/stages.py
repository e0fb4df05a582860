# SPDX-License-Identifier: Apache-2.0
"""Where the time of a packed model goes, by torch.profiler: ops by what they are for, and what is left."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

ROUNDS = 9
MATMUL, ATTENTION, EMBEDDING, REST = "binary matmul", "binary attention", "embedding", "Python and dispatch"
# With the packing of their inputs; layers of an encoder with their residuals and normalisations too.
ENCODER, SELF_ATTENTION, MLP = "binary encoder", "binary self-attention", "binary MLP"
KERNELS = (ENCODER, SELF_ATTENTION, MLP, MATMUL, ATTENTION)
OTHER, CALL = "other ops", "call"
STAGES = {
    ENCODER: ("bitmill::binary_encoder",),
    SELF_ATTENTION: ("bitmill::binary_self_attention",),
    MLP: ("bitmill::binary_mlp",),
    MATMUL: (
        *("bitmill::binary_matmul", "bitmill::binary_matmul_bits", "bitmill::binary_matmul_floats"),
        *("bitmill::binary_linear", "bitmill::binary_weight_linear"),
    ),
    ATTENTION: ("bitmill::binary_attention", "bitmill::binary_attention_bits"),
    "packing": ("bitmill::bitpack",),
    "LayerNorm": ("bitmill::layer_norm", "aten::layer_norm", "aten::native_layer_norm"),
    "residual adds": ("aten::add", "aten::add_"),
    EMBEDDING: (),  # whatever runs inside the module
}
STAGE_OF = {op: stage for stage, ops in STAGES.items() for op in ops}


def measure(model: Any, call: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of each stage of a call, and of the whole call.

    Of each op the median over `rounds` calls counts, since another process interrupts now one, now another. The whole
    is the median of as many calls without the profiler, taken in turn with those; what is left of it is the time
    outside of ops: Python and torch's dispatch.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells stderr when it starts and stops
    embeddings: nn.Module = model.base_model.embeddings
    scopes: list[Any] = []

    def enter(*_: Any) -> None:
        scopes.append(record_function(EMBEDDING))
        scopes[-1].__enter__()

    handles = [
        embeddings.register_forward_pre_hook(enter),
        embeddings.register_forward_hook(lambda *_: scopes.pop().__exit__(None, None, None)),
    ]
    try:
        taken, wholes = zip(*((_once(call), _seconds(call)) for _ in range(rounds)), strict=True)
    finally:
        for handle in handles:
            handle.remove()
    stages = dict.fromkeys((*STAGES, OTHER), 0.0)
    for same in zip(*taken, strict=True):  # a call runs the same ops in the same order
        stages[same[0][0]] += statistics.median(ms for _, ms in same)
    ops = sum(stages.values())
    whole = max(1e3 * statistics.median(wholes), ops)
    return {"whole": whole, **stages, REST: whole - ops}


def _seconds(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _once(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Stage and milliseconds of every op of a call, in order, after another call that warms up."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
        with record_function(CALL):
            call()
    ops = []
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        scopes = _scopes(event)
        if CALL in scopes and event.name != EMBEDDING:
            stage = EMBEDDING if EMBEDDING in scopes else STAGE_OF.get(event.name, OTHER)
            ops.append((stage, event.self_cpu_time_total / 1e3))
    return ops


def _scopes(event: Any) -> set[str]:
    names = set()
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.add(event.name)
    return names


def render(stages: dict[str, float]) -> list[str]:
    """A line a stage, and the share of the kernels that multiply bits."""
    whole = stages["whole"]
    shown = {stage: ms for stage, ms in stages.items() if ms and stage != "whole"}
    lines = [f"{'stage of the chained model':<28} {'ms':>9} {'%':>6}"]
    lines += [f"{stage:<28} {ms:>9.3f} {100 * ms / whole:>6.1f}" for stage, ms in shown.items()]
    kernels = sum(stages[stage] for stage in KERNELS)
    return [
        *lines,
        f"{'whole':<28} {whole:>9.3f}",
        f"{100 * kernels / whole:.0f} % inside matmul and attention kernels",
    ]
