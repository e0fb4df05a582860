# SPDX-License-Identifier: Apache-2.0
"""`bitmill quantize`, `eval` and `generate`: models in folders from the command line."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from .. import strict_json
from .arguments import parse_seed, parse_threads

FP4_FORMATS = ("mxfp4", "nvfp4", "nf4", "bnb-fp4")
METHODS = ("pb-llm", "billm", "arb", "arb-x", "arb-rc", "llm-fp4", "fp4", *FP4_FORMATS)
TASKS = ("sst2", "cola", "mrpc", "rte", "stsb", "images")
EVAL_LENGTH = 2048

PERPLEXITY = (
    "The text is tokenised without special tokens and cut into windows of --length tokens, the first of each --stride"
    " tokens after that of the window before; a rest that fills no window is left out. Every window starts with an"
    " empty cache. Every token with another before it in its window is predicted once: with a stride shorter than the"
    " window, in the first window that has it. No BOS token is put in front, unless --bos is given; then each window's"
    " first token is predicted too."
)
SCORES = (
    "An encoder is scored on a task of GLUE (the dev split) or on an image set (the test split). A text model without a"
    " classification head takes stsb: the score is then of the cosines of sentence embeddings, which are means over the"
    " tokens."
)


def add_commands(commands: Any) -> None:
    """Add the three commands to the subparsers of the command line."""
    quantize = commands.add_parser(
        "quantize",
        help="quantise a model after training, to a packed folder",
        description="Quantise the linear layers of the blocks of a causal language model, or, with 4-bit floats, of an"
        " encoder of texts or images, and write a packed folder. A run that was stopped goes on when the same command"
        " is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    quantize.add_argument("model", metavar="MODEL", type=Path, help="folder of transformers, or GGUF file")
    quantize.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write")
    quantize.add_argument("--method", choices=METHODS, default="pb-llm", help="how")
    quantize.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="text to calibrate on (UTF-8, or .gz of it); for an encoder of images the folder of an image set",
    )
    quantize.add_argument(
        "--windows", metavar="N", type=int, default=128, help="random windows of that text, or images"
    )
    quantize.add_argument("--length", metavar="N", type=int, default=2048, help="tokens of a window, at most")
    quantize.add_argument("--seed", type=parse_seed, default=0, help="of the windows")
    quantize.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the model",
    )
    quantize.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    quantize.add_argument("--threads", metavar="N", type=parse_threads, help="threads (default: as torch chooses)")
    quantize.add_argument("--json", action="store_true", help="print JSON")
    methods = quantize.add_argument_group("methods")
    methods.add_argument("--salient", metavar="F", type=float, default=0.1, help="pb-llm: share that keeps more bits")
    methods.add_argument("--bits", type=int, default=8, choices=(4, 8, 16), help="pb-llm: of these weights")
    methods.add_argument(
        "--metric",
        default="hessian",
        choices=("magnitude", "hessian", "hessian_paper"),
        help="pb-llm, billm, arb: how salience is measured",
    )
    methods.add_argument("--structure", default="element", choices=("element", "column"), help="pb-llm: of the salient")
    methods.add_argument("--scale", default="unbiased", choices=("unbiased", "official"), help="pb-llm: of the signs")
    methods.add_argument("--group-size", metavar="N", type=int, help="pb-llm: columns that share scales; none: the row")
    methods.add_argument(
        "--rounding",
        default="gptq",
        choices=("gptq", "rtn"),
        help="pb-llm, billm, arb: whether later columns make up for errors; rtn with metric magnitude needs no text",
    )
    formats = ("e2m1", "e1m2", "e3m0", *FP4_FORMATS)
    methods.add_argument(
        "--format",
        default="e2m1",
        choices=formats,
        help="fp4, llm-fp4 with minmax: this one; the last are methods",
    )
    rules = ("floor", "rceil", "ceil", "even")
    methods.add_argument("--scale-rule", default="floor", choices=rules, help="mxfp4: how a block's scale is chosen")
    methods.add_argument(
        "--activations",
        default="float",
        choices=("float", "int8", "fp4"),
        help="pb-llm, fp4, mxfp4, nvfp4, llm-fp4: int8 is faster and less exact; llm-fp4, mxfp4, nvfp4: fp4 is 4 bits",
    )
    searches = ("scale", "paper", "minmax")
    methods.add_argument(
        "--search",
        default="scale",
        choices=searches,
        help="llm-fp4: of formats and scales, whatever the magnitude; as published; or largest magnitudes, no search",
    )
    errors = ("l2", "l1", "cosine")
    methods.add_argument("--error", default="l2", choices=errors, help="llm-fp4: of a layer's output")
    methods.add_argument(
        "--shift",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="llm-fp4: give input channels exponent biases of their own, or all of them one",
    )
    methods.add_argument(
        "--tables",
        default="int8",
        choices=("int8", "float"),
        help="embedding and output head: 8-bit rows, or as they are",
    )
    quantize.set_defaults(run=_quantize)

    evaluate = commands.add_parser(
        "eval", help="perplexity of a model on a text, or an encoder's score", description=f"{PERPLEXITY} {SCORES}"
    )
    evaluate.add_argument("model", metavar="DIR", type=Path, help="packed folder; or a model as `quantize` takes it")
    measure = evaluate.add_mutually_exclusive_group(required=True)
    measure.add_argument("--text", metavar="FILE", type=Path, help="UTF-8, or .gz of it")
    measure.add_argument("--task", choices=TASKS, help="of an encoder")
    evaluate.add_argument(
        "--data", metavar="DIR", type=Path, help="the task's folder: GLUE's TSV files, or an image set"
    )
    evaluate.add_argument("--length", metavar="N", type=int, help=f"tokens of a window ({EVAL_LENGTH}, or the model's)")
    evaluate.add_argument("--stride", metavar="N", type=int, help="tokens between windows (as many as a window has)")
    evaluate.add_argument("--windows", metavar="N", type=int, help="the first N windows only (all)")
    evaluate.add_argument("--bos", action="store_true", help="put the BOS token in front of each window")
    evaluate.add_argument(
        "--activations", choices=("float", "int8"), help="of a packed folder's layers (as it was made): int8 is faster"
    )
    evaluate.add_argument("--threads", metavar="N", type=parse_threads, help="threads (default: as torch chooses)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_eval)

    generate = commands.add_parser(
        "generate",
        help="continue a text with a model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.add_argument("model", metavar="DIR", type=Path, help="packed folder; or a model as `quantize` takes it")
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="how the text begins")
    generate.add_argument("--tokens", metavar="N", type=int, default=64, help="to add at most")
    generate.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token")
    generate.add_argument("--seed", type=parse_seed, default=0, help="of the draws with a temperature")
    generate.add_argument(
        "--activations", choices=("float", "int8"), help="of a packed folder's layers (as it was made): int8 is faster"
    )
    generate.add_argument("--threads", metavar="N", type=parse_threads, help="threads (default: as torch chooses)")
    generate.set_defaults(run=_generate)


def _quantize(options: argparse.Namespace) -> None:
    _start(options)
    from ..recipes.language_folder import Settings, quantize_folder

    settings = Settings(**{key: value for key, value in vars(options).items() if key in Settings.__annotations__})
    result = quantize_folder(options.model, options.out, settings, options.calibration, options.device)
    if options.json:
        print(strict_json.dumps(result, indent=2))
        return
    print(
        f"{options.out}: {result['bits_per_weight']:.3f} bits a weight in the decoder blocks, file"
        f" {result['file_bytes']:,} bytes, {result['seconds']:,.0f} s, peak memory"
        f" {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )


def _eval(options: argparse.Namespace) -> None:
    _start(options)
    if (options.task is None) != (options.data is None):
        raise ValueError("--task and --data go together")
    if options.task:
        _eval_task(options)
    else:
        _eval_text(options)


def _eval_task(options: argparse.Namespace) -> None:
    from ..recipes.language_folder import evaluate_task

    given = [f"--{name}" for name in ("length", "stride", "windows", "bos") if getattr(options, name)]
    if given:
        raise ValueError(f"{given[0]} goes with --text, got --task")
    scores = evaluate_task(options.model, options.task, options.data, options.activations)
    if options.json:
        print(strict_json.dumps(scores, indent=2))
        return
    first = next(name for name in scores if name != "task")
    print(f"{options.task}: {first} {scores[first]:.2f} % on {scores['examples']:,} examples")


def _eval_text(options: argparse.Namespace) -> None:
    from ..recipes.language_folder import evaluate_folder

    windows = options.length, options.stride, options.windows, options.bos
    result = evaluate_folder(options.model, options.text, *windows, options.activations)
    if options.json:
        print(strict_json.dumps(result, indent=2))
        return
    print(
        f"perplexity {result['perplexity']:.4f} of {options.text.name}: {result['windows']} windows of"
        f" {result['length']} tokens, stride {result['stride']}, {'BOS in front' if result['bos'] else 'no BOS'},"
        f" {result['tokens']:,} tokens predicted"
    )


def _generate(options: argparse.Namespace) -> None:
    _start(options)
    from ..integrations.generation import generate
    from ..recipes.language_folder import open_folder

    model, tokenizer = open_folder(options.model, options.activations)
    prompt = tokenizer(options.prompt, return_tensors="pt").input_ids
    ids, shown, times = prompt[0].tolist(), "", [time.perf_counter()]
    more = generate(model, prompt, options.tokens, options.temperature, options.seed)
    print(options.prompt, end="", flush=True)
    start = len(tokenizer.decode(ids))
    for token in more:
        ids.append(token)
        times.append(time.perf_counter())
        text = tokenizer.decode(ids)[start:]
        if not text.endswith("\ufffd"):  # half a character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    if len(times) > 2:  # the first token waits for the prompt
        print(f"{(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s after the prompt", file=sys.stderr)


def _start(options: argparse.Namespace) -> None:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"it needs {package}, which is not installed: pip install {package}")
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
