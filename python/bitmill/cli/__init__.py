# SPDX-License-Identifier: Apache-2.0
"""The command line: `bitmill info`, `demo`, `bench`, and for language models `quantize`, `eval` and `generate`.

Exit code 0 for success, 1 for a failure, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import Any

from .. import __version__, strict_json
from . import language
from .arguments import parse_count, parse_lengths, parse_shape, parse_threads


def main(arguments: list[str] | None = None) -> int:
    """Run a command; answers the exit code."""
    parser = argparse.ArgumentParser(prog="bitmill", description="1-bit, salient and FP4 layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"bitmill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, CPU, instruction set, libraries, and each op's kernel")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="quantise a real language model five ways: perplexity, bytes, speed, text")
    demo.add_argument("--json", action="store_true", help="print JSON")
    demo.add_argument("--save", metavar="DIR", type=Path, help="keep the model files here")
    demo.add_argument("--plot", metavar="FILE", type=Path, help="write a PNG of perplexity against file size")
    demo.add_argument(
        "--tokens", metavar="N", type=int, help="tokens to evaluate (default: a prefix; -1: the whole text)"
    )
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="will a packed layer or model be faster than the float one, here?")
    bench.add_argument("--threads", metavar="N", type=parse_threads, help="threads (default: as torch chooses)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    layer = bench.add_argument_group("layers", "packed layers against nn.Linear (default)")
    layer.add_argument("--layer", choices=LAYER_KINDS, help="time this one (default: all)")
    layer.add_argument("--shape", metavar="M,N,K", type=parse_shape, help="M rows, weight N x K (128,768,768)")
    layer.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the activations (float32)")
    model = bench.add_argument_group(
        "models", "a whole binary model, chained and layer by layer, against torch's float32, bfloat16 and int8 models"
    )
    model.add_argument(
        "--model",
        choices=(*MODELS, *LANGUAGE_MODELS),
        help="an architecture of transformers, with random weights; smollm2 is timed reading a prompt and decoding",
    )
    model.add_argument(
        "--method",
        choices=(*MODEL_METHODS, *LANGUAGE_METHODS),
        help="(bibert for texts, bivit for images, pb-llm with 10 %% salient weights for smollm2)",
    )
    model.add_argument("--tokens", metavar="N", type=parse_count, help="of each text (128)")
    model.add_argument("--batch", metavar="B", type=parse_count, help="texts or images (1; with --lengths 16)")
    model.add_argument(
        "--lengths", metavar="MIN..MAX", type=parse_lengths, help="texts of mixed lengths, and what their padding costs"
    )
    model.add_argument("--profile", action="store_true", help="where the time of the chained model goes")
    model.add_argument("--memory", action="store_true", help="peak memory of the packed model, in another process")
    model.add_argument(
        "--peers",
        action="store_true",
        help="int8 of OpenVINO (with nncf) and ONNX Runtime (with onnx); llama.cpp (with gguf) for smollm2",
    )
    bench.set_defaults(run=_bench, error=bench.error)
    language.add_commands(commands)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"bitmill {options.command}: {_sentence(error).removeprefix(f'{options.command}: ')}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _info(options: argparse.Namespace) -> None:
    facts = collect_info()
    if options.json:
        print(strict_json.dumps(facts, indent=2))
        return
    for key in ("bitmill", "python", "torch", "numpy", "safetensors", "platform", "cpu"):
        print(f"{key:<16} {facts[key]}")
    sets = ", ".join(facts["instruction_sets"]) or "none (no compiled kernels)"
    print(f"{'instructions':<16} {facts['instruction_set'] or 'none'} chosen of {sets}")
    print(f"{'threads':<16} {facts['threads']}")
    print("libraries")
    for library, state in facts["libraries"].items():
        print(f"  {library:<14} {'loaded' if state is None else state}")
    print("ops (kernel on CPU tensors)")
    for op, kernel in facts["ops"].items():
        print(f"  {op:<22} {kernel}")


def collect_info() -> dict[str, Any]:
    """What `bitmill info --json` prints. A library's state is null if it is loaded, otherwise the reason."""
    facts: dict[str, Any] = {
        "bitmill": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "safetensors")},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "instruction_sets": [],
        "instruction_set": None,
        "threads": None,
        "libraries": {"_C": None, "_ops_cpu": "torch is not installed", "_ops_cuda": "torch is not installed"},
        "ops": {},
    }
    try:
        from .. import _C

        facts["instruction_sets"], facts["compiler"] = _C.instruction_sets(), _C.compiler()
        facts["instruction_set"] = _C.instruction_set()
    except ImportError as error:
        facts["libraries"]["_C"] = str(error)
    if importlib.util.find_spec("torch") is not None:
        import torch

        from ..ops import _library, _machine

        facts["libraries"].update({name: _library.failure(name) for name in ("_ops_cpu", "_ops_cuda")})
        facts["instruction_set"], facts["threads"] = _machine.instruction_set(), torch.get_num_threads()
        names = (name for name in _library.op_names() if name != "instruction_set")
        facts["ops"] = {name: _machine.kernel_of(name) for name in names}
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Model name of the CPU, with family and model number where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    numbers = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return name + numbers


def _demo(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ImportError("it needs torch, which is not installed: pip install torch")
    from ..demo.run import plot, render, run

    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    result = run(tokens=options.tokens, save_dir=options.save, progress=not options.json)
    print(strict_json.dumps(result, indent=2) if options.json else render(result))
    if options.plot:
        plot(result, options.plot)


LAYER_KINDS = ("binary", "binary-weight", "salient", "fp4", "mxfp4")
MODELS = ("bert-base", "minilm", "deit-t", "deit-s", "deit-b")
MODEL_METHODS = ("bibert", "bit", "bipft", "bivit", "bivit_mlp_a32")
LANGUAGE_MODELS = ("smollm2",)
LANGUAGE_METHODS = ("pb-llm", "fp4")
LAYER_OPTIONS = ("layer", "shape", "dtype")
LANGUAGE_OPTIONS = ("method", "tokens", "peers")
MODEL_OPTIONS = (*LANGUAGE_OPTIONS, "batch", "lengths", "profile", "memory")


def _bench(options: argparse.Namespace) -> None:
    given = [f"--{name}" for name in (LAYER_OPTIONS if options.model else MODEL_OPTIONS) if getattr(options, name)]
    if given:
        options.error(f"{given[0]} does not go with --model" if options.model else f"{given[0]} needs --model")
    if options.model in LANGUAGE_MODELS:
        given = [f"--{name}" for name in MODEL_OPTIONS if name not in LANGUAGE_OPTIONS and getattr(options, name)]
        if given:
            options.error(f"{given[0]} does not go with --model {options.model}")
    if importlib.util.find_spec("torch") is None:
        raise ImportError("it needs torch, which is not installed: pip install torch")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    result, text = _bench_model(options) if options.model else _bench_layers(options)
    result = {"cpu": cpu_name(), **result}
    print(strict_json.dumps(result, indent=2) if options.json else f"{result['cpu']}\n{text}")


def _bench_layers(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    from ..bench import layers

    kinds, dtype = (options.layer,) if options.layer else LAYER_KINDS, getattr(torch, options.dtype or "float32")
    result = layers.run(kinds, options.shape or layers.DEFAULT_SHAPE, dtype, progress=not options.json)
    return result, layers.render(result)


def _bench_model(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if options.model in LANGUAGE_MODELS:
        from ..bench import language as language_models

        chosen = {name: getattr(options, name) for name in LANGUAGE_OPTIONS}
        result = language_models.run(options.model, **chosen, progress=not options.json)
        return result, language_models.render(result)
    from ..bench import models

    chosen = {name: getattr(options, name) for name in MODEL_OPTIONS}
    result = models.run(options.model, **chosen, progress=not options.json)
    return result, models.render(result)


if __name__ == "__main__":
    sys.exit(main())
