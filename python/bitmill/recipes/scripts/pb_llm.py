# SPDX-License-Identifier: Apache-2.0
"""Make a causal language model partially binary with PB-LLM, save it packed, and measure its perplexity.

    python -m bitmill.recipes.scripts.pb_llm --model llama --calibration c4.txt --evaluation wikitext.txt --out pb-llm

`--model` is a folder of transformers; texts are UTF-8, gzip-ed if their name ends in .gz. `--out` gets
packed.safetensors for `bitmill.load`, the model's config and tokenizer, and result.json; a run that was killed goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import SalientConfig, save, summary
from ...integrations.transformers import transformers
from ..language import perplexity, random_windows
from ..pb_llm import ROUNDING, quantize_
from .common import prepare


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Make a causal language model partially binary with PB-LLM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    p.add_argument("--calibration", required=True, help="text to calibrate on")
    p.add_argument("--evaluation", default=None, help="text to measure the perplexity on, before and after")
    p.add_argument("--out", required=True, help="folder of the run; a run that was stopped there goes on")
    p.add_argument("--fraction", type=float, default=0.1, help="share of the weights that keeps more bits")
    p.add_argument("--bits", type=int, default=8, help="bits of these weights: 4, 8 or 16")
    p.add_argument("--metric", default="hessian", help="how they are chosen: magnitude, hessian or hessian_paper")
    p.add_argument("--group-size", type=int, default=None, help="columns that share scales; the whole row by default")
    p.add_argument("--scale", default="unbiased", help="unbiased, or official as the published code divides")
    p.add_argument("--rounding", default="gptq", choices=ROUNDING, help="whether other columns make up for errors")
    p.add_argument("--samples", type=int, default=128, help="windows of the calibration text")
    p.add_argument("--length", type=int, default=2048, help="tokens of a window, at most as many as the model takes")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the model")
    p.add_argument("--seed", type=int, default=0, help="of the windows")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; the default is torch's")
    p.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    return p


def read_ids(path: str, tokenizer: Any) -> Tensor:
    """A text's ids, int64 [tokens]."""
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8")
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # First, so that a wrong value is told before anything slow.
    config = SalientConfig(args.fraction, args.bits, args.metric, scale=args.scale, group_size=args.group_size)
    prepare(args)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model.to(args.device).eval()
    length = min(args.length, getattr(model.config, "max_position_embeddings", args.length))
    evaluation = None if args.evaluation is None else read_ids(args.evaluation, tokenizer).to(args.device)
    windows = random_windows(read_ids(args.calibration, tokenizer).to(args.device), args.samples, length, args.seed)
    result: dict[str, Any] = {}
    if evaluation is not None:
        result["perplexity_before"] = perplexity(model, evaluation, length)
    out = Path(args.out)
    errors = quantize_(model, windows, config, args.rounding, folder=out / "blocks")
    if evaluation is not None:
        result["perplexity"] = perplexity(model, evaluation, length)
    save(model, out / "packed.safetensors")
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result["file_bytes"] = (out / "packed.safetensors").stat().st_size
    result["bits_per_weight"] = summary(model).bits_per_weight
    result["errors"] = errors
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "errors"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
