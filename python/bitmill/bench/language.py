# SPDX-License-Identifier: Apache-2.0
"""`bitmill bench --model smollm2`: a packed language model reads a prompt and decodes. Verified, then timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..checkpoint import file_size
from ..config import Config, FP4Config, Int8Config, SalientConfig
from ..convert import dequantize_, pack_, quantize_
from ..integrations.generation import Decoder
from ..integrations.language import int8_tables_
from ..integrations.transformers import transformers
from ..recipes.layerwise import decoder_blocks
from ..timing import Sample, Spread, interleave
from .language_peers import PEERS, LlamaCpp
from .layers import relative_error
from .models import dynamic_int8, one_line

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {  # SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
}
METHODS: dict[str, Callable[[str], Config]] = {
    "pb-llm": lambda activations: SalientConfig(0.1, activations=activations),
    "fp4": lambda activations: FP4Config(activations=activations),
}
DEFAULT_TOKENS = 128
STEPS = 16  # that are timed together, after the prompt
FLOAT32 = "torch float32"
KINDS = ("prompt", "step", "lean_prompt", "lean_step")  # of what is timed
EXACT = 1e-4  # relative error of the packed model's logits against the float model with the same weights


def run(
    name: str,
    method: str | None = None,
    tokens: int | None = None,
    seconds: float = 2.0,
    progress: bool = False,
    peers: bool = False,
) -> dict[str, Any]:
    """Time a prompt and single steps after it, of a model with random weights, on the threads that torch has.

    Args:
        name: a key of `SHAPES`.
        method: a key of `METHODS`; None for PB-LLM with 10 % salient weights.
        tokens: of the prompt, 128 if None.
        seconds: the aim for each variant, prompt and steps apart.
        progress: show a bar if stderr is a terminal.
        peers: time llama.cpp too, as it runs a model.
    Returns:
        What `bitmill bench --model NAME --json` prints.
    Raises:
        ValueError: for an unknown name or method, or a prompt that is too long.
        RuntimeError: if the packed model does not compute what a float model with its weights computes.
    """
    if name not in SHAPES:
        raise ValueError(f"model must be one of {', '.join(SHAPES)}, got {name!r}")
    method = "pb-llm" if method is None else method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} for a language model, got {method!r}")
    tokens, most = DEFAULT_TOKENS if tokens is None else tokens, SHAPES[name]["max_position_embeddings"] - STEPS - 1
    if not 1 <= tokens <= most:
        raise ValueError(f"tokens must be between 1 and {most}, got {tokens}")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[name])).eval()
    ids = torch.randint(SHAPES[name]["vocab_size"], (1, tokens + 1))
    exact, rounded = (packed_model(model, method, activations) for activations in ("float", "int8"))
    weights = copy.deepcopy(exact)
    dequantize_(weights)
    builders: dict[str, Callable[[], Any]] = {
        FLOAT32: lambda: model,
        "torch bfloat16": lambda: copy.deepcopy(model).bfloat16(),
        "torch dynamic int8": lambda: dynamic_int8(model),
        "bitmill": lambda: exact,
        "bitmill int8": lambda: rounded,
    }
    of_model, of_weights = (last_logits(each, ids) for each in (model, weights))
    samples: dict[str, Sample] = {}
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}
    for variant, build in builders.items():
        ours = variant.startswith("bitmill")
        try:
            timed = build()
            for lean in (False, True):
                wanted = of_weights if ours else of_model
                taken, errors[variant] = verified(timed, ids, wanted, lean, exact=timed is exact)
                samples |= {f"{variant}: {'lean_' * lean}{kind}": sample for kind, sample in taken.items()}
        except Exception as error:  # whatever another engine raises; it must not stop the run
            if ours:
                raise
            failures[variant] = f"failed: {one_line(error)}"
    for variant in PEERS if peers else ():
        try:
            taken, errors[variant] = samples_of(PEERS[variant](model, ids.shape[1] + STEPS), ids, of_model)
            samples |= {f"{variant}: {kind}": sample for kind, sample in taken.items()}
        except Exception as error:
            failures[variant] = f"failed: {one_line(error)}"
    variants = [*builders, *(PEERS if peers else ())]
    with tqdm(desc="timing", unit=" rounds", leave=False, disable=None if progress else True) as bar:
        times = interleave(samples, seconds, bar.update)
    return {
        "bitmill": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "model": name,
        "method": method,
        "tokens": tokens,
        "file_bytes": file_size(exact),
        "float32_bytes": sum(p.nbytes for p in model.parameters()),
        "disturbed": sum(t.disturbed for t in times.values()) / sum(sum(t[3:]) for t in times.values()),
        "variants": [_row(variant, failures.get(variant), errors.get(variant), times, tokens) for variant in variants],
    }


def packed_model(model: Any, method: str, activations: str) -> Any:
    """A packed copy of the model: its decoder blocks, and 8-bit rows for embedding and head."""
    packed = copy.deepcopy(model)
    blocks, _ = decoder_blocks(packed)
    quantize_(packed, METHODS[method](activations), lambda module, name: name.startswith(f"{blocks}."))
    pack_(packed)
    int8_tables_(packed, Int8Config(activations))
    return packed


def last_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [1, vocabulary] after ids int64 [1, m], as transformers runs the model, without a cache."""
    with torch.inference_mode():
        return model(ids, logits_to_keep=1).logits[:, -1]


def verified(
    model: Any, ids: Tensor, wanted: Tensor, lean: bool | None, exact: bool
) -> tuple[dict[str, Sample], float]:
    """Samples of a prompt, all of `ids` int64 [1, m] but the last, and of single steps after it.

    Args:
        wanted: what the logits after `ids` should be, [1, vocabulary].
        lean: of `Decoder`.
        exact: whether they must be that, within `EXACT`.
    Returns:
        "prompt" and "step" to their samples, and the relative error of the logits.
    Raises:
        RuntimeError: if they are off.
    """
    samples, error = samples_of(Decoder(model, ids.shape[1] + STEPS, lean), ids, wanted)
    if exact and not error <= EXACT:
        raise RuntimeError(f"its logits differ from those of its weights by {error:.2g}, relative")
    return samples, error


def samples_of(decoder: Decoder | LlamaCpp, ids: Tensor, wanted: Tensor) -> tuple[dict[str, Sample], float]:
    """What `verified` answers, whatever the error is."""
    prompt = ids[:, :-1]
    decoder.prefill(prompt)
    error = relative_error(decoder.step(ids[:, -1:]).float(), wanted)
    return {"prompt": partial(_prompt, decoder, prompt), "step": partial(_steps, decoder, prompt)}, error


def rates(spread: Spread, float32: Spread | None, tokens: int) -> dict[str, float | None]:
    """Tokens a second of a sample that reads so many, with quartiles, and how many times float32's that is."""
    return {
        "per_second": tokens / spread.median,
        "low": tokens / spread.high,
        "high": tokens / spread.low,
        "x_float32": float32 and float32.median / spread.median,
    }


def _prompt(decoder: Decoder | LlamaCpp, prompt: Tensor) -> float:
    start = time.perf_counter()
    decoder.prefill(prompt)
    return time.perf_counter() - start


def _steps(decoder: Decoder | LlamaCpp, prompt: Tensor) -> float:
    """Seconds of a step, the mean of those after the prompt."""
    decoder.prefill(prompt)
    token = prompt[:, -1:]
    start = time.perf_counter()
    for _ in range(STEPS):
        token = decoder.step(token).argmax(-1, keepdim=True)
    return (time.perf_counter() - start) / STEPS


def _row(
    variant: str, failure: str | None, error: float | None, times: dict[str, Spread], tokens: int
) -> dict[str, Any]:
    """What the JSON holds for a variant; lean ones are compared with plain ones in float32."""
    row: dict[str, Any] = {"name": variant, "status": failure or "ok", "error": error}
    for kind in KINDS:
        row[kind] = dict.fromkeys(("per_second", "low", "high", "x_float32"))
        if f"{variant}: {kind}" in times:
            float32 = times.get(f"{FLOAT32}: {kind.removeprefix('lean_')}")
            row[kind] = rates(times[f"{variant}: {kind}"], float32, tokens if "prompt" in kind else 1)
    return row


def render(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    lines = [
        f"{result['model']}, {result['method']}, random weights, {result['threads']} thread(s), torch"
        f" {result['torch']}, transformers {result['transformers']}, bitmill {result['bitmill']}",
        f"Tokens a second and times float32: a prompt of {result['tokens']}, and single steps after it, as transformers"
        " runs the model;",
        "lean: as bitmill.integrations.generation walks it, against float32 as transformers runs it.",
        "",
        f"{'variant':<19}" + "".join(f" {kind.replace('_', ' '):>15}" for kind in KINDS) + f" {'error':>8}",
    ]
    for row in result["variants"]:
        if row["status"] != "ok":
            lines.append(f"{row['name']:<19} {row['status']}")
            continue
        line = f"{row['name']:<19}"
        for kind in KINDS:
            rate, ratio = row[kind]["per_second"], row[kind]["x_float32"]
            line += f" {f'{rate:,.1f}' if rate else '-':>9} {f'{ratio:.2f}' if ratio else '-':>5}"
        lines.append(f"{line} {row['error']:>8.1e}")
    mib = {key: result[f"{key}_bytes"] / 2**20 for key in ("file", "float32")}
    lines += ["", f"file {mib['file']:.1f} MiB, everything included; float32 {mib['float32']:.0f} MiB"]
    lines.append("error: of the logits, against the float32 model; of packed ones, against the one with their weights")
    if result["disturbed"] > 0.2:
        share = f"{100 * result['disturbed']:.0f} %"
        lines.append(
            f"Other processes interrupted {share} of the samples, which were thrown away: better run it alone."
        )
    return "\n".join(lines)
