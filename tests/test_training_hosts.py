# SPDX-License-Identifier: Apache-2.0
"""Training forms inside what trains them: activation checkpointing, autocast, and DistributedDataParallel."""

from __future__ import annotations

import copy
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bitmill import BinaryConfig, quantize_
from bitmill.nn import BinaryAttention

METHODS = ("bibert", "bit", "bivit_pws", "react")
WIDTH, HEADS = 64, 4


class Block(nn.Module):
    """Projections, attention and an MLP of one bit."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = BinaryAttention("elastic" if method == "bit" else "bool")
        quantize_(self, BinaryConfig(method))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x))


def block(method: str) -> tuple[Block, Tensor]:
    torch.manual_seed(1)
    model, x = Block(method), torch.randn(4, 6, WIDTH)
    model(x)  # the first batch sets elastic steps
    return model, x


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_gives_the_same_gradients(method: str) -> None:
    model, x = block(method)
    again = copy.deepcopy(model)
    model(x).square().sum().backward()
    checkpoint(again, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(again), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_no_binary_layer(method: str) -> None:
    model, x = block(method)
    linear, again = model.qkv, copy.deepcopy(model.qkv)
    want = linear(x)
    want.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        got = again(x)
        loss = got.square().sum()
    loss.backward()
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(gradients(linear), gradients(again), strict=True))


def train_one_rank(rank: int, folder: str, finished: Barrier) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for method in METHODS:
        model, x = block(method)
        parallel = DistributedDataParallel(model)
        parallel(x[2 * rank : 2 * rank + 2]).square().sum().backward()
        if rank == 0:
            torch.save(gradients(model), f"{folder}/{method}.pt")
    finished.wait(120)
    os._exit(0)  # torch aborts now and then where it ends gloo's threads, with or without destroy_process_group


def test_two_processes_average_the_gradients_of_their_halves(tmp_path: Path) -> None:
    finished = torch.multiprocessing.get_context("spawn").Barrier(2)
    torch.multiprocessing.spawn(train_one_rank, (str(tmp_path), finished), nprocs=2)
    for method in METHODS:
        got = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        model, x = block(method)
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for half in x.split(2):
            model.zero_grad()
            model(half).square().sum().backward()
            sums = [total + g for total, g in zip(sums, gradients(model), strict=True)]
        for a, b in zip(got, sums, strict=True):
            torch.testing.assert_close(a, b / 2, rtol=1e-5, atol=1e-6, msg=lambda text, m=method: f"{m}: {text}")


LEARNED = ("bit", "tbt", "statsq", "binarydm")


def train_learned_steps(rank: int, folder: str, finished: Barrier) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for method in LEARNED:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(48, 40), torch.nn.Linear(40, 4))
        quantize_(model, BinaryConfig(method))
        parallel = DistributedDataParallel(model)
        steps = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(rank)
        for _ in range(2):
            steps.zero_grad()
            parallel((1 + rank) * torch.randn(8, 48)).square().sum().backward()
            steps.step()
        torch.save(model.state_dict(), f"{folder}/{method}-{rank}.pt")
    finished.wait(120)
    os._exit(0)


def test_what_the_first_batch_sets_is_the_same_in_both_processes(tmp_path: Path) -> None:
    finished = torch.multiprocessing.get_context("spawn").Barrier(2)
    torch.multiprocessing.spawn(train_learned_steps, (str(tmp_path), finished), nprocs=2)
    for method in LEARNED:
        first, second = (torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True) for rank in range(2))
        assert first.keys() == second.keys() and any("alpha" in key for key in first)
        for key, t in first.items():
            assert torch.equal(t, second[key]), f"{method}: {key}"
