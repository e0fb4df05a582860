# SPDX-License-Identifier: Apache-2.0
"""BinaryAttention: the functions by kind, the learned steps, and what every module must survive."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from bitmill.binarize import bool_attention, elastic_alpha, elastic_attention, softmax_aware_attention
from bitmill.nn import BinaryAttention

KINDS = ("bool", "softmax_aware", "elastic")


def qkv(m: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, m, 16), torch.randn(2, 3, m, 8)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def test_kinds_are_their_functions() -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 1, 9) < 0.7
    layer = BinaryAttention("bool", zero="plus")
    assert torch.equal(layer(q, k, v, mask, 0.5), bool_attention(q, k, v, mask, 0.5, "plus"))
    layer = BinaryAttention("softmax_aware", head_dim=16, beta=0.4)
    assert torch.equal(layer(q, k, v, mask, 0.5), softmax_aware_attention(q, k, v, mask, 0.5, 0.4))
    layer = BinaryAttention("elastic")
    y = layer(q, k, v, mask, 0.5)
    steps = [layer.alpha_q, layer.alpha_k, layer.alpha_v, layer.alpha_a]
    assert torch.equal(y, elastic_attention(q, k, v, *steps, mask=mask, scaling=0.5))
    assert not BinaryAttention("bool").state_dict()


def test_the_first_training_batch_sets_the_steps() -> None:
    layer = BinaryAttention("elastic").eval()
    q, k, v = qkv()
    first = layer(q, k, v)
    assert not layer.alpha_ready and layer.alpha_q.item() == 1
    layer.train()
    assert torch.equal(layer(q, k, v), first)
    assert layer.alpha_ready
    for name, t in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(layer.get_parameter(f"alpha_{name}"), elastic_alpha(t))
    torch.testing.assert_close(layer.alpha_a.detach(), torch.tensor(4 / 9))
    layer(2 * q, 2 * k, 2 * v).sum().backward()
    assert torch.equal(layer.alpha_q, elastic_alpha(q))  # later batches leave them to the optimizer
    assert all(p.grad is not None for p in layer.parameters())
    again = BinaryAttention("elastic").eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(q, k, v), first)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_for_training(kind: str) -> None:
    layer, (q, k, v) = BinaryAttention(kind, dropout=0.6), qkv(40)
    layer(q, k, v)
    assert not torch.equal(layer(q, k, v), layer(q, k, v))
    assert torch.equal(layer(q, k, v, dropout=0.0), layer(q, k, v, dropout=0.0))
    layer.eval()
    assert torch.equal(layer(q, k, v), layer(q, k, v, dropout=0.9))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_files_and_empty_batches(kind: str) -> None:
    layer, (q, k, v) = BinaryAttention(kind), qkv()
    y = layer(q, k, v)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(q, k, v), y)
    assert layer(q[:0], k[:0], v[:0]).shape == (0, 3, 5, 8)
    assert layer(q, k[..., :0, :], v[..., :0, :]).abs().sum() == 0
    assert BinaryAttention(kind, device="meta")(q.to("meta"), k.to("meta"), v.to("meta")).shape == y.shape


def test_errors() -> None:
    q, k, v = qkv()
    for arguments, message in (
        ({"kind": "softmax"}, "kind must be one of bool, softmax_aware, elastic, got 'softmax'"),
        ({"kind": "bool", "zero": "minus"}, "zero must be one of torch, plus, got 'minus'"),
        ({"kind": "softmax_aware", "beta": 0.0}, r"beta must lie in \(0, 1\], got 0"),
        ({"kind": "bool", "dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            BinaryAttention(**arguments)
    with pytest.raises(ValueError, match=r"q must have heads of 64 columns, got \[2, 3, 5, 16\]"):
        BinaryAttention("bool", head_dim=64)(q, k, v)
    with pytest.raises(ValueError, match="addend and value_addend go with kind elastic, got bool"):
        BinaryAttention("bool")(q, k, v, addend=torch.zeros(5, 9))
