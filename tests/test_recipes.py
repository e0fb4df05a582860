# SPDX-License-Identifier: Apache-2.0
"""Recipes: losses, optimizer, schedule, batches, the loop and its resume, and the text programs end to end."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bitmill.recipes import bibert, distillation, glue
from bitmill.recipes.training import (
    Batches,
    BertAdam,
    Run,
    cosine_schedule,
    fit,
    linear_schedule,
    parameter_groups,
)


def test_losses_are_their_formulas() -> None:
    s, t = torch.randn(5, 3), torch.randn(5, 3)
    want = -sum(t.softmax(1)[i, c] * s.softmax(1)[i, c].log() for i in range(5) for c in range(3)) / 15
    torch.testing.assert_close(distillation.soft_cross_entropy(s, t), want)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(distillation.similarity(x), torch.einsum("bhnd,bhmd->bhnm", x, x) / 5**0.5)
    assert distillation.direction_distance(x, 3 * x) < 1e-6
    torch.testing.assert_close(distillation.direction_distance(x, -x), torch.tensor(2.0))


@pytest.mark.parametrize("name", list(bibert.SOFTMAX_ATTENTIONS))
def test_a_binarised_softmax_is_its_formula(name: str) -> None:
    q, k, v = (torch.randn(2, 3, n, 8).requires_grad_() for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7) < 0.4
    mask[0, 0, 0], mask[0, 0, 1] = False, torch.arange(7) == 2  # a row without a key, and one with a single key
    signs = [torch.where(t >= 0, 1.0, -1.0) for t in (q, k, v)]
    scores = (signs[0] @ signs[1].mT / 8**0.5).masked_fill(~mask, -torch.inf)
    probability = scores.softmax(-1).nan_to_num(0.0)
    bits = probability > 0 if name == "sign_softmax" else probability >= 0.5
    assert not bits[0, :, 0].any() and bits[0, :, 1].sum(-1).eq(1).all()
    attention = bibert.SOFTMAX_ATTENTIONS[name]
    out = attention(q, k, v, mask)
    assert torch.equal(out, bits.float() @ signs[2])
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert torch.equal(attention(q, k, v, additive), out)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    assert v.grad is not None and torch.equal(v.grad, (bits.float().mT @ gradient) * (v.abs() < 1))
    assert q.grad is not None and k.grad is not None and q.grad.any() and k.grad.any()


def test_layers_are_compared_with_their_group_of_the_teacher() -> None:
    teacher = [torch.randn(2, 3, 3) for _ in range(4)]
    last, first = [teacher[1], teacher[3]], [torch.randn(1, 2), torch.randn(1, 2), torch.randn(1, 2)]
    assert distillation.similarity_loss(last, teacher) < 1e-6
    hidden = [first[0], torch.randn(1, 2), first[1], torch.randn(1, 2), first[2]]
    assert distillation.hidden_mse(first, hidden) == 0 and distillation.hidden_direction_loss(first, hidden) < 1e-6
    with pytest.raises(ValueError, match="multiple"):
        distillation.similarity_loss(last, teacher[:3])


def test_masked_similarities_count_as_zero() -> None:
    s = torch.randn(1, 2, 2).requires_grad_()
    t = torch.randn(1, 2, 2)
    masked = s.detach().clone()
    masked[0, 0, 1] = -10000.0
    zero = masked.clone()
    zero[0, 0, 1] = 0
    assert distillation.similarity_loss([masked], [t]) == distillation.similarity_loss([zero], [t])


@pytest.mark.parametrize("bias_correction", [False, True])
def test_bert_adam_is_the_published_step(bias_correction: bool) -> None:
    p = nn.Parameter(torch.randn(7, 300))
    optimizer = BertAdam([p], lr=0.01, weight_decay=0.1, bias_correction=bias_correction)
    want, m, v = p.detach().double(), torch.zeros(7, 300).double(), torch.zeros(7, 300).double()
    for step, scale in enumerate((0.001, 1.0, 30.0), 1):
        p.grad = torch.randn_like(p) * scale
        g = p.grad.double()
        g = g * min(1.0, 1.0 / (g.norm().item() + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        corrected = (1 - 0.9**step, 1 - 0.999**step) if bias_correction else (1, 1)
        update = m / corrected[0] / ((v / corrected[1]).sqrt() + 1e-6)
        want = want - 0.01 * (update + 0.1 * want)
        optimizer.step()
        torch.testing.assert_close(p.detach(), want.float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="lr=-1"):
        BertAdam([p], lr=-1)


def test_bert_adam_takes_parameters_of_any_layout() -> None:
    whole, turned = nn.Parameter(torch.randn(5, 9)), nn.Parameter(torch.randn(9, 5))
    with torch.no_grad():
        turned.copy_(whole.T)
    turned.data = turned.data.T.contiguous().T
    grad = torch.randn(5, 9)
    optimizer = BertAdam([whole, turned], lr=0.1)
    for layout in (torch.preserve_format, torch.contiguous_format):
        whole.grad, turned.grad = grad.clone(), grad.T.clone(memory_format=layout)
        optimizer.step()
        torch.testing.assert_close(whole.detach(), turned.detach().T)
    with pytest.raises(ValueError, match=r"no gaps in memory, got shape \[5, 4\] with strides \(9, 2\)"):
        optimizer.add_param_group({"params": nn.Parameter(torch.randn(5, 9)[:, :8:2])})
    assert len(optimizer.param_groups) == 1


def test_groups_and_schedule() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.register_parameter("alpha_q", nn.Parameter(torch.ones(())))
    decayed, plain, steps = parameter_groups(model, 0.01, step_lr=1e-4)
    assert [len(group["params"]) for group in (decayed, plain, steps)] == [1, 3, 1]
    assert (decayed["weight_decay"], plain["weight_decay"], steps["lr"]) == (0.01, 0.0, 1e-4)
    optimizer = BertAdam(parameter_groups(model), lr=1.0)
    schedule = linear_schedule(optimizer, steps=20, warmup=0.1)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.5, *((20 - i) / 18 for i in range(2, 21))])
    schedule = cosine_schedule(optimizer, steps=20, warmup=0.1)
    factors = [schedule.lr_lambdas[0](step) for step in range(21)]
    wave = [(1 + math.cos(math.pi * (i - 2) / 18)) / 2 for i in range(2, 21)]
    assert factors == pytest.approx([0, 0.5, *wave], abs=1e-12)


@pytest.mark.parametrize("lengths", (None, [i % 13 for i in range(103)]))
def test_batches_visit_every_example_once_and_start_anywhere(lengths: list[int] | None) -> None:
    batches = Batches(103, 8, 3, lengths)
    assert len(batches) == 13
    for number in (0, 1):
        assert sorted(i for batch in batches.epoch(number) for i in batch) == list(range(103))
    assert batches.epoch(0) != batches.epoch(1) and batches.epoch(0) == Batches(103, 8, 3, lengths).epoch(0)
    source = batches.starting_at(0)
    every = [next(source) for _ in range(30)]
    again = batches.starting_at(17)
    assert [next(again) for _ in range(13)] == every[17:]
    with pytest.raises(ValueError, match="at least one"):
        Batches(0, 8)


RUN = """
import os, signal, sys
import torch
from torch import nn
from bitmill import BinaryConfig, quantize_
from bitmill.recipes.training import Batches, BertAdam, Run, fit, linear_schedule
folder, last = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(5)
x, y = torch.randn(60, 12), torch.randint(3, (60,))
model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 3))
quantize_(model, BinaryConfig("bit"))
optimizer = BertAdam(model.parameters(), 1e-3)
run = Run(folder, model, optimizer, linear_schedule(optimizer, 40))
def loss(index):
    if run.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(model(x[index]), y[index])
evaluate = lambda: {"accuracy": (model(x).argmax(1) == y).double().mean().item()}
fit(run, Batches(60, 7, 1), loss, 40, evaluate, every=6, log_every=1)
"""


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    def train(folder: str, last: int) -> int:
        command = [sys.executable, "-c", RUN, str(tmp_path / folder), str(last)]
        return subprocess.run(command, capture_output=True, timeout=120).returncode

    def log(folder: str) -> list[dict[str, float]]:
        lines = map(json.loads, (tmp_path / folder / "log.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert train("whole", -1) == 0
    assert train("killed", 15) == -9 and train("killed", 33) == -9 and train("killed", -1) == 0
    assert len(log("whole")) == 47 and log("killed") == log("whole")
    states = [torch.load(tmp_path / f / "checkpoint.pt", weights_only=False)["model"] for f in ("whole", "killed")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_parts_of_a_batch_make_the_step_of_the_whole(tmp_path: Path) -> None:
    x, y, seen = torch.randn(23, 6), torch.randn(23, 2), []
    start = nn.Linear(6, 2).state_dict()

    def train(parts: int) -> nn.Module:
        model = nn.Linear(6, 2)
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = Run(tmp_path / str(parts), model, optimizer, linear_schedule(optimizer, 4))

        def loss(index: list[int]) -> torch.Tensor:
            seen.append(len(index))
            return nn.functional.mse_loss(model(x[index]), y[index])

        fit(run, Batches(23, 10), loss, 4, every=4, log_every=1, parts=parts)
        return model

    whole, split = train(1), train(3)
    assert seen == [10, 10, 3, 10, *(4, 4, 2) * 2, 1, 1, 1, 4, 4, 2]
    torch.testing.assert_close(split.state_dict(), whole.state_dict())
    logs = [(tmp_path / str(parts) / "log.jsonl").read_text().splitlines() for parts in (1, 3)]
    for a, b in zip(*logs, strict=True):
        assert json.loads(a)["loss"] == pytest.approx(json.loads(b)["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = BertAdam(model.parameters(), 1e-3)
    run = Run(tmp_path, model, optimizer, linear_schedule(optimizer, 3))
    with pytest.raises(ValueError, match="must be finite, got nan at step 0"):
        fit(run, Batches(4, 2), lambda index: model.weight.sum() * float("nan"), 3)


def test_metrics_of_glue() -> None:
    logits = torch.tensor([[2.0, 0], [0, 1], [0, 1], [1, 0], [0, 3]])
    got = glue.scores(glue.TASKS["cola"], logits, [0, 1, 0, 0, 1])
    assert next(iter(got)) == "matthews"
    assert got["accuracy"] == pytest.approx(80) and got["f1"] == pytest.approx(80)
    assert got["matthews"] == pytest.approx(100 * (2 * 2 - 1 * 0) / (3 * 2 * 3 * 2) ** 0.5)
    regression = glue.scores(glue.TASKS["stsb"], torch.tensor([[1.0], [2], [2], [9]]), [1.0, 2.0, 3.0, 4.0])
    assert regression["spearman"] == pytest.approx(100 * 4.5 / (4.5 * 5) ** 0.5)
    assert regression["pearson"] == pytest.approx(100 * 12 / (41 * 5) ** 0.5)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "plot", "very", "dull", "bright"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny pretrained BERT, and an SST-2 of twelve words: plain and gzip-ed TSV."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="the text programs need transformers 5")
    model, data = tmp_path / "model", tmp_path / "data"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    data.mkdir()
    rows = [("a very good film", 1), ("a dull plot", 0), ("bright", 1), ("a bad bad plot", 0)] * 8
    text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in rows)
    (data / "train.tsv").write_text(text)
    (data / "dev.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return model, data


def test_text_programs_end_to_end(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from bitmill.recipes.scripts import bibert as bibert_script
    from bitmill.recipes.scripts import bipft, bit, finetune, plot

    model, data = folders
    common = ["--data", str(data), "--epochs", "3", "--lr", "1e-2", "--every", "4", "--batch-size", "8"]
    teacher = str(tmp_path / "teacher")
    assert finetune.main([*common, "--model", str(model), "--out", teacher]) == 0
    jobs = {
        "bibert": (bibert_script, "--teacher", teacher),
        "baseline": (bibert_script, "--teacher", teacher, "--variant", "baseline"),
        "threshold": (bibert_script, "--teacher", teacher, "--variant", "threshold"),
        "multi": (bit, "--teacher", teacher, "--schedule", "multi"),
        "bipft": (bipft, "--model", teacher),
    }
    for name, (program, *options) in jobs.items():
        out = tmp_path / name
        assert program.main([*common, *options, "--out", str(out), "--score", "train"]) == 0
        result = json.loads((out / "result.json").read_text())
        assert result["packed"] == result["trained"] == result["splits"]["train"], name  # train and dev are the same
        assert result["file_bytes"] == (out / "packed.safetensors").stat().st_size
    lines = plot.table([tmp_path / name for name in jobs]).splitlines()
    assert len(lines) == 7 and lines[5].startswith("| multi | 12 |")  # the steps of both stages
    with pytest.raises(FileNotFoundError, match=r"neither test\.tsv nor test\.tsv\.gz"):
        bibert_script.main([*common, "--teacher", teacher, "--out", str(tmp_path / "bibert"), "--score", "test"])
    assert finetune.main([*common, "--model", str(model), "--out", teacher, "--score", "train"]) == 0
    result = json.loads(Path(teacher, "result.json").read_text())
    assert result["splits"]["train"]["accuracy"] == result["accuracy"]  # of a run that was complete
    with pytest.raises(SystemExit, match="other values of --lr"):
        finetune.main([*common, "--model", str(model), "--out", teacher, "--lr", "1"])
