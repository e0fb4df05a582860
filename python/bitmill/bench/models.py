# SPDX-License-Identifier: Apache-2.0
"""`bitmill bench --model`: a whole binary model against the float model that it replaces. Verified, then timed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..chained import chain_
from ..checkpoint import file_size
from ..convert import pack_
from ..integrations.transformers import transformers
from ..recipes import bibert, bipft, bit, bivit
from ..timing import ALONE, Spread, interleave, on_one_thread, stopwatch
from . import memory as memory_of
from . import peers as other_engines
from . import stages as stages_of
from .architectures import (
    ARCHITECTURES,
    Inputs,
    image_tokens,
    most_tokens,
    random_inputs,
    random_model,
)
from .layers import relative_error

Bind = Callable[[Inputs], Callable[[], Tensor]]
"""A variant of a model: takes inputs as they come, and answers the call that is timed, whose result are logits."""
Draw = Callable[[], Inputs]
"""Random inputs of the sizes that are timed."""

METHODS: dict[str, Callable[[nn.Module], list[str]]] = {
    "bibert": bibert.binarize_,
    "bit": bit.binarize_,
    "bipft": bipft.binarize_,
    "bivit": partial(bivit.binarize_, mlp_act_bits=1),  # binary activations in the MLP too
    "bivit_mlp_a32": partial(bivit.binarize_, mlp_act_bits=32),
}
ELASTIC = ("bit", "bipft")  # whose first training batch sets the steps
CHAINED, LAYERS = "bitmill, chained", "bitmill, layer by layer"
FLOAT32, BFLOAT16 = "torch float32", "torch bfloat16"

DEFAULT_TOKENS, DEFAULT_TEXTS = 128, 16  # texts of a batch of mixed lengths
MOST_TOKENS = 1 << 16  # in a batch: a few seconds a call in float32
FURTHEST = 1.0  # relative error of the logits: beyond it zeros would be nearer; the table says what it is
NEAR_TIES = 0.1  # and that an elastic model may have against its training form: a softmax in float32 has near ties


def run(
    name: str,
    method: str | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    lengths: tuple[int, int] | None = None,
    profile: bool = False,
    memory: bool = False,
    peers: bool = False,
    seconds: float = 2.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Time a packed model, chained and layer by layer, against the float model, on the threads that torch has.

    Args:
        name: a key of `ARCHITECTURES`.
        method: a key of `METHODS`; None for the model's own.
        tokens: of each text, 128 if None; images have their own number.
        batch: texts or images, 1 if None (16 with `lengths`).
        lengths: shortest and longest of a batch of texts, evenly spread between, padded to the longest. Every variant
            is also timed on about as many real tokens without padding.
        profile: measure the stages of the chained model.
        memory: measure the peak memory of the packed model in a process of its own.
        peers: time int8 models of OpenVINO and ONNX Runtime too.
        seconds: the aim for each variant.
        progress: show a bar if stderr is a terminal.
    Returns:
        What `bitmill bench --model NAME --json` prints.
    Raises:
        ValueError: for an unknown model or method, or sizes that the model does not take.
        RuntimeError: if the packed model does not compute what its training form computes.
    """
    sizes = text_lengths(name, tokens, batch, lengths)
    method = method_of(name, method)
    torch.manual_seed(0)
    model, draw = random_model(name), partial(random_inputs, name, sizes)
    inputs = draw()
    layers, chained, agreement = packed_models(model, method, inputs)

    variants: dict[str, Bind] = {}
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}
    builders: dict[str, Callable[[nn.Module, Draw], Bind]] = {
        FLOAT32: torch_model,
        BFLOAT16: torch_bfloat16,
        "torch dynamic int8": torch_int8,
        **(other_engines.PEERS if peers else {}),
    }
    with torch.inference_mode():
        reference = torch_model(model, draw)(inputs)()
        for variant, build in builders.items():
            try:
                bind = build(model, draw)
                errors[variant] = relative_error(bind(inputs)().float(), reference)
            except ModuleNotFoundError as error:
                failures[variant] = f"not installed: pip install {error.name}"
                continue
            except Exception as error:  # whatever another engine raises; it must not stop the run
                failures[variant] = f"failed: {one_line(error)}"
                continue
            if errors[variant] < FURTHEST:
                variants[variant] = bind
            else:
                failures[variant] = f"wrong: its logits differ by {errors[variant]:.2g}, relative"
        variants[LAYERS], variants[CHAINED] = torch_model(layers, draw), torch_model(chained, draw)

        calls = {variant: bind(inputs) for variant, bind in variants.items()}
        real, whole = sum(sizes), None
        if lengths is not None:
            whole = [max(sizes)] * max(1, round(real / max(sizes)))
            same = random_inputs(name, whole)
            calls |= {f"{variant} without padding": bind(same) for variant, bind in variants.items()}
        with tqdm(desc="timing", unit=" rounds", leave=False, disable=None if progress else True) as bar:
            samples = {key: stopwatch(call) for key, call in calls.items()}
            if torch.get_num_threads() > 1:  # other engines have their own ways to be told
                samples |= on_one_thread(samples, [key for key in variants if key not in other_engines.PEERS])
            times = interleave(samples, seconds, bar.update)
        stages = stages_of.measure(chained, calls[CHAINED]) if profile else None

    rows = [
        _row(variant, failures.get(variant), errors.get(variant), times, real / sum(whole) if whole else None)
        for variant in (*builders, LAYERS, CHAINED)
    ]
    return {
        "bitmill": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "model": name,
        "method": method,
        "batch": len(sizes),
        "tokens": max(sizes),
        "lengths": lengths,
        "real_tokens": real,
        "training_form": agreement,
        "file_bytes": file_size(chained),
        "float32_bytes": sum(p.nbytes for p in model.parameters()),
        "disturbed": sum(time.disturbed for time in times.values()) / sum(sum(time[3:]) for time in times.values()),
        "variants": rows,
        "stages": stages,
        "memory": memory_of.measure(chained, name, method, sizes) if memory else None,
    }


def text_lengths(name: str, tokens: int | None, batch: int | None, lengths: tuple[int, int] | None) -> list[int]:
    """Tokens of each text or image of the batch.

    Raises:
        ValueError: for an unknown model, or what it does not take.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"model must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    most = most_tokens(name)
    if most is None:
        if tokens is not None or lengths is not None:
            raise ValueError(f"{name} takes images, which all have {image_tokens(name)} tokens; leave the number out")
        sizes = [image_tokens(name)] * (batch or 1)
    elif lengths is None:
        tokens = DEFAULT_TOKENS if tokens is None else tokens
        if not 1 <= tokens <= most:
            raise ValueError(f"{name} has {most} positions, so tokens must be between 1 and {most}, got {tokens}")
        sizes = [tokens] * (batch or 1)
    else:
        batch, (shortest, longest) = batch or DEFAULT_TEXTS, lengths
        if tokens is not None or batch < 2:
            raise ValueError("lengths are those of two texts or more, and take the place of tokens; leave it out")
        if not 1 <= shortest <= longest <= most:
            raise ValueError(
                f"{name} has {most} positions, so lengths must be MIN..MAX with 1 <= MIN <= MAX <= {most}, got"
                f" {shortest}..{longest}"
            )
        sizes = torch.linspace(shortest, longest, batch).round().int().tolist()
    if len(sizes) * max(sizes) > MOST_TOKENS:
        raise ValueError(f"a batch must have at most {MOST_TOKENS:,} tokens, got {len(sizes)} x {max(sizes)}")
    return sizes


def method_of(name: str, method: str | None) -> str:
    """The method, or the model's own. Raises ValueError for an unknown one."""
    if method is None:
        return ARCHITECTURES[name].method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return method


def packed_models(model: nn.Module, method: str, inputs: Inputs) -> tuple[nn.Module, nn.Module, str]:
    """Packed forms of a binary copy of the model, layer by layer and chained, and how its training form agrees.

    Raises:
        ValueError: if the method does not fit the model.
        RuntimeError: if one of the three computes something else.
    """
    training: Any = copy.deepcopy(model)
    METHODS[method](training)
    with torch.no_grad():
        if method in ELASTIC:
            training.train()(**inputs)
        wanted = outputs_of(training.eval(), inputs)
        pack_(training, chain=False)
        layers, chained = training, copy.deepcopy(training)
        chain_(chained)
        got, linked = outputs_of(layers, inputs), outputs_of(chained, inputs)
    if not torch.equal(linked, got):
        raise RuntimeError(f"the chained model differs from its layers one by one in {different(linked, got)} outputs")
    if torch.equal(got, wanted):
        return layers, chained, "equal"
    error = relative_error(got, wanted)
    if method not in ELASTIC or error > NEAR_TIES:
        raise RuntimeError(f"the packed model differs from its training form in {different(got, wanted)} outputs")
    return layers, chained, f"within {error:.2g}, relative (near ties of the softmax)"


def outputs_of(model: Any, inputs: Inputs) -> Tensor:
    """Logits, and the last hidden states of all tokens but padding: a binary head hides small differences of these."""
    hidden = model.base_model(**inputs).last_hidden_state
    if "attention_mask" in inputs:
        hidden = hidden[inputs["attention_mask"].bool()]
    return torch.cat((model(**inputs).logits.flatten(), hidden.flatten()))


def different(got: Tensor, want: Tensor) -> str:
    return f"{int((got != want).sum())} of {want.numel()}"


def torch_model(model: Any, _: Draw) -> Bind:
    """The model as it is."""
    return lambda inputs: lambda: model(**inputs).logits


def torch_bfloat16(model: nn.Module, _: Draw) -> Bind:
    """All of it in bfloat16, images too."""
    half: Any = copy.deepcopy(model).bfloat16()

    def bind(inputs: Inputs) -> Callable[[], Tensor]:
        halves = {key: t.bfloat16() if t.is_floating_point() else t for key, t in inputs.items()}
        return lambda: half(**halves).logits

    return bind


def torch_int8(model: nn.Module, draw: Draw) -> Bind:
    return torch_model(dynamic_int8(model), draw)


def dynamic_int8(model: nn.Module) -> nn.Module:
    """torch.ao.quantization.quantize_dynamic of the linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


def _row(
    variant: str, failure: str | None, error: float | None, times: dict[str, Spread], share: float | None
) -> dict[str, Any]:
    """What the JSON holds for a variant; `share` is real tokens of the padded batch / tokens of the other."""
    row: dict[str, Any] = {"name": variant, "status": failure or "ok", "error": error}
    numbers = dict.fromkeys(("milliseconds", "low", "high", "x_float32", "x_bfloat16", "x_one_thread", "padding"))
    if failure is None:
        time, baselines = times[variant], {"x_float32": times.get(FLOAT32), "x_bfloat16": times.get(BFLOAT16)}
        baselines["x_one_thread"] = times.get(variant + ALONE)
        numbers.update(milliseconds=1e3 * time.median, low=1e3 * time.low, high=1e3 * time.high)
        numbers.update({key: base and base.median / time.median for key, base in baselines.items()})
        if share is not None:
            numbers["padding"] = time.median / (share * times[f"{variant} without padding"].median)
    return {**row, **numbers}


def render(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    size = f"{result['batch']} x {result['tokens']} tokens"
    if result["lengths"]:
        shortest, longest = result["lengths"]
        size = f"{result['batch']} texts of {shortest} to {longest} tokens, padded ({result['real_tokens']} real)"
    lines = [
        f"{result['model']}, {result['method']}, {size}, {result['threads']} thread(s), torch {result['torch']},"
        f" transformers {result['transformers']}, bitmill {result['bitmill']}",
        f"Packed outputs, chained and layer by layer, against the training form: {result['training_form']}.",
        "",
        f"{'variant':<24} {'ms':>9} {'quartiles':>17} {'x float32':>10} {'x bfloat16':>11} {'error':>8}"
        + (f" {'x one thread':>13}" if result["threads"] > 1 else "")
        + (f" {'padding':>8}" if result["lengths"] else ""),
    ]
    lines += [_line(row, result["threads"]) for row in result["variants"]]
    if result["lengths"]:
        lines.append("padding: time for a real token, padded batch / batch of about as many tokens without padding")
    if result["stages"]:
        lines += ["", *stages_of.render(result["stages"])]
    mib = {key: result[f"{key}_bytes"] / 2**20 for key in ("file", "float32")}
    lines += ["", f"file {mib['file']:.1f} MiB, everything included; float32 {mib['float32']:.0f} MiB"]
    if result["memory"]:
        lines.append(memory_of.render(result["memory"]))
    if result["disturbed"] > 0.2:
        share = f"{100 * result['disturbed']:.0f} %"
        lines.append(
            f"Other processes interrupted {share} of the samples, which were thrown away: better run it alone."
        )
    return "\n".join(lines)


def _line(row: dict[str, Any], threads: int) -> str:
    if row["status"] != "ok":
        return f"{row['name']:<24} {row['status']}"
    error = "exact" if row["error"] is None else f"{row['error']:.1e}" if row["error"] else "0"
    ratios = (f"{row[key]:.2f}" if row[key] else "-" for key in ("x_float32", "x_bfloat16"))
    line = f"{row['name']:<24} {row['milliseconds']:>9,.2f} {row['low']:>8,.2f}-{row['high']:<8,.2f}"
    line += " {:>10} {:>11}".format(*ratios) + f" {error:>8}"
    if threads > 1:
        line += f" {row['x_one_thread']:>13.2f}" if row["x_one_thread"] else f" {'-':>13}"
    return line if row["padding"] is None else f"{line} {row['padding']:>8.2f}"
