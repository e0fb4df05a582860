# SPDX-License-Identifier: Apache-2.0
"""Train a small vision transformer on images, and binary students of it.

    python -m bitmill.recipes.scripts.bivit --data fashion-mnist --out start
    python -m bitmill.recipes.scripts.bivit --data fashion-mnist --out student --teacher start --student bivit

A student learns from the teacher's probabilities. It starts from its weights, but for `binaryvit-pyramid`, BinaryViT's
own model, which starts from new ones. BiViT's two stages (attention first, then MLPs) share the epochs. A run that was
stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import pack_, save, strict_json, summary
from ...integrations.transformers import register_attention, transformers
from .. import binaryvit, bivit
from ..bibert import sign_softmax_attention
from ..binaryvit_pyramid import BinaryViT
from ..images import Images, accuracy, load_images, logits_of
from ..training import Batches, Run, fit
from .common import prepare

ONE_STAGE = (("attn", "mlp"),)
STUDENTS = {  # binarizer, attention
    "naive": ("sign", "sign_softmax"),
    "bibert": ("bibert", "bool"),
    "bivit": ("bivit_pws", "softmax_aware"),
    "binaryvit": None,  # W1A1, with modules of its own
    "binaryvit-pyramid": None,  # W1A1, a model of its own
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Train a small vision transformer on images, or with --teacher a binary student of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", required=True, help="folder with Fashion-MNIST, MNIST or CIFAR-10")
    p.add_argument("--out", required=True, help="folder of the run; a run that was stopped there goes on")
    p.add_argument("--teacher", help="folder of a full-precision run; without it, one is trained")
    p.add_argument("--student", choices=tuple(STUDENTS), default="bivit", help="what the student is binarised like")
    p.add_argument("--mlp-act-bits", type=int, choices=(1, 32), default=32, help="activations in front of MLP weights")
    p.add_argument("--stages", type=int, choices=(1, 2), help="2: attention first, then MLPs; default 2 for bivit")
    p.add_argument("--row-scale", action="store_true", help="bivit with the row scale of its equation 5 in training")
    p.add_argument("--epochs", type=float, default=4, help="passes over the training images, all stages together")
    p.add_argument("--batch-size", type=int, default=64, help="images a step")
    p.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    p.add_argument("--patch", type=int, default=7, help="width of a patch of a new model, in pixels")
    p.add_argument(
        "--width", type=int, default=128, help="channels of a new model, in heads of 32 (pyramid: of its middle stage)"
    )
    p.add_argument("--layers", type=int, default=6, help="blocks of a new model")
    p.add_argument("--every", type=int, default=250, help="steps between evaluations, each followed by a checkpoint")
    p.add_argument("--augment", action="store_true", help="shift and flip the training images; for many epochs")
    p.add_argument("--seed", type=int, default=0, help="of the order, the augmentation and new parameters")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; the default is torch's")
    return p


def new_model(images: Images, args: argparse.Namespace) -> Any:
    """A ViT for these images, with new weights."""
    _, channels, size, _ = images.pixels.shape
    new_config: Any = transformers.ViTConfig
    config = new_config(
        image_size=size,
        patch_size=args.patch,
        num_channels=channels,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        intermediate_size=4 * args.width,
        num_labels=int(images.labels.max()) + 1,
    )
    return transformers.ViTForImageClassification(config)


def new_pyramid(images: Images, args: argparse.Namespace) -> BinaryViT:
    """BinaryViT's model in a small size: three stages of as many blocks each, of half, once and twice the width."""
    _, channels, height, width = images.pixels.shape
    widths = (args.width // 2, args.width, 2 * args.width)
    return BinaryViT(
        (height, width),
        int(images.labels.max()) + 1,
        channels,
        args.patch,
        widths,
        depths=[max(args.layers // 3, 1)] * 3,
        heads=[max(w // 64, 1) for w in widths],
        mlp_ratios=(4, 4, 4),
        reductions=(2, 1, 1),
        step=None,
    )


def logits(model: Any, pixels: Tensor) -> Tensor:
    """Of a model of transformers, or of one that returns nothing else."""
    out = model(pixels)
    return out if isinstance(out, Tensor) else out.logits


def train(
    folder: Path, model: Any, data: tuple[Images, Images], args: argparse.Namespace, epochs: float, teacher: Any = None
) -> None:
    """Train on labels, or on the probabilities of a teacher."""
    images, test = data
    batches = Batches(len(images), args.batch_size, args.seed)
    steps = round(epochs * len(batches))
    decay = 0.05 if teacher is None else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=decay, foreach=True)

    def loss(index: list[int]) -> Tensor:
        pixels, labels = images.batch(index, args.augment)
        predicted = logits(model, pixels)
        if teacher is None:
            return nn.functional.cross_entropy(predicted, labels)
        with torch.no_grad():
            target = logits(teacher, pixels)
        return bivit.distribution_loss(predicted, target)

    def evaluate() -> dict[str, float]:
        return {"accuracy": accuracy(logits_of(lambda x: logits(model, x), test), test)}

    run = Run(folder, model, optimizer, bivit.cosine_schedule(optimizer, steps))
    print(strict_json.dumps({"run": str(folder), **fit(run, batches, loss, steps, evaluate, args.every)}))


def export(folder: Path, model: Any, test: Images) -> dict[str, float]:
    """Pack a trained student, write `packed.safetensors` and `result.json`, and score what was packed."""
    model.eval()
    trained = logits_of(lambda x: logits(model, x), test)
    pack_(model)
    path = folder / "packed.safetensors"
    save(model, path)
    with torch.inference_mode():
        start = time.perf_counter()
        packed = logits_of(lambda x: logits(model, x), test)
        seconds = time.perf_counter() - start
    result = {
        "trained": accuracy(trained, test),
        "packed": accuracy(packed, test),
        "largest_difference_of_logits": (packed - trained).abs().max().item(),
        "images_per_second": round(len(test) / seconds, 1),
        "file_bytes": path.stat().st_size,
        "bits_per_weight": summary(model).bits_per_weight,
    }
    strict_json.write(folder / "result.json", result)
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.stages == 2 and STUDENTS[args.student] is None:
        raise SystemExit(f"--stages 2 goes with bibert, bivit or naive, got {args.student}")
    prepare(args)
    out, data = Path(args.out), load_images(args.data)
    if args.teacher is None:
        model = new_model(data[0], args)
        train(out, model, data, args, args.epochs)
        model.save_pretrained(out)
        return 0
    load = transformers.ViTForImageClassification.from_pretrained
    teacher = load(args.teacher).eval()
    model = new_pyramid(data[0], args) if args.student == "binaryvit-pyramid" else load(args.teacher)
    rules = STUDENTS[args.student]
    stages = bivit.STAGES if (args.stages or 1 + (args.student == "bivit")) == 2 else ONE_STAGE
    register_attention("sign_softmax", sign_softmax_attention)
    for groups in stages:
        if args.student == "binaryvit":
            binaryvit.binarize_(model)
        elif rules is not None:
            bivit.binarize_(model, groups, args.mlp_act_bits, *rules, args.row_scale)
        train(out / "-".join(groups), model, data, args, args.epochs / len(stages), teacher)
    print(strict_json.dumps(export(out, model, data[1])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
