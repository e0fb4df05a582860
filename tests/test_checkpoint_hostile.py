# SPDX-License-Identifier: Apache-2.0
"""load: a file from a stranger is one clear error and changes nothing."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from bitmill import BinaryConfig, SalientConfig, checkpoint, dequantize_, load, save
from bitmill._checkpoint_file import FORMAT_VERSION
from bitmill.config import Config
from bitmill.nn import BinaryEmbedding, PackedBinaryLinear
from checkpoint_files import contents, good_files
from checkpoint_models import (
    Model,
    Snapshot,
    assert_refused,
    assert_same_state,
    each_form,
    each_kind,
    fresh,
    output,
    quantised,
)

# Files that are not what they should be


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return good_files(tmp_path_factory.mktemp("good"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    model = fresh()
    snapshot = Snapshot(model)
    for path, kind in ((tmp_path / "none", FileNotFoundError), (tmp_path, IsADirectoryError)):
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
        *("BinaryLinear", "BinaryConv2d", "BinaryEmbedding", "SalientLinear", "FP4Linear"),
        *("OneBitLinear", "PackedOneBitLinear", "PackedZonedLinear", "PackedInt8Linear", "PackedInt8Embedding"),
        *("PackedBinaryLinear", "PackedBinaryConv2d", "PackedBinaryEmbedding", "PackedSalientLinear"),
        *("FP4Embedding", "PackedFP4Embedding", "PackedFP4Linear"),
    }
    assert issubclass(BinaryEmbedding, nn.Embedding) and not issubclass(PackedBinaryLinear, nn.Linear)


def test_metadata_is_small_and_readable(tmp_path: Path) -> None:
    config = SalientConfig(fraction=0.3)
    save(quantised(config, True), tmp_path / "a")
    metadata, tensors = contents(tmp_path / "a")
    assert metadata["format_version"] == FORMAT_VERSION == 1
    entries = tensors["fc.value"].numel()
    assert metadata["configs"] == [config.to_dict()]
    assert metadata["modules"]["fc"] == {
        "kind": "PackedSalientLinear",
        "config": 0,
        "arguments": {
            "in_features": 40,
            "out_features": 40,
            "bias": True,
            "encoding": "bitmap",
            "entries": entries,
        },
    }
    assert abs(entries - 480) <= 1 and "hidden" not in tensors


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    for path, kind in ((tmp_path, IsADirectoryError), (tmp_path / "none" / "a", FileNotFoundError)):
        with pytest.raises(kind, match=rf"save: {path} cannot be written: path must be a file in a folder that exists"):
            save(fresh(), path)
    assert not list(tmp_path.iterdir())
