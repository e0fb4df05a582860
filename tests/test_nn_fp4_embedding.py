# SPDX-License-Identifier: Apache-2.0
"""FP4Embedding, its packed form, and the op that looks rows up."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import FP4Config, ops
from bitmill.config import BinaryConfig
from bitmill.nn import FP4Embedding, FP4Linear, PackedFP4Embedding, PackedFP4Linear
from problems import assert_same_bits

CONFIGS = [
    *(FP4Config(f) for f in ("e2m1", "e1m2", "e3m0", "mxfp4", "nvfp4", "nf4")),
    FP4Config("mxfp4", "even"),
    FP4Config("bnb-fp4", group_size=0),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.scale_rule}-{c.group_size}")
SOME = [CONFIGS[0], CONFIGS[4]]
some_configs = pytest.mark.parametrize("config", SOME, ids=lambda c: c.format)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.tensor([[0, 3, 3], [16, 17, 22]])


def table(config: FP4Config, dim: int = 77, dtype: torch.dtype = torch.float32) -> FP4Embedding:
    return FP4Embedding.from_embedding(nn.Embedding(23, dim, padding_idx=3, dtype=dtype), config)


@each_config
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_forms_have_the_rows_of_the_linear_layer(config: FP4Config, dtype: torch.dtype) -> None:
    for dim in (77, 64, 1):
        layer = table(config, dim, dtype).eval()
        with torch.no_grad():
            layer.weight[5, : dim // 2] = -0.0
        packed = layer.pack()
        packed.validate()
        linear = nn.Linear(dim, 23, bias=False)
        linear.weight = nn.Parameter(layer.weight.detach().float())
        want = FP4Linear.from_linear(linear, config).quantised_weight().detach().to(dtype)
        for ids in (IDS, IDS.int(), IDS[0, 0], torch.empty(0, 2, dtype=torch.long), torch.arange(23)):
            for form in (layer, packed, packed.dequantize(), layer.dequantize()):
                assert_same_bits(form(ids).detach(), want[ids.long()])
        assert packed.dequantize().padding_idx == 3 and not packed.training
        assert not packed(torch.tensor(3)).any()  # the padding row


@each_config
def test_gradient_goes_straight_to_the_rows_that_are_used(config: FP4Config) -> None:
    layer = table(config)
    upstream = torch.randn(2, 3, 77)
    layer(IDS).backward(upstream)
    want = torch.zeros(23, 77).index_add_(0, IDS.flatten(), upstream.view(-1, 77))
    want[3] = 0
    torch.testing.assert_close(layer.weight.grad, want)


def test_the_op_is_fp4_weight_row_by_row() -> None:
    codes, g = torch.randint(0, 16, (21, 40), dtype=torch.uint8), torch.tensor(0.0123)
    tiles = ops.tile_pack(codes, 4)
    for format, scale, group_size, factor in (
        ("e1m2", torch.randn(21, 1), 0, None),
        ("nf4", torch.randn(21, 5), 8, None),
        ("e2m1", torch.randint(0, 255, (21, 2), dtype=torch.uint8), 32, None),
        ("e2m1", torch.randint(0, 127, (21, 3), dtype=torch.uint8), 16, g),
    ):
        want = ops.fp4_weight(tiles, scale, 21, 40, format, group_size, global_scale=factor)
        for ids in (torch.randint(0, 21, (3, 4)), torch.tensor(20), torch.arange(21)):
            assert_same_bits(ops.fp4_embedding(ids, tiles, scale, 40, format, group_size, factor), want[ids])
        torch.library.opcheck(
            torch.ops.bitmill.fp4_embedding.default, (torch.arange(5), tiles, scale, 40, format, group_size, factor)
        )


@pytest.mark.parametrize("bad", [23, -1, 2**40])
def test_ids_outside_the_table_raise(bad: int) -> None:
    for layer in (table(FP4Config()), table(FP4Config()).pack()):
        with pytest.raises(IndexError):
            layer(torch.tensor([0, bad]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_ids_that_are_no_integers_raise(dtype: torch.dtype) -> None:
    packed = FP4Embedding(4, 8).pack()
    with pytest.raises(ValueError, match=f"ids must be integers, got {str(dtype).removeprefix('torch.')}"):
        packed(torch.ones(3).to(dtype))


def test_a_table_without_columns() -> None:
    table = FP4Embedding(3, 0)
    for module in (table, table.pack()):
        assert module(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 0)


def test_the_output_follows_the_dtype_of_the_model() -> None:
    packed = table(FP4Config("mxfp4")).pack()
    want = packed(IDS)
    for moved, dtype in (
        (copy.deepcopy(packed).half(), torch.float16),
        (copy.deepcopy(packed).to(torch.bfloat16), torch.bfloat16),
        (copy.deepcopy(packed).bfloat16().float(), torch.float32),
    ):
        assert_same_bits(moved(IDS), want.to(dtype))
        assert moved.scale.dtype == torch.uint8 and moved.dequantize().weight.dtype == dtype
        assert moved.arguments()["dtype"] == str(dtype)[6:]
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(packed(IDS), want)


@each_config
def test_copies_state_and_meta(config: FP4Config) -> None:
    packed = table(config, dtype=torch.bfloat16).pack()
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert_same_bits(twin(IDS), packed(IDS))
        assert repr(twin) == repr(packed) and config.format in repr(packed) and "bfloat16" in repr(packed)
    empty = PackedFP4Embedding(**packed.arguments(), config=config, device="meta")
    shapes = {name: (t.shape, t.dtype) for name, t in packed.state_dict().items()}
    assert shapes == {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()}
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert_same_bits(empty(IDS), packed(IDS))
    assert packed.to("meta")(IDS.to("meta")).shape == (2, 3, 77)


@some_configs
def test_compile_and_export(config: FP4Config) -> None:
    for layer in (table(config).eval(), table(config).pack()):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(IDS), layer(IDS))
            with torch._dynamo.config.patch(error_on_recompile=True):
                ids = torch.arange(20).reshape(4, 5)
                assert torch.equal(compiled(ids), layer(ids))
        exported = torch.export.export(layer, (IDS,)).module()
        assert torch.equal(exported(IDS), layer(IDS))


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 64, dtype=dtype), nn.Linear(64, 40, bias=False, dtype=dtype)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


@each_config
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_quantize_pack_save_load_and_summary(config: FP4Config, dtype: torch.dtype, tmp_path: Path) -> None:
    config = FP4Config(config.format, config.scale_rule, group_size=config.group_size, embeddings=True)
    model = Model(dtype)
    assert bitmill.quantize_(model, config) == ["words", "head"]
    assert model.words.weight is model.head.weight
    trained, latent = model(IDS), tmp_path / "latent.safetensors"
    bitmill.save(model, latent)
    fresh = Model(dtype)
    assert bitmill.load(fresh, latent) == ["head", "words"] and torch.equal(fresh(IDS), trained)
    assert bitmill.pack_(model) == ["words", "head"]
    torch.testing.assert_close(model(IDS), trained, rtol=2e-2, atol=2e-2)
    assert model.words(IDS).dtype == dtype
    path = tmp_path / "packed.safetensors"
    bitmill.save(model, path)
    fresh = Model()
    assert bitmill.load(fresh, path) == ["head", "words"]
    assert type(fresh.words) is PackedFP4Embedding and torch.equal(fresh(IDS), model(IDS))
    summary = bitmill.summary(model)
    words, head = summary.layers
    assert (words.kind, words.shape, words.macs, head.macs) == ("PackedFP4Embedding", (40, 64), 0, 40 * 64)
    assert words.bits_per_weight == head.bits_per_weight < 5.4 and summary.file_bytes == path.stat().st_size
    bitmill.dequantize_(model)
    assert type(model.words) is nn.Embedding and torch.equal(model.words(IDS), fresh.words(IDS))


@some_configs
def test_a_tied_head_on_the_same_buffers(config: FP4Config, tmp_path: Path) -> None:
    model = Model()
    model.words = PackedFP4Embedding.from_embedding(model.words, config)
    model.head = model.words.as_linear()
    dense = model.words.dequantize().weight
    torch.testing.assert_close(model(IDS), model.words(IDS) @ dense.T, rtol=1e-5, atol=1e-5)
    bitmill.save(model, tmp_path / "tied")
    fresh = Model()
    assert bitmill.load(fresh, tmp_path / "tied") == ["head", "words"]
    assert fresh.head.weight is fresh.words.weight and torch.equal(fresh(IDS), model(IDS))
    head = model.words.as_linear(torch.ones(40), "int8")
    assert isinstance(head, PackedFP4Linear) and head.config.activations == "int8" and head.bias.eq(1).all()
    head.validate()


def test_what_does_not_fit_is_refused() -> None:
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(ValueError, match=r"FP4Embedding: embedding must be .* got Scaled, whose forward may differ"):
        FP4Embedding.from_embedding(Scaled(3, 4))
    with pytest.raises(ValueError, match="FP4Embedding: sparse is not supported"):
        FP4Embedding.from_embedding(nn.Embedding(3, 4, sparse=True))
    with pytest.raises(ValueError, match="FP4Embedding: config must be a FP4Config, got BinaryConfig"):
        FP4Embedding.from_embedding(nn.Embedding(3, 4), BinaryConfig())
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, float64, got int8"):
        PackedFP4Embedding(3, 4, dtype=torch.int8)
    layer = table(FP4Config())
    with torch.no_grad():
        layer.weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="FP4Embedding: weight must be finite to be packed"):
        layer.pack()
    packed = table(FP4Config("nvfp4")).pack()
    packed.scale[2] = 127
    with pytest.raises(ValueError, match="every scale must be finite"):
        packed.validate()


def test_op_errors() -> None:
    ids, tiles, scale = torch.arange(3), torch.zeros(1, 5, 16, dtype=torch.int32), torch.ones(4, 1)
    for arguments, message in (
        ((ids.int(), tiles, scale, 40), "ids must be int64, got int32"),
        ((ids, tiles, scale, 41), r"weight must have shape \[1, 6, 16\], got \[1, 5, 16\]"),
        ((ids, tiles, scale, -1), "k must be between 0 and 16777216, got -1"),
        ((ids, tiles, scale, 40, "e4m3"), 'format must be .* got "e4m3"'),
        ((ids, tiles, scale, 40, "nf4", 12), "group_size must be 0 or a positive multiple of 8 up to .*, got 12"),
        ((ids, tiles, scale, 40, "nf4", 16), r"scale must have shape \[4, 3\], got \[4, 1\]"),
        ((ids, tiles, scale.half(), 40), "scale must be float32, uint8 .* got float16"),
        ((ids, tiles, scale, 40, "e2m1", 0, torch.tensor(1.0)), "scale must be float32, uint8 .* got float32"),
    ):
        with pytest.raises(ValueError, match=f"fp4_embedding: {message}"):
            ops.fp4_embedding(*arguments)
    with pytest.raises(IndexError, match=r"fp4_embedding: ids must lie in \[0, 4\), got 4"):
        ops.fp4_embedding(ids + 2, tiles, scale, 40)
