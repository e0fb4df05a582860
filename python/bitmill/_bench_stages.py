# SPDX-License-Identifier: Apache-2.0
"""Where the time of a packed model goes, by torch.profiler: ops by what they are for, and what is left."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from .timing import preemptions, stopwatch

Result = TypeVar("Result")

ROUNDS = 9
MATMUL, ATTENTION, EMBEDDING, REST = "binary matmul", "binary attention", "embedding", "Python and dispatch"
OTHER, CALL = "other ops", "call"
STAGES = {
    MATMUL: (
        *("bitmill::binary_matmul", "bitmill::binary_matmul_bits", "bitmill::binary_matmul_floats"),
        *("bitmill::binary_linear", "bitmill::binary_weight_linear"),
    ),
    ATTENTION: ("bitmill::binary_attention", "bitmill::binary_attention_bits"),
    "packing": ("bitmill::bitpack",),
    "LayerNorm": ("aten::layer_norm", "aten::native_layer_norm"),
    "residual adds": ("aten::add", "aten::add_"),
    EMBEDDING: (),  # whatever runs inside the module
}
STAGE_OF = {op: stage for stage, ops in STAGES.items() for op in ops}


def measure(model: Any, call: Callable[[], object], rounds: int = ROUNDS) -> dict[str, Any]:
    """Milliseconds of each stage, and of the whole call without the profiler: medians of `rounds`.

    What is left of the whole is the time outside of ops: Python and torch's dispatch.
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
    collecting = gc.isenabled()
    gc.disable()  # the profiler's events are many
    try:
        taken = [_once(call) for _ in range(rounds + 1)][1:]  # the first starts the profiler
    finally:
        if collecting:
            gc.enable()
        for handle in handles:
            handle.remove()
    stages = {stage: statistics.median(one[stage] for one in taken) for stage in (*STAGES, OTHER)}
    whole = statistics.median(one["whole"] for one in taken)
    return {"whole": whole, **stages, REST: max(0.0, whole - sum(stages.values()))}


def _once(call: Callable[[], object]) -> dict[str, float]:
    """One call timed and one profiled."""
    return {"whole": 1e3 * _undisturbed(stopwatch(call)), **_undisturbed(lambda: _profiled(call))}


def _undisturbed(sample: Callable[[], Result]) -> Result:
    """Of up to three, the first during which no other process took the CPU, or the last."""
    for _ in range(3):
        before, result = preemptions(), sample()
        if preemptions() == before:
            break
    return result


def _profiled(call: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
        with record_function(CALL):
            call()
    stages = dict.fromkeys((*STAGES, OTHER), 0.0)
    for event in profiler.events():
        scopes = _scopes(event)
        if CALL in scopes and event.name != EMBEDDING:
            stage = EMBEDDING if EMBEDDING in scopes else STAGE_OF.get(event.name, OTHER)
            stages[stage] += event.self_cpu_time_total / 1e3
    return stages


def _scopes(event: Any) -> set[str]:
    names = set()
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.add(event.name)
    return names


def render(stages: dict[str, float]) -> list[str]:
    """A line a stage, and the share of the kernels that multiply bits."""
    whole = stages["whole"]
    lines = [f"{'stage of the chained model':<28} {'ms':>9} {'%':>6}"]
    lines += [f"{stage:<28} {ms:>9.3f} {100 * ms / whole:>6.1f}" for stage, ms in stages.items() if stage != "whole"]
    kernels = stages[MATMUL] + stages[ATTENTION]
    return [
        *lines,
        f"{'whole':<28} {whole:>9.3f}",
        f"{100 * kernels / whole:.0f} % inside matmul and attention kernels",
    ]
