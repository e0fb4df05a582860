# SPDX-License-Identifier: Apache-2.0
"""The command line: `bitmill info`, `demo` and `bench`. Exit code 0 for success, 1 for a failure, 2 for wrong usage."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

from . import __version__
from .timing import check_shape


def main(arguments: list[str] | None = None) -> int:
    """Run a command; answers the exit code."""
    parser = argparse.ArgumentParser(prog="bitmill", description="1-bit, salient and FP4 layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"bitmill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, CPU, instruction set, libraries, and each op's kernel")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="quantise a real language model six ways: perplexity, bytes, speed, text")
    demo.add_argument("--json", action="store_true", help="print JSON")
    demo.add_argument("--save", metavar="DIR", type=Path, help="keep the model files here")
    demo.add_argument("--plot", metavar="FILE", type=Path, help="write a PNG of perplexity against file size")
    demo.add_argument(
        "--tokens", metavar="N", type=int, help="tokens to evaluate (default: a prefix; -1: the whole text)"
    )
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="will a packed layer be faster than nn.Linear on this machine?")
    bench.add_argument("--layer", choices=LAYER_KINDS, help="time this one (default: all)")
    bench.add_argument("--shape", metavar="M,N,K", type=parse_shape, help="M rows, weight N x K (128,768,768)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the activations")
    bench.add_argument("--threads", metavar="N", type=parse_threads, help="threads (default: as torch chooses)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=_bench)

    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"bitmill {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _info(options: argparse.Namespace) -> None:
    facts = collect_info()
    if options.json:
        print(json.dumps(facts, indent=2))
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
        "libraries": {"_C": None, "_ops_cpu": "torch is not installed", "_ops_cuda": "not part of this version"},
        "ops": {},
    }
    try:
        from . import _C

        facts["instruction_sets"], facts["compiler"] = _C.instruction_sets(), _C.compiler()
        facts["instruction_set"] = _C.instruction_set()
    except ImportError as error:
        facts["libraries"]["_C"] = str(error)
    if importlib.util.find_spec("torch") is not None:
        import torch

        from .ops import _library, _machine

        facts["libraries"]["_ops_cpu"] = _library.failure("_ops_cpu")
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
    from .demo.run import plot, render, run

    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    result = run(tokens=options.tokens, save_dir=options.save, progress=not options.json)
    print(json.dumps(result, indent=2) if options.json else render(result))
    if options.plot:
        plot(result, options.plot)


LAYER_KINDS = ("binary", "binary-weight", "salient", "fp4", "mxfp4")


def parse_shape(text: str) -> tuple[int, int, int]:
    """Three sizes; argparse makes an error of it a wrong usage."""
    try:
        m, n, k = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three whole numbers like 128,768,768, got {text!r}") from None
    try:
        check_shape(m, n, k)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return m, n, k


def parse_threads(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1024, got {text!r}")
    return int(text)


def _bench(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ImportError("it needs torch, which is not installed: pip install torch")
    import torch

    from . import bench

    if options.threads:
        torch.set_num_threads(options.threads)
    kinds = (options.layer,) if options.layer else LAYER_KINDS
    result = bench.run(
        kinds, options.shape or bench.DEFAULT_SHAPE, getattr(torch, options.dtype), progress=not options.json
    )
    result = {"cpu": cpu_name(), **result}
    print(json.dumps(result, indent=2) if options.json else f"{result['cpu']}\n{bench.render(result)}")


if __name__ == "__main__":
    sys.exit(main())
