# SPDX-License-Identifier: Apache-2.0
"""summary: sizes counted by hand, and the file's size as the file system has it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig, FP4Config, SalientConfig, pack_, quantize_, save, summary
from bitmill.binarize import method_names
from bitmill.checkpoint import file_size
from bitmill.config import Config
from bitmill.demo.model import load_stories
from bitmill.nn import BinaryEmbedding, PackedBinaryEmbedding, PackedBinaryLinear
from bitmill.ops._machine import kernel_of
from bitmill.report import LayerSummary, bibench_complexity

CONFIGS: list[Config] = [
    *(BinaryConfig(method=m, act_bits=bits, embeddings=True) for m in method_names() for bits in (None, 32)),
    BinaryConfig(group_size=32),
    SalientConfig(),
    SalientConfig(bits=16, centre=False, group_size=32),
    *(FP4Config(format=f) for f in FP4Config.FORMATS),
]
N, K = 20, 70  # 2 tiles of 16 rows; 3 words of 32 columns, 9 words of 8


def quantised(config: Config, packed: bool = True, bias: bool = True, n: int = N, k: int = K) -> nn.Module:
    model = nn.Sequential(nn.Linear(k, n, bias))
    quantize_(model, config)
    model(torch.randn(4, k))
    if packed:
        pack_(model)
    return model


def layer_of(model: nn.Module) -> LayerSummary:
    (layer,) = summary(model).layers
    return layer


def entries_of(model: nn.Module) -> int:
    return model[0].value.numel()  # type: ignore[index]


PLANE = 4 * 2 * 3 * 16  # bytes of one bit for each weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BinaryConfig(), PLANE + 4 * N),
        (BinaryConfig(act_bits=32), PLANE + 4 * N),
        (BinaryConfig(group_size=32), PLANE + 4 * N * 3),
        (BinaryConfig(method="bit"), PLANE + 4 * N + 4 * K + 4),  # shift and alpha
        (BinaryConfig(method="bivit_pws"), PLANE + 4 * N),
        (
            SalientConfig(fraction=0.3),
            2 * PLANE + 4 * (N + 1) + 4 * N * 2 + 4 * N * 2,
        ),  # start, alpha and mu, scale, zero
        (SalientConfig(fraction=0.3, bits=16, centre=False, group_size=32), 2 * PLANE + 4 * (N + 1) + 4 * N * 3),
        (SalientConfig(structure="column"), PLANE + 4 * 7 + 4 * 2 * 2 * 16 + 4 * N * 4),  # 7 columns, 2 words of 4
        *((FP4Config(format=f), 4 * 2 * 9 * 16 + 4 * N) for f in ("e2m1", "e1m2", "e3m0")),
        (FP4Config(format="mxfp4"), 4 * 2 * 9 * 16 + N * 3),
    ],
    ids=repr,
)
def test_bits_a_weight_by_hand(config: Config, expected: int, bias: bool) -> None:
    model = quantised(config, bias=bias)
    if isinstance(config, SalientConfig) and config.structure == "element":
        expected += entries_of(model) * config.bits // 8
    layer = layer_of(model)
    assert layer.bits_per_weight == 8 * expected / (N * K)
    assert layer.bytes == expected + 4 * N * bias
    assert layer.shape == (N, K) and layer.name == "0" and layer.kind == type(model[0]).__name__  # type: ignore[index]
    total = summary(model)
    assert total.bits_per_weight == layer.bits_per_weight and total.resident_bytes == layer.bytes


def test_a_plane_of_zeros_is_counted() -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    with torch.no_grad():
        model[0].weight[::2, ::3] = 0.0
    quantize_(model, BinaryConfig(method="sign"))
    pack_(model)
    assert layer_of(model).bytes == 2 * PLANE + 4 * N


def test_an_embedding_multiplies_nothing() -> None:
    model = nn.Sequential(nn.Embedding(N, K))
    quantize_(model, BinaryConfig(embeddings=True))
    assert type(model[0]) is BinaryEmbedding and layer_of(model).bits_per_weight == 32
    pack_(model)
    layer = layer_of(model)
    assert layer.bits_per_weight == 8 * (PLANE + 4 * N) / (N * K)
    assert (layer.macs, layer.operations) == (0, 0) and layer.kernel == kernel_of("binary_embedding")


def test_large_layers_come_close_to_their_name() -> None:
    for config, low, high in (
        (BinaryConfig(), 1.0, 1.1),
        (SalientConfig(), 2.8, 3.2),  # a bit, a bit of mask, a tenth of 8 bits
        (FP4Config(), 4.0, 4.1),
        (FP4Config(format="mxfp4"), 4.25, 4.26),
    ):
        assert low <= layer_of(quantised(config, n=512, k=512)).bits_per_weight <= high


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("config", "share"),
    [
        (BinaryConfig(), 1 / 64),
        (BinaryConfig(act_bits=32), 1 / 2),
        (BinaryConfig(method="bit", act_bits=2), 2 / 64),
        (BinaryConfig(method="bit", act_bits=4), 4 / 64),
        (SalientConfig(fraction=0.25), 0.25 * 1 + 0.75 / 2),
        (SalientConfig(fraction=0.25, bits=16), 0.25 * 1 + 0.75 / 2),
        (SalientConfig(fraction=0.0), 1 / 2),
        (FP4Config(), 1.0),
        (FP4Config(format="mxfp4"), 1.0),
    ],
    ids=repr,
)
def test_operations(config: Config, share: float, packed: bool) -> None:
    layer = layer_of(quantised(config, packed))
    assert layer.macs == N * K
    assert layer.operations == pytest.approx(share * N * K, rel=1e-12)


def test_the_kernel_in_use() -> None:
    for config, op in (
        (BinaryConfig(), "binary_linear"),
        (BinaryConfig(act_bits=32), "binary_weight_linear"),
        (SalientConfig(), "salient_linear"),
        (FP4Config(), "fp4_linear"),
    ):
        assert layer_of(quantised(config, packed=False)).kernel == "torch"
        assert layer_of(quantised(config)).kernel == kernel_of(op)


@pytest.mark.parametrize("packed", [False, True], ids=["training", "packed"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_the_size_of_the_file_is_exact(tmp_path: Path, config: Config, packed: bool) -> None:
    model = nn.ModuleDict({"é層": nn.Linear(40, 30), "norm": nn.BatchNorm1d(3), "table": nn.Embedding(5, 40)})
    model.register_buffer("codes", torch.zeros(7, dtype=torch.bfloat16))
    model.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
    model.register_buffer("hidden", torch.zeros(100), persistent=False)
    quantize_(model, config)
    model["é層"](torch.randn(2, 40))
    if packed:
        pack_(model)
    for count in range(9):  # all lengths of the header's padding
        model.register_buffer("b" * (count + 1), torch.zeros(count))
        save(model, tmp_path / "a")
        assert file_size(model) == summary(model).file_bytes == (tmp_path / "a").stat().st_size


def test_the_size_of_a_real_file(tmp_path: Path) -> None:
    model = load_stories()
    plain = summary(model)
    assert plain.bits_per_weight == 32 and len(plain.layers) == 35
    assert {layer.kernel for layer in plain.layers} == {"torch"} and {layer.kind for layer in plain.layers} == {
        "Linear"
    }
    quantize_(model, BinaryConfig())
    pack_(model)
    packed = summary(model)
    save(model, tmp_path / "a")
    assert packed.file_bytes == (tmp_path / "a").stat().st_size
    assert 1 < packed.bits_per_weight < 2.5
    assert packed.file_bytes < 0.3 * plain.file_bytes
    weights = sum(layer.shape[0] * layer.shape[1] for layer in packed.layers)
    by_hand = sum(t.nbytes for layer in packed.layers for t in model.get_submodule(layer.name).buffers())
    assert packed.bits_per_weight == pytest.approx(8 * by_hand / weights, rel=1e-12)


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(24, 40), "head": nn.Linear(40, 24, bias=False)})
    model["head"].weight = model["table"].weight
    plain = summary(model)
    assert plain.resident_bytes == 24 * 40 * 4 and plain.file_bytes < 24 * 40 * 4 + 600
    quantize_(model, BinaryConfig())
    save(model, tmp_path / "a")
    training = summary(model)
    assert training.resident_bytes == plain.resident_bytes and training.file_bytes == (tmp_path / "a").stat().st_size
    shared = nn.Linear(40, 24)
    assert summary(nn.ModuleDict({"a": shared, "b": shared})).layers == summary(nn.ModuleDict({"a": shared})).layers


def test_resident_bytes_are_the_memory_that_is_held() -> None:
    model = nn.Linear(4, 2)
    model.register_buffer("view", torch.zeros(100)[:3])
    model.register_buffer("hidden", torch.zeros(5), persistent=False)
    assert summary(model).resident_bytes == 4 * (8 + 2 + 100 + 5)


def test_a_plain_model() -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    result = summary(model)
    assert result.bits_per_weight == 32 and [layer.bits_per_weight for layer in result.layers] == [32, 32]
    assert [layer.bytes for layer in result.layers] == [4 * 66, 4 * 18]
    assert [(layer.macs, layer.operations) for layer in result.layers] == [(60, 60.0), (18, 18.0)]
    assert summary(model.bfloat16()).bits_per_weight == 16
    nothing = summary(nn.ReLU())
    assert nothing.layers == () and nothing.bits_per_weight == 0 and nothing.resident_bytes == 0
    assert str(nothing).startswith("layer ")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights_have_no_bits() -> None:
    for config in (None, BinaryConfig(), SalientConfig(), FP4Config()):
        model = nn.Sequential(nn.Linear(8, 0))
        if config is not None:
            quantize_(model, config)
            pack_(model)
        assert summary(model).bits_per_weight == 0 and layer_of(model).macs == 0


def test_only_bitmill_layers_are_listed_once_there_are_some() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    quantize_(model, BinaryConfig(), lambda m, name: name == "a")
    assert [layer.name for layer in summary(model).layers] == ["a"]
    assert summary(model).resident_bytes == 2 * 4 * 72


def test_summary_changes_nothing() -> None:
    model = quantised(BinaryConfig(method="bit"), packed=False)
    before = copy.deepcopy(model.state_dict())
    summary(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_has_no_size_is_an_error() -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(ValueError, match="meta device and has no values"):
        summary(nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match="_extra_state"):
        summary(nn.Sequential(Extra(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="UninitializedParameter"):
        summary(nn.Sequential(nn.LazyLinear(2)))


def test_the_table_is_aligned() -> None:
    model = nn.ModuleDict({"short": nn.Linear(64, 48), "a_much_longer_name": nn.Linear(2048, 64)})
    quantize_(model, BinaryConfig(), lambda m, name: name == "short")
    quantize_(model, FP4Config())
    pack_(model)
    header, *rows, total, ratios = str(summary(model)).splitlines()
    assert len(rows) == 2 and total.startswith("2 layers, ")
    for row, name in zip(rows, model, strict=True):
        assert row.startswith(name)
        for word in ("kind", "kernel"):
            column = header.index(word)
            assert row[column - 1] == " " and row[column] != " "
        for word in ("n x k", "bytes", "bits/weight"):
            column = header.index(word) + len(word)
            assert row[column - 1] != " " and row[column] == " "
    assert "48 x 64" in rows[0] and "64 x 2048" in rows[1]
    assert f"{summary(model).file_bytes:,} in a file" in total
    assert ratios.startswith(f"{4 * (64 * 48 + 48 + 2048 * 64 + 64):,} bytes in float32: ")


def test_a_summary_is_data() -> None:
    result = summary(quantised(BinaryConfig()))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["file_bytes"] == result.file_bytes and values["layers"][0]["kind"] == "PackedBinaryLinear"
    assert set(values) == {
        "layers",
        "bits_per_weight",
        "chains",
        "complexity",
        "float_bytes",
        "paper_bytes",
        "resident_bytes",
        "file_bytes",
    }


def test_bibert_base_as_papers_count_and_as_stored() -> None:
    """The specification of BiBERT's 13.4 MB and 31.2x (MiB of float32 over bits, row scales of all tables)."""
    model = torch.nn.Module()
    model.words = PackedBinaryEmbedding(30522, 768)
    model.layers = torch.nn.ModuleList(
        PackedBinaryLinear(k, n) for _ in range(12) for n, k in [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    )
    model.pooler = PackedBinaryLinear(768, 768)
    model.positions, model.types = torch.nn.Embedding(512, 768), torch.nn.Embedding(2, 768)
    model.norms = torch.nn.ModuleList(torch.nn.LayerNorm(768) for _ in range(25))
    model.classifier = torch.nn.Linear(768, 2)
    facts = summary(model)
    assert facts.float_bytes == 4 * 109_483_778
    assert facts.paper_bytes / 2**20 == pytest.approx(13.425, abs=1e-3)
    assert facts.float_bytes / facts.paper_bytes == pytest.approx(31.1, abs=0.05)
    assert facts.float_bytes / facts.file_bytes == pytest.approx(27.1, abs=0.2)
    assert sum(layer.macs for layer in facts.layers) / sum(layer.operations for layer in facts.layers) == 64
    assert "31.1x" in str(facts)
    macs = sum(layer.macs for layer in facts.layers)
    classifier = 2 * 768
    assert facts.complexity.operations == pytest.approx((macs + classifier) / (macs / 64 + classifier))


def test_bibench_complexity() -> None:
    storage, operations, overall = bibench_complexity(100, 36, 1000, 360)
    assert (storage, operations) == (100 / 38, 1000 / 370)
    assert overall == pytest.approx(((storage**2 + operations**2) / 2) ** 0.5)
    assert bibench_complexity(0, 0, 0, 0) == (1, 1, 1)
