# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a model's inference, measured in a process that does nothing else.

Run as a program it is that process: it imports torch, transformers and bitmill, loads a file into a model without
values and runs it a few times, or loads a language model's folder and generates, and prints its resident bytes after
the imports and at the peak since.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

RUNS = 3
STATUS = Path("/proc/self/status")  # its peak is the process's own: ru_maxrss starts with the parent's
CLEAR = Path("/proc/self/clear_refs")


def measure(model: nn.Module, name: str, method: str, lengths: list[int]) -> dict[str, int]:
    """Bytes: "imports" before the model, "peak" on top of them.

    Raises:
        RuntimeError: where there is no /proc, or if the process fails.
    """
    from ..checkpoint import save

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        return _alone({"path": str(path), "name": name, "method": method, "lengths": lengths})


def measure_folder(folder: str | os.PathLike[str], tokens: int, steps: int) -> dict[str, int]:
    """The same of a causal language model that is loaded from its folder, reads a prompt and takes steps after it.

    Args:
        folder: of `recipes.language_folder.open_folder`.
    Raises:
        RuntimeError: where there is no /proc, or if the process fails.
    """
    return _alone({"folder": os.fspath(folder), "tokens": tokens, "steps": steps})


def _alone(task: dict[str, Any]) -> dict[str, int]:
    """What the process of its own prints for a task."""
    if not STATUS.exists():
        raise RuntimeError("peak memory is read from /proc/self/status, which only Linux has; leave it out")
    command = [sys.executable, "-m", __name__, json.dumps({**task, "threads": torch.get_num_threads()})]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(
            f"the process that measures memory failed: {(result.stderr.splitlines() or ['it said nothing'])[-1]}"
        )
    return json.loads(result.stdout.splitlines()[-1])


def render(memory: dict[str, int]) -> str:
    peak, imports = (memory[key] / 2**20 for key in ("peak", "imports"))
    return (
        f"peak memory {peak:.1f} MiB, loading included, on top of {imports:.0f} MiB of Python, torch and transformers"
    )


def resident(field: str) -> int:
    """VmRSS, the resident bytes, or VmHWM, their peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    infer = (_generation if "folder" in task else _runs)(task)
    imports = resident("VmRSS")
    with contextlib.suppress(OSError):  # where it is not allowed, a peak of the imports counts too
        CLEAR.write_text("5")
    infer()
    print(json.dumps({"imports": imports, "peak": resident("VmHWM") - imports}))


def _runs(task: dict[str, Any]) -> Callable[[], None]:
    """Imports what the task needs; answers what loads the model and runs it."""
    from ..checkpoint import load
    from .architectures import empty_model, random_inputs
    from .models import METHODS

    def infer() -> None:
        model = empty_model(task["name"])
        METHODS[task["method"]](model)
        load(model, task["path"])
        inputs = random_inputs(task["name"], task["lengths"])
        with torch.inference_mode():
            for _ in range(RUNS):
                model(**inputs)

    return infer


def _generation(task: dict[str, Any]) -> Callable[[], None]:
    from ..integrations.generation import Decoder
    from ..integrations.transformers import transformers
    from ..recipes.language_folder import open_folder

    with torch.device("meta"):  # transformers imports an architecture when it is asked for
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(task["folder"]))

    def infer() -> None:
        model = open_folder(task["folder"]).model
        decoder = Decoder(model, task["tokens"] + task["steps"])
        logits = decoder.prefill(torch.randint(model.config.vocab_size, (1, task["tokens"])))
        for _ in range(task["steps"]):
            logits = decoder.step(logits.argmax(-1, keepdim=True))

    return infer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
