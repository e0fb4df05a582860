# SPDX-License-Identifier: Apache-2.0
"""8-bit rows: the embedding, the output head, and both on one table."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import Int8Config
from bitmill.nn import PackedInt8Embedding, PackedInt8Linear
from bitmill.ops import int8_quantize

SHAPES = [(1, 1), (23, 70), (16, 64), (33, 8)]
IDS = torch.tensor([[0, 3, 3], [16, 17, 22]])


def rounded(weight: Tensor) -> Tensor:
    q, scale = int8_quantize(weight.detach())
    return scale.unsqueeze(1) * q.float()


class Ends(nn.Module):
    """A model of an embedding and a head, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(23, 70), nn.Linear(70, 23, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def packed_ends() -> Ends:
    model = Ends(tied=True)
    model.table = PackedInt8Embedding.from_embedding(model.table)
    model.head = model.table.as_linear()
    return model


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_with_rounded_rows(n: int, k: int, bias: bool) -> None:
    linear = nn.Linear(k, n, bias)
    with torch.no_grad():
        linear.weight[0] *= 1e-20
        linear.weight[-1] = 0
    packed = PackedInt8Linear.from_linear(linear)
    weight = rounded(linear.weight)
    assert torch.equal(packed.dequantize().weight, weight)
    for shape in ((k,), (3, k), (2, 9, k), (0, k)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), nn.functional.linear(x, weight, linear.bias), rtol=1e-5, atol=1e-5)
    x = torch.randn(5, k)
    coarse = PackedInt8Linear.from_linear(linear, Int8Config(activations="int8"))(x)
    torch.testing.assert_close(coarse, nn.functional.linear(rounded(x), weight, linear.bias), rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(packed(x.to(dtype)), packed(x.to(dtype).float()).to(dtype))


def test_codes_reach_both_ends() -> None:
    weight = torch.arange(-127.0, 128.0).repeat(2, 1)
    packed = PackedInt8Linear.from_linear(_linear(weight))
    assert torch.equal(packed.dequantize().weight, weight) and torch.equal(packed(torch.eye(255)), weight.T)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return linear


def test_embedding_looks_up_rounded_rows() -> None:
    embedding = nn.Embedding(23, 70, padding_idx=3)
    packed = PackedInt8Embedding.from_embedding(embedding)
    for ids in (IDS, IDS.int(), IDS[0, 0], torch.empty(0, 2, dtype=torch.long), torch.arange(23)):
        assert torch.equal(packed(ids), nn.functional.embedding(ids, rounded(embedding.weight)))
    assert torch.equal(packed.dequantize()(IDS), packed(IDS)) and packed.dequantize().padding_idx == 3
    for bad in (23, -1, 2**40):
        with pytest.raises(IndexError):
            packed(torch.tensor([0, bad]))


def test_tied_ends_are_stored_once(tmp_path: Path) -> None:
    model, path = packed_ends(), tmp_path / "model.safetensors"
    bitmill.save(model, path)
    assert path.stat().st_size < 23 * (72 + 4) + 2500 and bitmill.summary(model).file_bytes == path.stat().st_size
    for tied in (True, False):
        fresh = Ends(tied)
        assert bitmill.load(fresh, path) == ["head", "table"]
        assert fresh.head.high is fresh.table.high and fresh.head.scale is fresh.table.scale
        assert torch.equal(fresh(IDS), model(IDS))
    layers = bitmill.summary(model).layers
    assert [(layer.bits_per_weight > 8, layer.macs) for layer in layers] == [(True, 0), (True, 23 * 70)]
    bitmill.dequantize_(model)
    torch.testing.assert_close(model(IDS), fresh(IDS), rtol=1e-5, atol=1e-5)


def test_copies_compile_and_export() -> None:
    model = packed_ends().eval()
    want = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), want)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS), want)
    assert torch.equal(torch.export.export(model, (IDS,)).module()(IDS), want)
    x = torch.randn(2, 70, requires_grad=True)
    model.head(x).sum().backward()
    torch.testing.assert_close(x.grad, model.head.dense().sum(0).expand(2, 70), rtol=1e-4, atol=1e-5)
    assert model.half().table(IDS).dtype == torch.float16 and model.table.scale.dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    class Scaled(nn.Embedding):
        pass

    for embedding in (Scaled(3, 4), nn.Embedding(3, 4, max_norm=1.0)):
        with pytest.raises(ValueError, match=r"must be a torch\.nn\.Embedding without max_norm, got"):
            PackedInt8Embedding.from_embedding(embedding)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Linear, got PackedInt8Linear"):
        PackedInt8Linear.from_linear(PackedInt8Linear(3, 4))
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        PackedInt8Linear.from_linear(linear)
    with pytest.raises(ValueError, match="in_features = 3"):
        PackedInt8Linear(3, 4)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="activations must be one of"):
        Int8Config(activations="int4")
    model = packed_ends()
    model.head.scale[2] = float("inf")
    with pytest.raises(ValueError, match="every scale must be finite"):
        model.head.validate()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_have_the_tables_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    table = nn.Embedding(20, 36).to(dtype)
    packed = PackedInt8Embedding.from_embedding(table)
    rows = packed(torch.arange(20))
    assert rows.dtype == packed.dequantize().weight.dtype == dtype
    assert packed.float()(torch.arange(20)).to(dtype).equal(rows) and packed.to(dtype).scale.dtype == torch.float32
    model, fresh = nn.Sequential(packed), nn.Sequential(nn.Embedding(20, 36).to(dtype))
    bitmill.save(model, tmp_path / "a")
    bitmill.load(fresh, tmp_path / "a")
    assert fresh(torch.arange(20)).equal(rows)
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        PackedInt8Embedding(20, 36, dtype="int8")
