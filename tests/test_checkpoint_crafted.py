# SPDX-License-Identifier: Apache-2.0
"""load: files with a valid digest over anything: each is one clear error and changes nothing."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig, FP4Config, SalientConfig, checkpoint, load, pack_, quantize_, save
from bitmill._checkpoint_file import FIELDS, MAX_METADATA
from checkpoint_files import contents, craft, good_files
from checkpoint_models import (
    KINDS,
    assert_refused,
    assert_same_state,
    fresh,
    quantised,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return good_files(tmp_path_factory.mktemp("good"))


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
    craft(path, " " * (MAX_METADATA + 1) + json.dumps(metadata), tensors)
    assert_refused(model, path, "sensible size")
    for field in FIELDS:
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
    for wrong in ("", "0" * 64, metadata["sha256"].upper(), metadata["sha256"][:-1]):
        craft(path, json.dumps({**metadata, "sha256": wrong}), tensors)
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


def test_descriptions_of_a_convolution(tmp_path: Path) -> None:
    def convolution() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, (3, 2), 2, 1, groups=2))

    path = tmp_path / "a"
    for method, packed in (("bibert", False), ("bibert", True), ("xnorpp", True)):
        model = convolution()
        quantize_(model, BinaryConfig(method, convs=True))
        if packed:
            pack_(model)
        save(model, path)
        metadata, tensors = contents(path)
        entry, fresh_model = metadata["modules"]["0"], convolution()
        for key, value in entry["arguments"].items():
            for junk in [
                *JUNK,
                [],
                [1],
                [3, 2, 1],
                [2, 3],
                [True, True],
                [1.0, 1],
                [[1, 1], 1],
                {},
                41,
                2**40,
                "zeros",
            ]:
                if (type(junk) is type(value) and junk == value) or (
                    isinstance(value, bool) and isinstance(junk, bool)
                ):
                    continue
                changed = {**entry, "arguments": {**entry["arguments"], key: junk}}
                craft(path, {**metadata, "modules": {"0": changed}}, tensors)
                assert_refused(fresh_model, path)
            fewer = {k: v for k, v in entry["arguments"].items() if k != key}
            craft(path, {**metadata, "modules": {"0": {**entry, "arguments": fewer}}}, tensors)
            assert_refused(fresh_model, path)
        craft(path, metadata, tensors)
        assert load(fresh_model, path) == ["0"]


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


NULLABLE = ("group_size", "act_bits", "weight_bits")  # None stands for what the method usually has


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
        *({**config, key: None} for key in config if key not in NULLABLE),
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
        elif t.dtype == torch.float32 and isinstance(metadata["modules"].get(name.partition(".")[0]), dict):
            kind = metadata["modules"][name.partition(".")[0]]["kind"]
            if kind.startswith("Packed") and kind != "PackedBinaryEmbedding":
                wrong += [t.half(), t.double(), t.bfloat16()]
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
        ("SalientConfig--True", "fc.index"),
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
    start, mask = tensors["fc.start"], tensors["fc.index"]
    for wrong in (start + 1, start - 1, start * 0, start.flip(0), start.index_fill(0, torch.tensor([1]), 2**31 - 1)):
        craft(path, metadata, {**tensors, "fc.start": wrong.to(torch.int32)})
        assert_refused(model, path, "layer 'fc'")
    craft(path, metadata, {**tensors, "fc.index": changed_bit(mask, 0, 0, 0, 0)})
    assert_refused(model, path, "layer 'fc'")
    craft(path, metadata, {**tensors, "fc.index": mask * 0})
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
