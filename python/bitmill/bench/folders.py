# SPDX-License-Identifier: Apache-2.0
"""Packed language models in folders: speed as multiples of float32 in the same run, and peak memory.

At most `TOGETHER` folders are in memory at once. Each such group is timed in turns with the float32 model, as
transformers runs it, so its multiples are of that float32 and of no other moment of the machine.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..cli import cpu_name
from ..convert import dequantize_
from ..integrations.language import load_pretrained, read_pretrained
from ..integrations.transformers import transformers
from ..nn import PackedFP4Linear, PackedInt8Embedding, PackedInt8Linear
from ..nn._module import PackedModule
from ..ops.int8 import ACTIVATIONS
from ..timing import Sample, Spread, interleave
from .language import DEFAULT_TOKENS, FLOAT32, STEPS, last_logits, rates, verified
from .memory import STATUS, measure_folder

TOGETHER = 3  # folders, each loaded for all kinds of activations that it has
KINDS = (*ACTIVATIONS, "fp4")  # of activations; the last one only as a folder was made


def measure(
    source: str | os.PathLike[str],
    folders: Mapping[str, Path],
    tokens: int = DEFAULT_TOKENS,
    seconds: float = 2.0,
    progress: bool = False,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Time a prompt and single steps after it, and the peak memory of both in a process of its own.

    Args:
        source: the original model, of `integrations.language.read_pretrained`.
        folders: name to a packed folder of it.
        tokens: of the prompt.
        seconds: the aim for each prompt and each steps.
        progress: show a bar if stderr is a terminal.
    Returns:
        Group after group, its names, and `FLOAT32`, to what was found: cpu, threads and versions; disturbed, the share
        of samples that were thrown away; tokens of the prompt and steps; "float", "int8" and "fp4" activations, each to
        `bench.language.rates` of "prompt" and "step" and the relative error of the logits against a float model with
        the same weights, None where the decoder blocks do not take them ("int8") or were not made for them ("fp4");
        memory, as `bench.memory` counts it, None where it cannot.
    Raises:
        ValueError: for a prompt that is too long for the model, or what `load_pretrained` refuses.
        RuntimeError: if a folder's model does not compute what a float model with its weights computes, or the process
            that measures memory fails.
    """
    torch.manual_seed(0)
    original, tokenizer = read_pretrained(source)
    ids = torch.randint(original.config.vocab_size, (1, tokens + 1))
    float32_memory = _float32_memory(original, tokenizer, tokens)
    names = list(folders)
    for start in range(0, max(len(names), 1), TOGETHER):
        group = {name: folders[name] for name in names[start : start + TOGETHER]}
        times, errors = _times(original, group, ids, seconds, progress)
        facts = {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "bitmill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokens": tokens,
            "steps": STEPS,
            "disturbed": sum(t.disturbed for t in times.values()) / sum(sum(t[3:]) for t in times.values()),
        }
        memories = {FLOAT32: float32_memory, **{name: _memory(folder, tokens) for name, folder in group.items()}}
        yield {
            name: {
                **facts,
                **{kind: _found(times, errors, name, kind, tokens) for kind in KINDS},
                "memory": memory,
            }
            for name, memory in memories.items()
        }


def _times(
    original: Any, group: Mapping[str, Path], ids: Tensor, seconds: float, progress: bool
) -> tuple[dict[str, Spread], dict[str, float]]:
    """The spreads of samples such as "NAME float prompt", and the errors of models such as "NAME float"."""
    samples: dict[str, Sample] = {}
    errors: dict[str, float] = {}

    def add(name: str, activations: str, model: Any, wanted: Tensor, lean: bool | None) -> None:
        try:
            taken, errors[f"{name} {activations}"] = verified(model, ids, wanted, lean, exact=activations == "float")
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from None
        samples.update({f"{name} {activations} {read}": sample for read, sample in taken.items()})

    add(FLOAT32, "float", original, last_logits(original, ids), lean=False)
    for name, folder in group.items():
        model = load_pretrained(folder, "float").model
        weights = copy.deepcopy(model)
        dequantize_(weights)
        wanted = last_logits(weights, ids)
        del weights
        add(name, "float", model, wanted, lean=None)
        if takes_int8(model):
            add(name, "int8", load_pretrained(folder, "int8").model, wanted, lean=None)
        made = load_pretrained(folder).model
        if any(m.config.activations not in ACTIVATIONS for m in made.modules() if isinstance(m, PackedFP4Linear)):
            add(name, "fp4", made, wanted, lean=None)
    with tqdm(desc=", ".join(group), unit=" rounds", leave=False, disable=None if progress else True) as bar:
        return interleave(samples, seconds, bar.update), errors


def takes_int8(model: nn.Module) -> bool:
    """Whether packed layers besides 8-bit tables can round their activations to int8."""
    tables = (PackedInt8Embedding, PackedInt8Linear)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedModule) and not isinstance(layer, tables)]
    return any(layer.config.takes_activations("int8") for layer in layers)


def _found(
    times: Mapping[str, Spread], errors: Mapping[str, float], name: str, activations: str, tokens: int
) -> dict[str, Any] | None:
    variant = f"{name} {activations}"
    if variant not in errors:
        return None
    reads = {"prompt": tokens, "step": 1}
    found = {
        read: rates(times[f"{variant} {read}"], times[f"{FLOAT32} float {read}"], count)
        for read, count in reads.items()
    }
    return {**found, "error": errors[variant]}


def _memory(folder: Path, tokens: int) -> dict[str, int] | None:
    return measure_folder(folder, tokens, STEPS) if STATUS.exists() else None


def _float32_memory(model: Any, tokenizer: Any, tokens: int) -> dict[str, int] | None:
    """Of a folder as transformers writes it: reading a GGUF file takes more than the model does."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return _memory(Path(folder), tokens)
