# SPDX-License-Identifier: Apache-2.0
"""save and load: what goes in comes out bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from bitmill import BinaryConfig, FP4Config, SalientConfig, checkpoint, load, pack_, quantize_, save
from bitmill.config import Config
from bitmill.demo.model import Stories, load_stories
from bitmill.nn import BinaryLinear
from checkpoint_models import (
    Model,
    assert_refused,
    assert_same_state,
    each_config,
    each_form,
    each_kind,
    fresh,
    fresh_on_cpu,
    output,
    quantised,
    same_bytes,
)

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
