# SPDX-License-Identifier: Apache-2.0
"""What `bitmill demo` does: one real language model stored in six ways, each measured on the same real text.

Each variant takes the whole road a user takes: quantise, pack, save, load into a fresh model, and prove that the
loaded model equals the packed one bit for bit. What is measured and printed is always the loaded model.
"""

from __future__ import annotations

import math
import platform
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bitmill.demo.model import BOS, Stories, load_stories
from bitmill.demo.text import count_tokens, encode_pieces, perplexity, read_text, split_stories
from bitmill.demo.tokenizer import Tokenizer

# fp32 perplexity is 3.80 on this prefix, 3.82 on 71,000 tokens and 4.85 on the whole text: the stories that open
# freely and are hard to tell apart lie in its later parts.
DEFAULT_TOKENS = 28_000
_WIDTH = 120
_SENTENCE_MIN, _SENTENCE_MAX = 8, 40

# name -> (config class of bitmill, its arguments), or None for the model as it is.
VARIANTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "fp32": None,
    "FP4 e2m1": ("FP4Config", {"format": "e2m1"}),
    "MXFP4": ("FP4Config", {"format": "mxfp4"}),
    "salient 30 %": ("SalientConfig", {"fraction": 0.3}),
    "salient 10 %": ("SalientConfig", {"fraction": 0.1}),
    "binary": ("BinaryConfig", {"method": "sign", "act_bits": 32}),
}


def run(
    variants: Sequence[str] | None = None,
    tokens: int | None = None,
    save_dir: str | PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures `variants` (names of VARIANTS, default all) on the text and returns a JSON-ready dict.

    tokens: None evaluates the first DEFAULT_TOKENS tokens (a few seconds in fp32), -1 the whole text.
    save_dir keeps the saved models there; without it they live in a temporary folder.
    """
    chosen = list(VARIANTS) if variants is None else list(variants)
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown or not chosen:
        raise ValueError(f"run: variants must be some of {', '.join(VARIANTS)}, got {', '.join(unknown) or 'none'}")
    tokenizer = Tokenizer.load()
    stories = split_stories(read_text())
    whole = encode_pieces(tokenizer, stories)
    pieces = encode_pieces(tokenizer, stories, tokens=DEFAULT_TOKENS if tokens is None else tokens)
    count = count_tokens(pieces)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        if save_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitmill-demo-")))
        else:
            folder = Path(save_dir)
            folder.mkdir(parents=True, exist_ok=True)
        # disable=None leaves the bar out where the output is no terminal.
        bar = stack.enter_context(
            tqdm(total=count * len(chosen), unit="tok", unit_scale=True, disable=None if progress else True)
        )
        for name in chosen:
            bar.set_description(name)
            rows.append(_measure(name, folder, tokenizer, pieces, bar.update))
    base = next((row["perplexity"] for row in rows if row["name"] == "fp32"), None)
    for row in rows:
        row["ratio_to_fp32"] = None if base is None else row["perplexity"] / base
    used = _count_stories(tokenizer, stories, count)
    return {
        "model": f"stories260K, LLaMA architecture, {sum(p.numel() for p in load_stories().parameters()):,} parameters",
        "text": {
            "name": "TinyStories, validation split",
            "stories": used,
            "tokens": count,
            "statement": f"the first {count:,} of {count_tokens(whole):,} tokens ({used} of {len(stories)} stories)",
        },
        "torch": torch.__version__,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def _measure(
    name: str, folder: Path, tokenizer: Tokenizer, pieces: list[list[int]], progress: Callable[[int], object]
) -> dict[str, Any]:
    import bitmill  # here, so that the parts of the demo can be used without the compiled library

    model = load_stories()
    variant = VARIANTS[name]
    layers: list[str] = []
    if variant is not None:
        config, arguments = variant
        layers = bitmill.quantize_(model, getattr(bitmill, config)(**arguments))
        bitmill.pack_(model)
    path = folder / f"stories260K-{name.replace(' %', '').replace(' ', '-').lower()}.safetensors"
    bitmill.save(model, path)
    loaded = Stories().eval()
    bitmill.load(loaded, path)
    _check_equal(name, model, loaded, pieces)
    result = perplexity(loaded, pieces, progress)
    return {
        "name": name,
        "perplexity": result.perplexity,
        "file_bytes": path.stat().st_size,
        "bits_per_weight": float(bitmill.summary(loaded).bits_per_weight),
        "tokens_per_second": result.tokens / result.seconds,
        "sentence": _sentence(loaded, tokenizer),
        "layers": len(layers),
    }


@torch.no_grad()
def _check_equal(name: str, packed: Stories, loaded: Stories, pieces: list[list[int]]) -> None:
    """Stories() starts from random weights, so a load that leaves anything out cannot pass."""
    length = min(32, max(map(len, pieces)))
    ids = torch.tensor([piece[:length] for piece in pieces if len(piece) >= length][:4])
    expected, got = packed.eval()(ids), loaded(ids)
    if not torch.equal(expected, got):
        raise RuntimeError(
            f"demo: the {name} model must give the same logits after save and load, got a largest difference of "
            f"{float((expected - got).abs().max()):.3g}; please report this as a bug of bitmill"
        )


def _sentence(model: Stories, tokenizer: Tokenizer) -> str:
    def ended(ids: list[int]) -> bool:
        return len(ids) > _SENTENCE_MIN and tokenizer.decode(ids).rstrip('"').endswith((".", "!", "?"))

    return tokenizer.decode(model.generate([BOS], _SENTENCE_MAX, stop=ended))


def _count_stories(tokenizer: Tokenizer, stories: list[str], tokens: int) -> int:
    """How many of the stories the first `tokens` tokens reach into."""
    for index, story in enumerate(stories):
        tokens -= len(tokenizer.encode(story, bos=False))
        if tokens <= 0:
            return index + 1
    return len(stories)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _number(value: float) -> str:
    """About four significant digits at any size, without exponents where a reader can do without."""
    if not math.isfinite(value) or value >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 100 else f"{value:.2f}"


def render(result: dict[str, Any]) -> str:
    """The result as text of at most 120 columns: what was measured, one table, one sentence by each variant."""
    head = ("weights", "perplexity", "vs fp32", "file", "bits/weight", "speed")
    table = [
        (
            row["name"],
            _number(row["perplexity"]),
            "-" if row["ratio_to_fp32"] is None else f"{_number(row['ratio_to_fp32'])} x",
            f"{row['file_bytes'] / 1000:,.1f} KB",
            f"{row['bits_per_weight']:.2f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        )
        for row in result["rows"]
    ]
    widths = [max(map(len, column)) for column in zip(head, *table, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])

    threads = f"{result['threads']} thread{'' if result['threads'] == 1 else 's'}"
    lines = [
        *textwrap.wrap(result["model"], _WIDTH),
        *textwrap.wrap(f"Text: {result['text']['name']}, {result['text']['statement']}", _WIDTH),
        *textwrap.wrap(f"Machine: {result['cpu']}, {threads}, torch {result['torch']}", _WIDTH),
        "",
        line(head),
        line(["-" * width for width in widths]),
        *map(line, table),
        "",
        "What each model writes first (greedy):",
    ]
    for row in result["rows"]:
        # A badly rounded model writes stray bytes; a terminal must not obey them.
        words = "".join(c if c.isprintable() else " " for c in row["sentence"])
        label = f"  {row['name'].ljust(widths[0])}  "
        wrapped = textwrap.wrap(words, _WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
        lines += wrapped or [label.rstrip()]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str | PathLike[str]) -> None:
    """Writes a PNG: perplexity (log) over file size, one labelled point by each variant."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot: matplotlib is needed to draw {path}; pip install matplotlib") from error
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, row in enumerate(result["rows"]):
        point = (row["file_bytes"] / 1000, row["perplexity"])
        axes.plot(*point, "o")
        # Labels alternate above and below: the FP4 formats lie almost on one another.
        offset = (7, 5) if index % 2 == 0 else (7, -12)
        axes.annotate(row["name"], point, xytext=offset, textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlim(0, 1.15 * max(row["file_bytes"] for row in result["rows"]) / 1000)
    axes.margins(y=0.1)
    axes.set_xlabel("file size (KB, 1 KB = 1000 bytes)")
    axes.set_ylabel("perplexity (log scale, lower is better)")
    axes.set_title(f"stories260K on {result['text']['tokens']:,} tokens of TinyStories")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
