# SPDX-License-Identifier: Apache-2.0
"""Train a partially binary language model with PB-LLM, pack it, and measure what the training recovers.

    python -m bitmill.recipes.scripts.pb_llm_qat --model llama --text c4.txt --evaluation wikitext.txt --out trained
    python -m bitmill.recipes.scripts.pb_llm_qat --model stories260K --out trained

`--model` is a folder of transformers, or the demo's model, which brings its own text. The model is rounded first
(PB-LLM after training), which decides what is salient; then the original model trains with these weights frozen.
Perplexities of all stages go to result.json, the trained model to packed.safetensors, for `bitmill.load`. A run that
was killed goes on where it stopped, with the same losses.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import SalientConfig, load, pack_, save, strict_json, summary
from ...demo.model import BOS, load_stories
from ...demo.run import DEFAULT_TOKENS
from ...demo.text import encode_pieces, read_text, split_stories
from ...demo.text import perplexity as perplexity_of_pieces
from ...demo.tokenizer import Tokenizer
from .. import pb_llm, pb_llm_qat
from ..language import perplexity, random_windows, read_ids
from ..training import Batches, Run, cosine_schedule, fit
from .common import prepare

DEMO = "stories260K"
EVALUATED = 100  # stories at the beginning of the demo's text that are not trained on; its evaluation ends before


class Material(NamedTuple):
    """What a run works on: how to load the model, ids to train on (int64 [tokens]), the longest window, how the
    perplexity of a model is measured, if it is, and what has to lie beside the packed file."""

    load: Callable[[], Any]
    ids: Tensor
    longest: int
    perplexity: Callable[[Any], float] | None
    companions: tuple[Any, ...] = ()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Train a partially binary language model with PB-LLM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--model", required=True, help=f"folder of the model and its tokenizer, or {DEMO}")
    p.add_argument("--text", default=None, help="text to train on")
    p.add_argument("--evaluation", default=None, help="text to measure the perplexity on")
    p.add_argument("--out", required=True, help="folder of the run; a run that was stopped there goes on")
    p.add_argument("--fraction", type=float, default=0.1, help="share of the weights that keeps more bits")
    p.add_argument("--bits", type=int, default=8, help="bits of these weights: 4, 8 or 16")
    p.add_argument(
        "--metric", default="hessian", help="how they are chosen: magnitude, quantile, hessian, hessian_paper"
    )
    p.add_argument("--group-size", type=int, default=None, help="columns that share scales; the whole row by default")
    p.add_argument("--granularity", default="row", help="row, or layer as in the published program")
    p.add_argument("--surrogate", default="identity", help="window of the gradient: identity, clip or ede")
    p.add_argument("--samples", type=int, default=128, help="windows of the text to calibrate the rounding on")
    p.add_argument("--steps", type=int, default=pb_llm_qat.STEPS, help="optimizer steps")
    p.add_argument("--lr", type=float, default=pb_llm_qat.LR, help="highest learning rate")
    p.add_argument("--batch-size", type=int, default=8, help="windows a step")
    p.add_argument("--parts", type=int, default=1, help="parts that a batch goes through the model in; saves memory")
    p.add_argument("--length", type=int, default=2048, help="tokens of a window, at most as many as the model takes")
    p.add_argument("--every", type=int, default=500, help="steps between evaluations, each followed by a checkpoint")
    p.add_argument("--seed", type=int, default=0, help="of the windows and their order")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; the default is torch's")
    p.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    return p


def demo_material() -> Material:
    tokenizer, stories = Tokenizer.load(), split_stories(read_text())
    pieces = encode_pieces(tokenizer, stories, tokens=DEFAULT_TOKENS)
    ids = [i for story in stories[EVALUATED:] for i in (BOS, *tokenizer.encode(story, bos=False))]
    model = load_stories()
    return Material(
        load_stories, torch.tensor(ids), model.config.context, lambda m: perplexity_of_pieces(m, pieces).perplexity
    )


def folder_material(args: argparse.Namespace) -> Material:
    from ...integrations.transformers import transformers

    if args.text is None:
        raise SystemExit("--text must name the text to train on")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    config = transformers.AutoConfig.from_pretrained(args.model)
    longest = getattr(config, "max_position_embeddings", args.length)
    evaluation = None if args.evaluation is None else read_ids(args.evaluation, tokenizer).to(args.device)

    def fresh() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, use_cache=False)

    def measure(model: Any) -> float:
        assert evaluation is not None
        return perplexity(model, evaluation, min(args.length, longest))

    ids = read_ids(args.text, tokenizer)
    return Material(fresh, ids, longest, None if evaluation is None else measure, (config, tokenizer))


def rounded_(model: Any, windows: list[Tensor], config: SalientConfig, out: Path) -> None:
    """Round the model after training, or take what an earlier run left in `out`."""
    file = out / "rounded.safetensors"
    if file.exists():
        load(model, file)
    else:
        pb_llm.quantize_(model, windows, config, folder=out / "blocks")
        save(model, file)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # First, so that a wrong value is told before anything slow.
    config = SalientConfig(
        args.fraction,
        args.bits,
        args.metric,
        centre=False,
        group_size=args.group_size,
        granularity=args.granularity,
        surrogate=args.surrogate,
    )
    prepare(args)
    out, device = Path(args.out), args.device
    material = demo_material() if args.model == DEMO else folder_material(args)
    length, result = min(args.length, material.longest), {}

    def measure(stage: str, model: Any) -> None:
        if material.perplexity is not None:
            result[stage] = material.perplexity(model)

    model = material.load().to(device).eval()
    measure("float", model)
    calibration = random_windows(material.ids.to(device), args.samples, length, args.seed)
    rounded_(model, calibration, dataclasses.replace(config, centre=True), out)
    measure("rounded", model)
    masks = pb_llm_qat.masks_of(model)

    model = material.load().to(device).eval()
    pb_llm_qat.binarize_(model, config, masks)
    del masks
    measure("start", model)
    windows = material.ids[: len(material.ids) // length * length].view(-1, length)
    optimizer = pb_llm_qat.optimizer(model, args.lr)
    run = Run(out, model, optimizer, cosine_schedule(optimizer, args.steps, pb_llm_qat.WARMUP))

    def evaluate() -> dict[str, float]:
        assert material.perplexity is not None
        value = material.perplexity(model)
        return {"inverse_perplexity": 1 / value, "perplexity": value}

    fit(
        run,
        Batches(len(windows), args.batch_size, args.seed),
        lambda indices: pb_llm_qat.next_token_loss(model, windows[indices].to(device)),
        args.steps,
        None if material.perplexity is None else evaluate,
        args.every,
        parts=args.parts,
    )
    best = out / "best.pt"
    if best.exists():
        model.load_state_dict(torch.load(best, weights_only=True))
    model.eval()
    measure("trained", model)
    pack_(model)
    measure("packed", model)
    save(model, out / "packed.safetensors")
    for companion in material.companions:
        companion.save_pretrained(out)
    facts = {"perplexity": result, "file_bytes": (out / "packed.safetensors").stat().st_size}
    facts["bits_per_weight"] = summary(model).bits_per_weight
    strict_json.write(out / "result.json", facts)
    print(strict_json.dumps(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
