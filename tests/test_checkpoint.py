# SPDX-License-Identifier: Apache-2.0
"""save and load: what goes in comes out bit for bit, and a file from a stranger changes nothing."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig, FP4Config, SalientConfig, checkpoint, dequantize_, load, pack_, quantize_, save
from bitmill.binarize import method_names
from bitmill.config import Config
from bitmill.demo.model import Stories, load_stories
from bitmill.nn import BinaryEmbedding, BinaryLinear, PackedBinaryLinear

CONFIGS: list[Config] = [
    *(BinaryConfig(method=m, act_bits=bits) for m in method_names() for bits in (1, 32)),
    BinaryConfig(method="bit", act_bits=2),
    BinaryConfig(method="bit", signed=False),
    BinaryConfig(zero="plus", group_size=32),
    *(BinaryConfig(method=m, embeddings=True) for m in ("bibert", "bit")),
    SalientConfig(),
    SalientConfig(fraction=0.3, bits=16, centre=False, group_size=32),
    *(FP4Config(format=f) for f in FP4Config.FORMATS),
]
KINDS: list[Config] = [BinaryConfig(method="bit", embeddings=True), BinaryConfig(), SalientConfig(), FP4Config("mxfp4")]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=repr)
each_kind = pytest.mark.parametrize("config", KINDS, ids=repr)
each_form = pytest.mark.parametrize("packed", [False, True], ids=["training", "packed"])
IDS = torch.tensor([[0, 1, 2], [3, 4, 23]])


class Model(nn.Module):
    """Linear layers, a head that may be tied, buffers of several kinds."""

    def __init__(self, tied: bool = False, width: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, width, padding_idx=3)
        self.fc = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("codes", torch.arange(6).bfloat16())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.head = nn.Linear(width, 24, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        return self.head(x + self.fc(x))


def quantised(config: Config, packed: bool, tied: bool = False) -> Model:
    model = Model(tied)
    quantize_(model, config)
    model(IDS)  # sets what the first batch sets
    if packed:
        pack_(model)
    return model.eval()


def fresh(tied: bool = False) -> Model:
    """The same architecture with other values everywhere."""
    torch.manual_seed(1)
    model = Model(tied).eval()
    model.codes.zero_()
    model.flags.zero_()
    return model


def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, t in first.items():
        assert t.dtype == second[name].dtype and t.shape == second[name].shape, name
        assert same_bytes(t, second[name]), name
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]


class Snapshot:
    """Bit-for-bit what a model holds."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
        self.tensors = {
            name: (t, t.requires_grad, None if t.is_meta else t.detach().clone(), t._version)
            for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        }

    def assert_same(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert self.modules == now.modules and list(self.tensors) == list(now.tensors)
        for name, (t, flag, value, version) in self.tensors.items():
            other, now_flag, now_value, now_version = now.tensors[name]
            assert t is other and (flag, version) == (now_flag, now_version), name
            assert (value is None) == (now_value is None)
            assert value is None or same_bytes(value, now_value)


def assert_refused(model: nn.Module, path: Path, match: str = "cannot be loaded") -> str:
    """One ValueError of one line that starts the same way, and an unchanged model."""
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=match) as error:
        load(model, path)
    text = str(error.value)
    assert text.startswith(f"load: {path} cannot be loaded: ")
    assert "\n" not in text and len(text) < 1000
    snapshot.assert_same(model)
    return text


# Round trips


@each_config
@each_form
def test_round_trip(tmp_path: Path, config: Config, packed: bool) -> None:
    model, path = quantised(config, packed), tmp_path / "model.safetensors"
    expected = output(model)
    save(model, path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert path.stat().st_size == checkpoint.file_size(model)
    names = [name for name, m in model.named_modules() if type(m) in checkpoint.KINDS.values()]
    with torch.device("meta"):
        meta = Model()
    meta.hidden = torch.ones(2)
    other = fresh()
    quantize_(other, FP4Config())
    already = fresh()
    quantize_(already, config)
    for target in (fresh(), fresh().train(), meta, other, already, quantised(config, True)):
        modes = [m.training for m in target.modules()]
        assert load(target, path) == names
        assert [m.training for m in target.modules()] == modes
        assert_same_state(model, target)
        assert torch.equal(output(target), expected)
        for name in names:
            assert target.get_submodule(name).config == config


@each_kind
@each_form
def test_saving_what_was_loaded_gives_the_same_file(tmp_path: Path, config: Config, packed: bool) -> None:
    model = quantised(config, packed, tied=True)
    save(model, tmp_path / "a")
    again = fresh(tied=True)
    load(again, tmp_path / "a")
    save(again, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_model_without_quantised_layers(tmp_path: Path) -> None:
    model = Model().eval()
    save(model, tmp_path / "a")
    target = fresh()
    assert load(target, tmp_path / "a") == []
    assert_same_state(model, target)
    assert torch.equal(output(model), output(target))


@each_form
def test_the_real_model(tmp_path: Path, packed: bool) -> None:
    model, ids = load_stories(), torch.tensor([[1, 403, 407, 261, 378]])
    quantize_(model, BinaryConfig())
    if packed:
        pack_(model)
    save(model, tmp_path / "a")
    target = Stories()
    assert len(load(target, tmp_path / "a")) == 35
    assert torch.equal(output(model, ids), output(target, ids))
    if packed:
        assert (tmp_path / "a").stat().st_size < 0.3 * 1_056_540


@each_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, config: Config, dtype: torch.dtype) -> None:
    for packed in (False, True):
        model = quantised(config, packed).to(dtype)
        save(model, tmp_path / "a")
        with torch.device("meta"):
            meta = Model()
        meta.hidden = torch.ones(2)
        for target in (fresh().to(dtype), meta):
            load(target, tmp_path / "a")
            assert_same_state(model, target)
            assert torch.equal(output(model), output(target))
        assert_refused(fresh(), tmp_path / "a", r"is torch\.\w+ in the file and torch\.\w+ in the model; convert")


def test_tensors_of_every_dtype(tmp_path: Path) -> None:
    names = "bool uint8 int8 int16 uint16 float16 bfloat16 int32 uint32 float32 complex64 float64 int64 uint64"
    model, target = nn.Module(), nn.Module()
    for name in names.split():
        dtype = getattr(torch, name)
        for suffix, shape in (("", (3, 5)), ("_scalar", ()), ("_empty", (0, 4))):
            bits = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randint(0, 100, shape)
            model.register_buffer("t_" + name + suffix, bits.to(dtype))
            target.register_buffer("t_" + name + suffix, torch.zeros(shape, dtype=dtype))
    save(model, tmp_path / "a")
    assert checkpoint.file_size(model) == (tmp_path / "a").stat().st_size
    load(target, tmp_path / "a")
    assert_same_state(model, target)


def test_values_that_compare_oddly(tmp_path: Path) -> None:
    model, target = nn.Linear(4, 1), nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), -0.0, float("-inf"), 1e-45]]))
    save(model, tmp_path / "a")
    load(target, tmp_path / "a")
    assert same_bytes(model.weight, target.weight)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@each_kind
@each_form
def test_layers_without_rows_or_columns(tmp_path: Path, config: Config, packed: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 0), nn.Linear(8, 0, bias=False))

    model = build()
    quantize_(model, config)
    for layer in model:
        layer(torch.zeros(2, 8))
    if packed:
        pack_(model)
    save(model, tmp_path / "a")
    target = build()
    assert load(target, tmp_path / "a") == ["0", "1"]
    assert_same_state(model, target)
    assert target[0](torch.zeros(2, 8)).shape == (2, 0)


def test_long_and_foreign_names(tmp_path: Path) -> None:
    name, path = "層" * 300 + "\t\"quoted\\é\x01'", tmp_path / ("ж" * 127)
    model, target = nn.ModuleDict({name: nn.Linear(4, 4)}), nn.ModuleDict({name: nn.Linear(4, 4)})
    quantize_(model, BinaryConfig())
    pack_(model)
    save(model, path)
    assert path.stat().st_size == checkpoint.file_size(model)
    assert load(target, path) == [name]
    assert_same_state(model, target)
    assert load(target, str(path)) == [name]
    assert load(target, os.fspath(path)) == [name]


def test_names_with_dots_do_not_mix(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        setattr(model, "a.b", nn.Linear(4, 4))
        model.a = nn.Linear(4, 4)
        return model

    model, target = build(), build()
    quantize_(model, BinaryConfig(), lambda m, name: name == "a")
    save(model, tmp_path / "a")
    assert load(target, tmp_path / "a") == ["a"]
    assert_same_state(model, target)
    ambiguous = nn.Module()
    setattr(ambiguous, "a.b", nn.Linear(4, 4))
    ambiguous.a = nn.Module()
    ambiguous.a.b = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="two tensors"):
        save(ambiguous, tmp_path / "b")


def test_memory_is_not_mapped_from_the_file_afterwards(tmp_path: Path) -> None:
    model, path = quantised(BinaryConfig(), True), tmp_path / "a"
    save(model, path)
    with torch.device("meta"):
        meta = Model()
    meta.hidden = torch.ones(2)
    for target in (fresh(), meta):
        load(target, path)
        assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    assert_same_state(model, target)


def test_devices_as_context_do_not_matter(tmp_path: Path) -> None:
    model = quantised(SalientConfig(), True)
    with torch.device("meta"):
        save(model, tmp_path / "a")
        target = fresh_on_cpu()
        load(target, tmp_path / "a")
    assert_same_state(model, target)


def fresh_on_cpu() -> Model:
    with torch.device("cpu"):
        return fresh()


# Identity: ties, parameters, flags


@each_kind
@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path, config: Config, meta: bool) -> None:
    model = quantised(config, packed=False, tied=True)
    save(model, tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert "embedding.weight" in file.keys() and "head.weight" not in file.keys()  # noqa: SIM118
    with torch.device("meta" if meta else "cpu"):
        target = Model(tied=True)
    target.hidden = torch.ones(2)
    weight = target.embedding.weight
    load(target, tmp_path / "a")
    assert target.head.weight is target.embedding.weight and isinstance(target.head.weight, nn.Parameter)
    assert meta or target.embedding.weight is weight
    assert_same_state(model, target)
    names = [n for n, _ in target.named_parameters()]
    assert "head.weight" not in names and "embedding.weight" in names
    output(target)
    target(IDS).sum().backward()
    assert target.head.weight.grad is not None


def test_tied_plain_models(tmp_path: Path) -> None:
    model, target = Model(tied=True), fresh(tied=True)
    save(model, tmp_path / "a")
    load(target, tmp_path / "a")
    assert target.head.weight is target.embedding.weight
    assert_same_state(model, target)
    untied = fresh(tied=False)
    load(untied, tmp_path / "a")
    assert_same_state(model, untied)


def test_a_tied_model_refuses_two_different_tensors(tmp_path: Path) -> None:
    save(Model(tied=False), tmp_path / "a")
    assert_refused(fresh(tied=True), tmp_path / "a", "head.weight is tied to another tensor in the model")
    with torch.device("meta"):
        meta = Model(tied=True)
    meta.hidden = torch.ones(2)
    assert_refused(meta, tmp_path / "a", "tied")
    equal = Model(tied=False)
    with torch.no_grad():
        equal.head.weight.copy_(equal.embedding.weight)
    save(equal, tmp_path / "b")
    target = fresh(tied=True)
    load(target, tmp_path / "b")
    assert target.head.weight is target.embedding.weight and torch.equal(target.head.weight, equal.head.weight)


@each_form
def test_shared_modules(tmp_path: Path, packed: bool) -> None:
    def build(shared: bool) -> nn.ModuleDict:
        a = nn.Linear(8, 8)
        return nn.ModuleDict({"a": a, "b": a if shared else nn.Linear(8, 8)})

    model = build(True)
    quantize_(model, BinaryConfig())
    if packed:
        pack_(model)
    save(model, tmp_path / "a")
    target = build(True)
    assert load(target, tmp_path / "a") == ["a", "b"]
    assert target["a"] is target["b"]
    assert_same_state(model, target)
    apart = build(False)
    load(apart, tmp_path / "a")
    assert type(apart["a"]) is type(apart["b"]) is type(model["a"]) and apart["a"] is not apart["b"]
    assert all(same_bytes(t, apart.state_dict()[name]) for name, t in model.state_dict().items())
    model = build(False)
    quantize_(model, BinaryConfig())
    if packed:
        pack_(model)
    save(model, tmp_path / "b")
    assert_refused(build(True), tmp_path / "b", "tied to another tensor")
    quantize_(model := build(False), BinaryConfig(), lambda m, name: name == "a")
    quantize_(model, FP4Config())
    save(model, tmp_path / "c")
    assert_refused(build(True), tmp_path / "c", "one module under two names in the model, and two different ones")


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    for config in (BinaryConfig(method="bit"), SalientConfig(), FP4Config()):
        model = quantised(config, packed=False)
        save(model, tmp_path / "a")
        for prepared in (False, True):
            target = fresh()
            if prepared:
                quantize_(target, config)
            before = dict(target.named_parameters())
            optimizer = torch.optim.SGD(target.parameters(), lr=1.0)
            load(target, tmp_path / "a")
            after = dict(target.named_parameters())
            assert all(after[name] is t for name, t in before.items())
            target.train()(IDS).square().sum().backward()
            optimizer.step()
            assert not torch.equal(target.fc.weight, model.fc.weight)


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    save(quantised(BinaryConfig(method="bit"), packed=False), tmp_path / "a")
    for meta in (False, True):
        with torch.device("meta" if meta else "cpu"):
            target = Model()
        target.hidden = torch.ones(2)
        target.fc.requires_grad_(False)
        target.norm.weight.requires_grad_(False)
        load(target, tmp_path / "a")
        flags = {name for name, t in target.named_parameters() if not t.requires_grad}
        assert flags == {"fc.weight", "fc.bias", "fc.shift", "fc.alpha", "norm.weight"}
    save(quantised(BinaryConfig(), packed=True), tmp_path / "a")
    target = fresh()
    load(target, tmp_path / "a")
    assert not any(t.requires_grad for t in target.fc.buffers())


def test_views_and_other_unusual_memory(tmp_path: Path) -> None:
    def build(scale: float) -> nn.Module:
        model, base = nn.Module(), torch.arange(24.0).reshape(4, 6) * scale
        model.whole = nn.Parameter(base)
        model.register_buffer("flat", base.view(-1))
        model.register_buffer("row", base[1])
        model.register_buffer("column", base[:, 2])
        model.register_buffer("transposed", base.t())
        model.register_buffer("expanded", torch.full((1,), scale).expand(5))
        z = torch.complex(torch.ones(3), torch.full((3,), scale))
        model.register_buffer("z", z)
        model.register_buffer("conjugate", z.conj())
        model.register_buffer("minus_imaginary", z.conj().imag)
        return model

    model = build(2.0)
    save(model, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == checkpoint.file_size(model)
    target = build(3.0)
    load(target, tmp_path / "a")
    for name, t in model.state_dict().items():
        assert torch.equal(t, target.state_dict()[name]), name


def test_a_model_made_in_inference_mode(tmp_path: Path) -> None:
    model = quantised(FP4Config(), packed=True)
    save(model, tmp_path / "a")
    with torch.inference_mode():
        target = fresh()
    load(target, tmp_path / "a")
    assert_same_state(model, target)
    with torch.inference_mode():
        target = fresh()
        load(target, tmp_path / "a")
    assert_same_state(model, target)


def test_a_recurrent_network_on_the_meta_device(tmp_path: Path) -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)})
    quantize_(model, BinaryConfig())
    save(model, tmp_path / "a")
    with torch.device("meta"):
        target = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)})
    load(target, tmp_path / "a")
    x = torch.randn(2, 4)
    assert torch.equal(model["lstm"](x)[0], target["lstm"](x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_model_keeps_its_own_names(tmp_path: Path) -> None:
    model = quantised(BinaryConfig(), packed=True)
    save(torch.compile(model), tmp_path / "a")
    target = fresh()
    load(torch.compile(target), tmp_path / "a")
    assert_same_state(model, target)


def test_torchs_encoder_calls_layers_that_were_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 1).eval()

    model, target, x = build(), build(), torch.randn(2, 3, 32)
    quantize_(model, BinaryConfig())
    save(model, tmp_path / "a")
    load(target, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(model(x), target(x))


# What save refuses, and that it leaves nothing behind


def test_state_that_a_file_cannot_hold(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[prefix + "other"] = state.pop(prefix + "weight")

    hooked = nn.Linear(4, 4)
    hooked.register_state_dict_post_hook(rename)
    reserved = nn.Module()
    reserved.register_buffer("__metadata__", torch.zeros(2))
    sparse, odd = nn.Module(), nn.Module()
    sparse.register_buffer("t", torch.eye(3).to_sparse())
    odd.register_buffer("t", torch.zeros(2, dtype=torch.complex128))
    for model, match in (
        (nn.Sequential(Extra()), r"0\._extra_state in the model's state_dict is not simply a parameter"),
        (nn.Sequential(hooked), r"in the model's state_dict is not simply a parameter"),
        (reserved, "__metadata__ is not a usable name"),
        (sparse, "t must be a dense tensor of a common dtype"),
        (odd, "t must be a dense tensor of a common dtype"),
        (nn.Sequential(nn.LazyLinear(4)), "0.weight must be a plain tensor, got UninitializedParameter"),
        (nn.Linear(4, 4, device="meta"), "weight is on the meta device and has no values"),
        (BinaryLinear(4, 4), "the model itself is a bitmill layer"),
        (BinaryLinear(4, 4).pack(), "the model itself is a bitmill layer"),
    ):
        with pytest.raises(ValueError, match=match):
            save(model, tmp_path / "a")
        assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = quantised(BinaryConfig(), packed=True), tmp_path / "a"
    save(model, path)
    before = path.read_bytes()

    def full(tensors: Any, name: Any, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise error

    for error in (safetensors.SafetensorError("No space left"), OSError("no"), KeyboardInterrupt()):
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
            save(model, path)
        assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == before
    monkeypatch.undo()
    for wrong in (tmp_path / "none" / "a", tmp_path, Path("")):
        with pytest.raises(OSError):
            save(model, wrong)
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == before
    save(model, path)  # over the old one
    assert path.read_bytes() == before


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save(nn.Linear(2, 2), tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Files that are not what they should be


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good file of each kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("good")
    for config in KINDS:
        for packed in (False, True):
            name = f"{type(config).__name__}-{config.embeddings if isinstance(config, BinaryConfig) else ''}-{packed}"
            save(quantised(config, packed), folder / name)
    return {path.name: path for path in sorted(folder.iterdir())}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    model = fresh()
    snapshot = Snapshot(model)
    for path, kind in ((tmp_path / "none", FileNotFoundError), (tmp_path, OSError)):
        with pytest.raises(kind):
            load(model, path)
    snapshot.assert_same(model)


def test_truncated_and_foreign_files(tmp_path: Path, files: dict[str, Path]) -> None:
    model, path = fresh(), tmp_path / "a"
    data = files["SalientConfig--True"].read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for size in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert_refused(model, path, "cannot be read as a safetensors file")
    for junk in (data + b"\0", b"\0" * 4096, b"\xff" * 4096, random.Random(0).randbytes(5000), data[8:], b"PK\x03\x04"):
        path.write_bytes(junk)
        assert_refused(model, path, "cannot be read as a safetensors file")
    for length in (0, 1, 2**31, 2**62, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        assert_refused(model, path, "cannot be read as a safetensors file")
    for metadata in (None, {}, {"format": "pt"}):
        safetensors.torch.save_file({"fc.weight": torch.zeros(2, 2)}, path, metadata)
        assert_refused(
            model, path, "was not written by bitmill; for a plain state_dict use safetensors.torch.load_file"
        )


@pytest.mark.parametrize("kind", ["BinaryConfig-True-True", "SalientConfig--True", "FP4Config--False"])
def test_a_flipped_byte_is_noticed_or_harmless(tmp_path: Path, files: dict[str, Path], kind: str) -> None:
    data, path, rng = bytearray(files[kind].read_bytes()), tmp_path / "a", random.Random(kind)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    good = fresh()
    load(good, files[kind])
    expected = output(good)
    model = fresh()
    positions = [
        *range(8),
        *(rng.randrange(8, header) for _ in range(60)),
        *(rng.randrange(header, len(data)) for _ in range(40)),
    ]
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        try:
            load(again := fresh(), path)
        except ValueError:
            assert_refused(model, path)
        else:
            assert torch.equal(output(again), expected)
            assert position < header


def test_headers_that_safetensors_accepts_and_torch_does_not(tmp_path: Path, files: dict[str, Path]) -> None:
    text = checkpoint.KEY
    for dtype, shape, size in (("F6_E2M3", [4], 3), ("F32", [0, 2**63], 0), ("F32", [0, 2**62], 0), ("F4", [2], 1)):
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {text: "{}"}, "fc.weight": entry}).encode()
        (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
        assert_refused(fresh(), tmp_path / "a")


# Crafted files: a valid digest over anything


def craft(path: Path, metadata: Any, tensors: dict[str, Tensor]) -> None:
    """Write a file whose digest fits, whatever it says."""
    if isinstance(metadata, dict):
        metadata = {key: value for key, value in metadata.items() if key != "sha256"}
        metadata = {**metadata, "sha256": checkpoint._digest(metadata, tensors)}
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    safetensors.torch.save_file(tensors, path, {checkpoint.KEY: text})


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()[checkpoint.KEY]), tensors


def test_crafted_files_can_be_loaded(tmp_path: Path, files: dict[str, Path]) -> None:
    for path in files.values():
        craft(tmp_path / "a", *contents(path))
        a, b = fresh(), fresh()
        assert load(a, path) == load(b, tmp_path / "a")
        assert_same_state(a, b)


def test_metadata_that_is_not_an_object_of_the_right_shape(tmp_path: Path, files: dict[str, Path]) -> None:
    metadata, tensors = contents(files["BinaryConfig-False-True"])
    path, model = tmp_path / "a", fresh()
    deep = "[" * 100_000 + "]" * 100_000
    nested = '{"a":' * 500 + "1" + "}" * 500
    for text in (
        "",
        "nope",
        "null",
        "1",
        '"a"',
        "[]",
        "[{}]",
        deep,
        "{" * 50,
        '{"a": NaN}',
        "9" * 5000,
        " " * 10,
        "\ud7ff",
    ):
        craft(path, text, tensors)
        assert_refused(model, path, "metadata")
    craft(path, " " * (checkpoint.MAX_METADATA + 1) + json.dumps(metadata), tensors)
    assert_refused(model, path, "sensible size")
    for field in checkpoint.FIELDS:
        for junk in (None, True, 1.0, -1, 10**30, "x", [], {}, [1], {"a": 1}, [[]], [[[]]], json.loads(nested), [None]):
            if field == "sha256":
                craft(path, json.dumps({**metadata, field: junk}), tensors)
            elif junk == metadata[field] and type(junk) is type(metadata[field]):
                continue
            else:
                craft(path, {**metadata, field: junk}, tensors)
            assert_refused(model, path)
        missing = {key: value for key, value in metadata.items() if key != field}
        craft(path, missing if field != "sha256" else json.dumps(missing), tensors)
        assert_refused(model, path, "expected fields")
    craft(path, {**metadata, "extra": 1}, tensors)
    assert_refused(model, path, "expected fields")


def test_versions_and_digests(tmp_path: Path, files: dict[str, Path]) -> None:
    metadata, tensors = contents(files["BinaryConfig-False-True"])
    path, model = tmp_path / "a", fresh()
    for version in (2, 10**30):
        craft(path, {**metadata, "format_version": version}, tensors)
        assert_refused(model, path, f"it has format version {version}, and this bitmill reads up to 1; update it")
    craft(path, json.dumps({"format_version": 2, "anything": "else"}), tensors)
    assert_refused(model, path, "format version 2")
    for version in (0, -1, True, 1.0, "1", None, [2]):
        craft(path, {**metadata, "format_version": version}, tensors)
        assert_refused(model, path, "expected fields")
    for digest in ("", "0" * 64, metadata["sha256"].upper(), metadata["sha256"][:-1]):
        craft(path, json.dumps({**metadata, "sha256": digest}), tensors)
        assert_refused(model, path, "do not match its checksum")
    craft(path, json.dumps(metadata), {**tensors, "codes": tensors["codes"] + 1})
    assert_refused(model, path, "do not match its checksum")


JUNK: list[Any] = [None, True, 1.5, 10**30, -1, 2**63, "x", "fc", "weight", 0, float("nan")]


@pytest.mark.parametrize("index", range(2 * len(KINDS)))
def test_descriptions_of_a_layer(tmp_path: Path, files: dict[str, Path], index: int) -> None:
    metadata, tensors = contents(list(files.values())[index])
    path, model, name = tmp_path / "a", fresh(), next(n for n in metadata["modules"] if n == "fc")
    entry = metadata["modules"][name]

    def refuse(changed: Any, match: str = "cannot be loaded") -> None:
        craft(path, {**metadata, "modules": {**metadata["modules"], name: changed}}, tensors)
        assert_refused(model, path, match)

    for junk in [*JUNK, [], {}, [entry]]:
        refuse(junk, "expected fields")
        if not (isinstance(junk, str)):
            refuse({**entry, "kind": junk}, "expected fields")
        refuse({**entry, "config": junk}) if junk != entry["config"] or type(junk) is not int else None
        refuse({**entry, "arguments": junk}) if junk != {} else refuse({**entry, "arguments": junk}, "arguments")
        refuse({**entry, "extra": junk}, "expected fields")
    for kind in ("", "Linear", "Embedding", "Module", "PackedBinaryLinear2", "__class__", "x" * 100_000):
        refuse({**entry, "kind": kind}, "unknown")
    for kind in checkpoint.KINDS:
        if kind != entry["kind"]:
            refuse({**entry, "kind": kind}, "layer 'fc'|it lacks|the model has no")
    for number in (-1, len(metadata["configs"]), 10**30):
        refuse({**entry, "config": number}, "expected fields")
    for key, value in entry["arguments"].items():
        for junk in [*JUNK, 41, 39, 1, 2**31, 2**40, False]:
            if type(junk) is type(value) and junk == value:
                continue
            if isinstance(value, bool) and isinstance(junk, bool):
                continue  # another layer, tested by its tensors below
            refuse({**entry, "arguments": {**entry["arguments"], key: junk}})
        if isinstance(value, bool):
            refuse({**entry, "arguments": {**entry["arguments"], key: not value}}, "it lacks|the model has no")
        refuse({**entry, "arguments": {k: v for k, v in entry["arguments"].items() if k != key}}, "layer 'fc'")
        refuse({**entry, "arguments": {**entry["arguments"], key: [value]}}, "expected fields")
    for key in ("dtype", "device", "config", "self", "bits", "padding_idx", "num_embeddings", "", "x" * 10_000):
        for junk in (None, 1, True, 40, "cpu"):
            refuse({**entry, "arguments": {**entry["arguments"], key: junk}}, "layer 'fc'")


def test_kinds_that_do_not_fit_the_module(tmp_path: Path, files: dict[str, Path]) -> None:
    metadata, tensors = contents(files["BinaryConfig-True-True"])
    path, model, modules = tmp_path / "a", fresh(), metadata["modules"]
    for a, b in (("embedding", "fc"), ("fc", "embedding"), ("fc", "norm"), ("embedding", "norm"), ("fc", "")):
        craft(path, {**metadata, "modules": {**modules, b: modules[a]}}, tensors)
        assert_refused(model, path)
    for name in (
        "nothing",
        "fc.weight",
        "fc.",
        ".fc",
        "norm.running_mean",
        "__class__",
        "forward",
        "x" * 100_000,
        "\ud800",
    ):
        craft(path, {**metadata, "modules": {**modules, name: modules["fc"]}}, tensors)
        assert_refused(model, path, "the model has none of that name")
    padding = {**modules["embedding"], "arguments": {**modules["embedding"]["arguments"], "padding_idx": 4}}
    craft(path, {**metadata, "modules": {**modules, "embedding": padding}}, tensors)
    assert_refused(model, path, "padding_idx is 4 in the file and 3 in the model")


def test_layers_whose_forward_differs_are_not_replaced(tmp_path: Path) -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8))
    quantize_(model, BinaryConfig())
    save(model, tmp_path / "a")
    assert_refused(nn.Sequential(Mine(8, 8)), tmp_path / "a", "cannot take the place of a Mine")
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked[0].register_forward_hook(lambda *a: None)
    assert_refused(hooked, tmp_path / "a", "layer '0': it has hooks")
    alone = nn.Linear(8, 8)
    assert_refused(alone, tmp_path / "a", "the model has none of that name")


@pytest.mark.parametrize("index", range(2 * len(KINDS)))
def test_configurations(tmp_path: Path, files: dict[str, Path], index: int) -> None:
    metadata, tensors = contents(list(files.values())[index])
    path, model = tmp_path / "a", fresh()
    config = metadata["configs"][0]
    for changed in [
        *JUNK,
        {},
        [],
        {"config": "Config"},
        {**config, "config": ["BinaryConfig"]},
        {**config, "new": 1},
        *({**config, key: [value]} for key, value in config.items()),
        *({**config, key: 10**30} for key in config),
        *({**config, key: None} for key in config if key != "group_size"),
        *(cls().to_dict() for cls in (BinaryConfig, SalientConfig, FP4Config) if cls.__name__ != config["config"]),
    ]:
        craft(path, {**metadata, "configs": [changed]}, tensors)
        assert_refused(model, path)


@pytest.mark.parametrize("index", range(2 * len(KINDS)))
def test_tensors_of_the_wrong_kind(tmp_path: Path, files: dict[str, Path], index: int) -> None:
    metadata, tensors = contents(list(files.values())[index])
    path, model = tmp_path / "a", fresh()
    for name, t in tensors.items():
        wrong = [t.reshape(-1)[:-1], t.unsqueeze(0), torch.cat([t.reshape(-1), t.reshape(-1)])]
        if not t.is_floating_point() or not name.startswith(("fc.", "head.", "embedding.")):
            wrong += [t.to(d) for d in (torch.float32, torch.int64, torch.uint8, torch.bool) if d != t.dtype]
        wrong += [t.to(torch.complex64), t.to(torch.float8_e4m3fn), t.to(torch.int16)]
        for other in wrong:
            craft(path, metadata, {**tensors, name: other})
            assert_refused(model, path, "in the file and")
        craft(path, metadata, {key: value for key, value in tensors.items() if key != name})
        assert_refused(model, path, "it lacks")
        craft(path, metadata, {**tensors, name + "2": t})
        assert_refused(model, path, "the model has no")


def test_a_map_of_shared_tensors_that_does_not_fit(tmp_path: Path) -> None:
    save(quantised(BinaryConfig(), packed=False, tied=True), tmp_path / "good")
    metadata, tensors = contents(tmp_path / "good")
    assert metadata["shared"] == {"head.weight": "embedding.weight"}
    path, model = tmp_path / "a", fresh()
    for shared in (
        {},
        {"head.weight": "nowhere"},
        {"head.weight": ""},
        {"head.weight": "head.weight"},
        {"head.weight": "other", "other": "head.weight"},
        {"head.weight": "other", "other": "embedding.weight"},
        {"head.weight": "embedding.weight", "embedding.weight": "head.weight"},
        {"head.weight": "embedding.weight", "extra": "embedding.weight"},
        {"head.weight": "fc.weight"},
        {"head.weight": None},
        {"head.weight": ["embedding.weight"]},
        {"head.weight": 1},
    ):
        craft(path, {**metadata, "shared": shared}, tensors)
        assert_refused(model, path)


def changed_bit(t: Tensor, row: int, word: int, lane: int, bit: int) -> Tensor:
    t = t.clone()
    t[row, word, lane] ^= (1 << bit) if bit < 31 else -(1 << 31)
    return t


def test_packed_arrays_that_contradict_themselves(tmp_path: Path, files: dict[str, Path]) -> None:
    path, model = tmp_path / "a", fresh()
    # 40 columns: the second word of a binary plane has 8 of its 32 bits; 24 or 40 rows: the last tile has 8 of 16 rows.
    for kind, name in (
        ("BinaryConfig-False-True", "fc.weight"),
        ("BinaryConfig-True-True", "embedding.weight"),
        ("SalientConfig--True", "fc.weight"),
        ("SalientConfig--True", "fc.mask"),
    ):
        metadata, tensors = contents(files[kind])
        for where in ((0, 1, 0, 8), (0, 1, 3, 31), (2 if name != "embedding.weight" else 1, 0, 8, 0)):
            craft(path, metadata, {**tensors, name: changed_bit(tensors[name], *where)})
            assert_refused(model, path, "bits past the last row or column must be 0")
    metadata, tensors = contents(files["FP4Config--True"])
    craft(path, metadata, {**tensors, "fc.weight": changed_bit(tensors["fc.weight"], 2, 0, 8, 0)})
    assert_refused(model, path, "must be 0")
    scale = tensors["fc.scale"].clone()
    scale[1, 1] = 255
    craft(path, metadata, {**tensors, "fc.scale": scale})
    assert_refused(model, path, "layer 'fc': scale")
    metadata, tensors = contents(files["SalientConfig--True"])
    start, mask = tensors["fc.start"], tensors["fc.mask"]
    for wrong in (start + 1, start - 1, start * 0, start.flip(0), start.index_fill(0, torch.tensor([1]), 2**31 - 1)):
        craft(path, metadata, {**tensors, "fc.start": wrong.to(torch.int32)})
        assert_refused(model, path, "layer 'fc'")
    craft(path, metadata, {**tensors, "fc.mask": changed_bit(mask, 0, 0, 0, 0)})
    assert_refused(model, path, "layer 'fc'")
    craft(path, metadata, {**tensors, "fc.mask": mask * 0})
    assert_refused(model, path, "layer 'fc'")
    for entries in (0, 1, 10**6):
        entry = metadata["modules"]["fc"]
        changed = {**entry, "arguments": {**entry["arguments"], "entries": entries}}
        value = torch.zeros(entries, dtype=torch.uint8)
        craft(path, {**metadata, "modules": {**metadata["modules"], "fc": changed}}, {**tensors, "fc.value": value})
        assert_refused(model, path, "layer 'fc'")


def test_a_hostile_file_takes_little_memory(tmp_path: Path, files: dict[str, Path]) -> None:
    path, model = tmp_path / "a", fresh()
    metadata, tensors = contents(files["SalientConfig--True"])
    entry = metadata["modules"]["fc"]
    tracemalloc.start()
    for key in entry["arguments"]:
        changed = {**entry, "arguments": {**entry["arguments"], key: 10**15}}
        craft(path, {**metadata, "modules": {**metadata["modules"], "fc": changed}}, tensors)
        assert_refused(model, path)
    # A sparse file of 1 TB whose header says that it is one tensor.
    header = {
        "__metadata__": {"other": "{}"},
        "fc.weight": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]},
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**40)
    assert_refused(model, path, "was not written by bitmill|cannot be read")
    path.unlink()
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()


# A model that is not the one that was saved


@each_kind
@each_form
def test_other_architectures(tmp_path: Path, config: Config, packed: bool) -> None:
    path = tmp_path / "a"
    save(quantised(config, packed), path)

    def changed(change: Callable[[Model], Any]) -> Model:
        model = fresh()
        change(model)
        return model

    def lacks(model: Model) -> None:
        del model.fc

    def more(model: Model) -> None:
        model.extra = nn.Linear(2, 2)

    def more_buffer(model: Model) -> None:
        model.register_buffer("extra", torch.zeros(2))

    def no_norm(model: Model) -> None:
        model.norm = nn.Identity()

    def wide_norm(model: Model) -> None:
        model.norm = nn.BatchNorm1d(4)

    def no_bias(model: Model) -> None:
        model.fc = nn.Linear(40, 40, bias=False)

    def wide(model: Model) -> None:
        model.fc = nn.Linear(40, 41)

    def narrow(model: Model) -> None:
        model.fc = nn.Linear(39, 40)

    def double(model: Model) -> None:
        model.norm.double()

    def flags(model: Model) -> None:
        model.flags = model.flags.to(torch.uint8)

    def conv(model: Model) -> None:
        model.fc = nn.Conv1d(40, 40, 1)

    for change, match in (
        (lacks, "it has a layer 'fc', and the model has none of that name"),
        (more, r"it lacks 'extra\.bias', 'extra\.weight'$"),
        (more_buffer, r"it lacks 'extra'$"),
        (no_norm, r"the model has no 'norm\.bias', 'norm\.num_batches_tracked', 'norm\.running_mean'$"),
        (wide_norm, r"norm\.weight has shape \[3\] in the file and \[4\] in the model"),
        (wide, r"out_features is 40 in the file and 41 in the model"),
        (narrow, r"in_features is 40 in the file and 39 in the model"),
        (double, r"norm\.weight is torch\.float32 in the file and torch\.float64 in the model; convert the model"),
        (flags, r"flags is torch\.bool in the file and torch\.uint8 in the model"),
        (conv, "cannot take the place of a Conv1d"),
    ):
        assert_refused(changed(change), path, match)
    lazy = changed(lambda model: setattr(model, "norm", nn.LazyBatchNorm1d()))
    with pytest.raises(ValueError, match="must be a plain tensor, got UninitializedParameter"):
        load(lazy, path)
    load(target := changed(no_bias), path)  # the layer that takes its place has one
    assert target.fc.bias is not None


def test_a_buffer_that_no_file_has_must_exist(tmp_path: Path) -> None:
    save(quantised(BinaryConfig(), True), tmp_path / "a")
    with torch.device("meta"):
        meta = Model()
    assert_refused(
        meta, tmp_path / "a", "hidden is non-persistent, so no file has it, and on the meta device; create it"
    )


def test_a_file_of_another_form_or_none(tmp_path: Path) -> None:
    save(Model(), tmp_path / "plain")
    assert_refused(quantised(BinaryConfig(), True), tmp_path / "plain", "it lacks 'fc.scale', 'head.scale'")
    dequantised = quantised(BinaryConfig(), True)
    dequantize_(dequantised)
    save(dequantised, tmp_path / "dequantised")
    target = fresh()
    assert load(target, tmp_path / "dequantised") == []
    assert_same_state(dequantised, target)


# Every layer class can be named in a file


def test_kinds_are_the_layers_that_exist() -> None:
    assert set(checkpoint.KINDS) == {
        *("BinaryLinear", "BinaryEmbedding", "SalientLinear", "FP4Linear"),
        *("PackedBinaryLinear", "PackedBinaryEmbedding", "PackedSalientLinear", "PackedFP4Linear"),
    }
    assert issubclass(BinaryEmbedding, nn.Embedding) and not issubclass(PackedBinaryLinear, nn.Linear)


def test_metadata_is_small_and_readable(tmp_path: Path) -> None:
    save(quantised(SalientConfig(), True), tmp_path / "a")
    metadata, tensors = contents(tmp_path / "a")
    assert metadata["format_version"] == checkpoint.FORMAT_VERSION == 1
    entries = tensors["fc.value"].numel()
    assert metadata["configs"] == [SalientConfig().to_dict()]
    assert metadata["modules"]["fc"] == {
        "kind": "PackedSalientLinear",
        "config": 0,
        "arguments": {"in_features": 40, "out_features": 40, "bias": True, "entries": entries},
    }
    assert abs(entries - 160) <= 1 and "hidden" not in tensors


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
