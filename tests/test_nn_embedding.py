# SPDX-License-Identifier: Apache-2.0
"""BinaryEmbedding and its packed form."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from bitmill import BinaryConfig, binarize
from bitmill.nn import BinaryEmbedding, PackedBinaryEmbedding

CONFIGS = [
    *(BinaryConfig(method) for method in binarize.method_names()),
    BinaryConfig("bibert", group_size=32),
    BinaryConfig("xnor", group_size=64),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=repr)
rules = {(binarize.method(c.method).embedding, c.group_size is None): c for c in CONFIGS}
every_rule = pytest.mark.parametrize("config", rules.values(), ids=repr)
IDS = torch.tensor([[0, 3, 3], [16, 17, 22]])


def table(config: BinaryConfig, dim: int = 70) -> BinaryEmbedding:
    return BinaryEmbedding.from_embedding(nn.Embedding(23, dim, padding_idx=3), config)


@every_config
def test_packed_equals_training_form(config: BinaryConfig) -> None:
    layer = table(config)
    packed = layer.pack()
    for ids in (IDS, IDS.int(), IDS[0, 0], torch.empty(0, 2, dtype=torch.long), torch.arange(23)):
        assert torch.equal(packed(ids), layer(ids))
    assert torch.equal(packed.dequantize().weight, layer.dequantize().weight)
    assert torch.equal(packed.dequantize()(IDS), packed(IDS))


@every_config
def test_gradient_skips_the_padding_row_and_unused_rows(config: BinaryConfig) -> None:
    layer = table(config)
    layer(IDS).sum().backward()
    used = torch.zeros(23, dtype=torch.bool)
    used[[0, 16, 17, 22]] = True
    assert not layer.weight.grad[~used].any()
    if binarize.method(config.method).embedding.centre != "row":  # a constant gradient vanishes with the row mean
        assert layer.weight.grad[used].any(1).all()


def test_rows_of_zeros_and_single_zeros_are_exact() -> None:
    layer = table(BinaryConfig("sign"))
    with torch.no_grad():
        layer.weight[5, 7] = 0
    packed = layer.pack()
    assert packed.weight_nonzero is not None
    assert torch.equal(packed(torch.arange(23)), layer(torch.arange(23)))
    assert not packed(torch.tensor([3])).any()  # the padding row


@pytest.mark.parametrize("bad", [23, -1, 2**40])
def test_ids_outside_the_table_raise(bad: int) -> None:
    for layer in (table(BinaryConfig()), table(BinaryConfig()).pack()):
        with pytest.raises(IndexError):
            layer(torch.tensor([0, bad]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_ids_that_are_no_integers_raise(dtype: torch.dtype) -> None:
    packed = BinaryEmbedding(4, 8).pack()
    with pytest.raises(ValueError, match=f"ids must be integers, got {str(dtype).removeprefix('torch.')}"):
        packed(torch.ones(3).to(dtype))


def test_a_table_without_columns() -> None:
    table = BinaryEmbedding(3, 0)
    for module in (table, table.pack()):
        assert module(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 0)


@every_config
def test_copies_state_and_meta(config: BinaryConfig) -> None:
    packed = table(config).pack()
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(IDS), packed(IDS))
    empty = PackedBinaryEmbedding(**packed.arguments(), config=config, device="meta")
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty(IDS), packed(IDS))


@every_rule
def test_compile_and_export(config: BinaryConfig) -> None:
    torch._dynamo.reset()
    for layer in (table(config).eval(), table(config).pack()):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(IDS), layer(IDS))
            with torch._dynamo.config.patch(error_on_recompile=True):
                ids = torch.arange(20).reshape(4, 5)
                assert torch.equal(compiled(ids), layer(ids))
        exported = torch.export.export(layer, (IDS,)).module()
        assert torch.equal(exported(IDS), layer(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = table(BinaryConfig()).to(dtype)
    packed = layer.pack()
    assert layer(IDS).dtype == packed(IDS).dtype == dtype
    assert torch.equal(packed(IDS), layer(IDS))
    moved = table(BinaryConfig()).pack().to(dtype)
    assert moved.weight.dtype == torch.int32 and moved(IDS).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_a_large_table_is_not_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = nn.Embedding.from_pretrained((0.02 * torch.randn(3000, 768)).to(dtype), freeze=False)
    layer = BinaryEmbedding.from_embedding(table, BinaryConfig("bit"))
    ids = torch.arange(3000)
    assert torch.equal(layer.pack()(ids), layer(ids))


def test_autocast_changes_nothing() -> None:
    for layer in (table(BinaryConfig()), table(BinaryConfig()).pack()):
        want = layer(IDS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = layer(IDS)
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("option", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_options_that_would_be_lost_are_refused(option: str) -> None:
    embedding = nn.Embedding(4, 8, **{option: 1.0 if option == "max_norm" else True})
    with pytest.raises(ValueError, match=option):
        BinaryEmbedding.from_embedding(embedding)


def test_subclasses_and_bad_weights_are_refused() -> None:
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(ValueError, match="got Scaled, whose forward may differ"):
        BinaryEmbedding.from_embedding(Scaled(3, 4))
    layer = table(BinaryConfig())
    with torch.no_grad():
        layer.weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        layer.pack()
