# SPDX-License-Identifier: Apache-2.0
"""Training in one loop: BertAdam, schedules, batches of similar lengths, and a resume that is exact.

A run is a folder with `checkpoint.pt` (everything that the next step depends on, written atomically), `best.pt` (the
parameters and buffers of the best evaluation) and `log.jsonl` (one line an event). A run that was killed goes on from
its checkpoint with the same losses, to the last bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import strict_json


class BertAdam(torch.optim.AdamW):
    """Adam as BERT was trained: no bias correction, decoupled weight decay, every gradient clipped on its own.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p = p - lr (m / (sqrt(v) + eps) + weight_decay p), where g is the
    gradient of one parameter tensor scaled to a norm of at most `max_norm`, in place. With bias correction m and v are
    divided by 1 - b1^t and 1 - b2^t at step t. Without it the first steps are up to 3 times as large, and a few hundred
    are all that a small task has: such runs often end at the most frequent class (Zhang et al., Revisiting Few-sample
    BERT Fine-tuning, ICLR 2021).

    Args:
        parameters: parameters or groups; a group may set its own lr, weight_decay and max_norm.
        lr: the rate; a scheduler may change it.
        max_norm: bound on the norm of each parameter's gradient.
        bias_correction: whether steps are as large as Adam's from the first on.
    Raises:
        ValueError: for a number out of its range, or a parameter that is a slice with gaps in memory.
    Source: Devlin et al., BERT, 2019, appendix A.2, and the optimizer of the published BiBERT and BiT recipes.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_norm: float = 1.0,
        bias_correction: bool = False,
    ) -> None:
        if lr < 0 or eps <= 0 or max_norm <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "BertAdam: expected lr >= 0, eps > 0, max_norm > 0 and betas in [0, 1), got"
                f" lr={lr}, eps={eps}, max_norm={max_norm}, betas={betas}"
            )
        self.max_norm, self.bias_correction = max_norm, bias_correction
        super().__init__(parameters, lr, betas, eps, weight_decay, fused=True)

    def add_param_group(self, group: dict[str, Any]) -> None:
        super().add_param_group({"max_norm": self.max_norm, **group})
        for p in self.param_groups[-1]["params"]:
            if torch.empty_like(p, device="meta").stride() != p.stride():  # fused steps walk through memory
                self.param_groups.pop()
                raise ValueError(
                    f"BertAdam: parameters must have no gaps in memory, got shape {list(p.shape)} with strides"
                    f" {p.stride()}; use .contiguous()"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = self._start(p)
                if p.grad.stride() != p.stride():
                    p.grad = torch.empty_like(p).copy_(p.grad)
                p.grad.mul_((group["max_norm"] / (p.grad.norm() + 1e-6)).clamp(max=1.0))
        super().step()
        return loss

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        """AdamW's state; after infinitely many steps nothing is left to correct."""
        steps = torch.full((), 0.0 if self.bias_correction else math.inf, device=p.device)
        return {"step": steps, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.01, step_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups as the BERT recipes make them: no decay for biases, norms, shifts and learned steps.

    Args:
        model: parameters that need no gradient are left out.
        weight_decay: of all other parameters.
        step_lr: the rate of learned steps (parameters whose name starts with "alpha"); None for the common one.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    steps: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_step = name.rpartition(".")[2].startswith("alpha")
            (steps if is_step else decayed if p.dim() > 1 else plain).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups.append({"params": steps, "weight_decay": 0.0, **({} if step_lr is None else {"lr": step_lr})})
    return [group for group in groups if group["params"]]


def linear_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises linearly from 0 over the first `warmup` share of the steps, then falls linearly to 0."""
    return _schedule(optimizer, steps, warmup, lambda left: left)


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises linearly from 0 over the first `warmup` share of the steps, then falls to 0 as half a cosine."""
    return _schedule(optimizer, steps, warmup, lambda left: 0.5 * (1 - math.cos(math.pi * left)))


def _schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, fall: Callable[[float], float]
) -> torch.optim.lr_scheduler.LambdaLR:
    """`fall`: the share of the steps after the warm-up that is left to the factor."""

    def factor(step: int) -> float:
        progress = step / max(steps, 1)
        return progress / warmup if progress < warmup else fall(max((1 - progress) / (1 - warmup), 0.0))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Batches:
    """Indices of examples in shuffled batches; the order depends on the seed and the epoch alone.

    With `lengths`, a batch holds examples of similar length: each run of `50 batch_size` shuffled examples is sorted by
    length, cut into batches, and the batches of the epoch are shuffled. The last batch of an epoch may be smaller.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0, lengths: Sequence[int] | None = None) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"Batches: expected at least one example and one a batch, got {count} and {batch_size}")
        self.count, self.batch_size, self.seed, self.lengths = count, batch_size, seed, lengths

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def epoch(self, number: int) -> list[list[int]]:
        order = np.random.default_rng((self.seed, number))
        indices = order.permutation(self.count).tolist()
        if self.lengths is not None:
            pool, lengths = 50 * self.batch_size, self.lengths
            pools = (indices[i : i + pool] for i in range(0, self.count, pool))
            indices = [i for part in pools for i in sorted(part, key=lambda i: lengths[i])]
        batches = [indices[i : i + self.batch_size] for i in range(0, self.count, self.batch_size)]
        return [batches[i] for i in order.permutation(len(batches))] if self.lengths is not None else batches

    def starting_at(self, step: int) -> Iterator[list[int]]:
        """Batches without end, from the given step of the first epoch on."""
        number, skipped = divmod(step, len(self))
        while True:
            yield from self.epoch(number)[skipped:]
            number, skipped = number + 1, 0


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": np.random.get_state()}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def write_atomically(path: Path, value: Any) -> None:
    """torch.save that leaves either the old file or the new one, whatever happens in between."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Run:
    """A training run in a folder: what it has done, and how it goes on.

    Args:
        folder: created if needed; a checkpoint in it is taken up by `fit`.
        model, optimizer, schedule: what a checkpoint holds besides the step, the best score and the random states.
    """

    def __init__(self, folder: str | Path, model: nn.Module, optimizer: Any, schedule: Any) -> None:
        self.folder, self.model, self.optimizer, self.schedule = Path(folder), model, optimizer, schedule
        self.step, self.best, self.seconds = 0, float("-inf"), 0.0
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        numbers = {"step": self.step, "best": self.best, "seconds": self.seconds}
        write_atomically(self.folder / "checkpoint.pt", {**parts, **numbers, "random": _random_state()})

    def resume(self) -> None:
        """Take up the folder's checkpoint, if there is one; lines of the log that it does not know are dropped."""
        checkpoint, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=False)  # random states are no tensors; the file is our own
            for name in ("model", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
            _set_random_state(state["random"])
        if log.exists():
            lines = log.read_text().splitlines()
            known = [line for line in lines if line.endswith("}") and strict_json.loads(line)["step"] <= self.step]
            log.write_text("".join(line + "\n" for line in known))

    def log(self, **values: Any) -> None:
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(strict_json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **values}) + "\n")


def fit(
    run: Run,
    batches: Batches,
    loss: Callable[[list[int]], Tensor],
    steps: int,
    evaluate: Callable[[], dict[str, float]] | None = None,
    every: int = 200,
    log_every: int = 20,
    parts: int = 1,
) -> dict[str, float]:
    """Train for `steps` steps in all, or what is left of them.

    Args:
        run: the folder and what is trained; `run.model` is in training mode for every step, in eval mode to evaluate.
        batches: where the examples of a step come from.
        loss: indices of a batch to a scalar loss.
        steps: optimizer steps from the first to the last, those before a resume included.
        evaluate: the scores, by name; the first one decides which evaluation was best.
        every: steps between evaluations, each followed by a checkpoint.
        log_every: steps between lines with the loss.
        parts: a batch goes through the model in so many parts, one after another, whose gradients add up to that of its
            mean loss; less memory for the same step.
    Returns:
        The last evaluation, with "best" added, or an empty dict.
    Raises:
        ValueError: if a loss is not finite.
    """
    run.resume()
    scores: dict[str, float] = {}
    source, start = batches.starting_at(run.step), time.perf_counter() - run.seconds
    for _ in tqdm(range(run.step, steps), initial=run.step, total=steps, disable=None, unit="step"):
        run.model.train()
        value = _backward(loss, next(source), parts, run.step)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.schedule.step()
        run.step += 1
        run.seconds = time.perf_counter() - start
        if run.step % log_every == 0 or run.step == steps:
            run.log(loss=value, lr=run.schedule.get_last_lr()[0])
        if run.step % every == 0 or run.step == steps:
            if evaluate is not None:
                run.model.eval()
                with torch.no_grad():
                    scores = evaluate()
                score = next(iter(scores.values()))
                if score > run.best:
                    run.best = score
                    write_atomically(run.folder / "best.pt", run.model.state_dict())
                scores = {**scores, "best": run.best}
                run.log(**scores)
            run.save()
    return scores


def _backward(loss: Callable[[list[int]], Tensor], indices: list[int], parts: int, step: int) -> float:
    """The gradients of a batch's mean loss, and the loss."""
    size, total = -(-len(indices) // parts), 0.0
    for first in range(0, len(indices), size):
        part = indices[first : first + size]
        value = loss(part) * (len(part) / len(indices))
        if not torch.isfinite(value):
            raise ValueError(f"fit: the loss must be finite, got {value.item()} at step {step}; lower the rate")
        value.backward()
        total += value.item()
    return total
