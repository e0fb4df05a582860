# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4 in GGUF files: blocks, files and models, against the gguf package, and hostile files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

gguf = pytest.importorskip("gguf", reason="needs gguf")

import bitmill  # noqa: E402
from bitmill import FP4Config, ops  # noqa: E402
from bitmill.integrations.gguf import export, from_blocks, import_, read, to_blocks  # noqa: E402
from bitmill.nn import PackedFP4Linear  # noqa: E402
from fp4_file_inputs import e8m0, model, mxfp4_values, random_codes  # noqa: E402

MXFP4 = gguf.GGMLQuantizationType.MXFP4


def ggml_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Byte by byte: a scale, then columns 0 ... 15 low and 16 ... 31 high."""
    rows = []
    for row, bytes_of_row in zip(codes.tolist(), scales.tolist(), strict=True):
        out = []
        for block, scale in enumerate(bytes_of_row):
            part = row[32 * block : 32 * block + 32]
            out += [scale, *(part[i] | part[i + 16] << 4 for i in range(16))]
        rows.append(out)
    return torch.tensor(rows, dtype=torch.uint8)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, object]]) -> Path:
    writer = gguf.GGUFWriter(path, "none")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


def finish(writer: object) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def first_layer() -> dict[str, tuple[np.ndarray, object]]:
    """What a file holds for the first layer of `model()`, and a tensor of another type."""
    scales = e8m0(24, 2)
    scales[0] = 127
    return {
        "0.weight": (ggml_blocks(random_codes(24, 64), scales).numpy(), MXFP4),
        "0.bias": (np.linspace(-1, 1, 24, dtype=np.float16), None),
        "2.weight": (np.zeros((5, 24), np.float32), None),
    }


def test_blocks_are_the_layout_of_mxfp4_quantize() -> None:
    codes, scales = random_codes(5, 96), e8m0(5, 3)
    blocks = ggml_blocks(codes, scales)
    packed, scale = from_blocks(blocks)
    assert torch.equal(scale, scales) and torch.equal(ops.fp4.unpack_nibbles(packed, 96), codes)
    assert torch.equal(to_blocks(packed, scale), blocks)
    assert torch.equal(ops.mxfp4_dequantize(packed, scale, 96), mxfp4_values(codes, scales))
    stack = from_blocks(blocks.expand(2, 5, -1))
    assert torch.equal(stack[0][1], packed) and torch.equal(to_blocks(*stack)[1], blocks)
    assert [t.shape for t in from_blocks(blocks[:0])] == [(0, 48), (0, 3)]


def test_gguf_reads_the_same_numbers() -> None:
    x = torch.randn(7, 64) * 0.1
    quantised = gguf.quants.quantize(x.numpy(), MXFP4)
    packed, scale = from_blocks(torch.from_numpy(quantised))
    assert np.array_equal(to_blocks(packed, scale).numpy(), quantised)
    assert np.array_equal(ops.mxfp4_dequantize(packed, scale, 64).numpy(), gguf.quants.dequantize(quantised, MXFP4))
    packed, scale = ops.mxfp4_quantize(x)
    theirs = gguf.quants.dequantize(to_blocks(packed, scale).numpy(), MXFP4)
    assert np.array_equal(ops.mxfp4_dequantize(packed, scale, 64).numpy(), theirs)


def ggml_nvfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Byte by byte: four scales, then for each columns 0 ... 7 low and 8 ... 15 high."""
    rows = []
    for row, bytes_of_row in zip(codes.tolist(), scales.tolist(), strict=True):
        out = []
        for block in range(len(row) // 64):
            out += bytes_of_row[4 * block : 4 * block + 4]
            for first in range(64 * block, 64 * block + 64, 16):
                out += [row[i] | row[i + 8] << 4 for i in range(first, first + 8)]
        rows.append(out)
    return torch.tensor(rows, dtype=torch.uint8)


def test_nvfp4_blocks_are_the_layout_of_nvfp4_quantize() -> None:
    codes, scales = random_codes(5, 128), torch.randint(1, 127, (5, 8), dtype=torch.uint8)
    blocks = ggml_nvfp4(codes, scales)
    packed, scale = from_blocks(blocks, "nvfp4")
    assert torch.equal(scale, scales) and torch.equal(ops.fp4.unpack_nibbles(packed, 128), codes)
    assert torch.equal(to_blocks(packed, scale, "nvfp4"), blocks)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.NVFP4)
    assert np.array_equal(ops.nvfp4_dequantize(packed, scale, 128).numpy(), theirs)
    with pytest.raises(
        ValueError, match=r"scale must have a multiple of 4 columns for 'nvfp4', got \[5, 7\]; .* of 64"
    ):
        to_blocks(packed[:, :56], scale[:, :7], "nvfp4")
    with pytest.raises(
        ValueError, match=r"rows of a multiple of 36 bytes, got shape \[5, 71\]; k must be a multiple of 64"
    ):
        from_blocks(blocks[:, 1:], "nvfp4")
    with pytest.raises(ValueError, match='from_blocks: format must be "mxfp4" or "nvfp4", got "q4_0"'):
        from_blocks(blocks, "q4_0")


def test_an_nvfp4_model_and_its_global_scale(tmp_path: Path) -> None:
    linears = nn.Sequential(nn.Linear(128, 5))
    bitmill.quantize_(linears, FP4Config("nvfp4"))
    bitmill.pack_(linears)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "none")
    export(linears, writer)
    finish(writer)
    fresh = nn.Sequential(nn.Linear(128, 5))
    assert import_(fresh, tmp_path / "a.gguf") == ["0"]
    for name, t in linears.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], t), name
    weight = read(tmp_path / "a.gguf")["0.weight"]
    assert torch.equal(weight.dequantize(), linears[0].dequantize().weight) and 0 < weight.global_scale < 1

    rows = to_blocks(weight.packed, weight.scale, "nvfp4").numpy()
    alone = {"0.weight": (rows, gguf.GGMLQuantizationType.NVFP4)}
    assert read(write(tmp_path / "b.gguf", alone))["0.weight"].global_scale is None
    for value in ([0.0], [np.nan], [np.inf], [-1.0], [1.0, 2.0]):
        path = write(tmp_path / "c.gguf", {**alone, "0.scale": (np.array(value, np.float32), None)})
        with pytest.raises(ValueError, match=r"read: 0\.scale must be one positive and finite F32, got"):
            read(path)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_model_from_a_file_and_back(activations: str, tmp_path: Path) -> None:
    tensors = first_layer()
    path, linears = write(tmp_path / "a.gguf", tensors), model().eval()
    assert import_(linears, path, activations=activations) == ["0"]
    packed = linears[0]
    assert isinstance(packed, PackedFP4Linear) and packed.config == FP4Config("mxfp4", activations=activations)
    packed.validate()
    weight = gguf.quants.dequantize(tensors["0.weight"][0], MXFP4)
    assert np.array_equal(packed.dequantize().weight.detach().numpy(), weight)
    assert np.array_equal(packed.bias.numpy(), tensors["0.bias"][0].astype(np.float32))

    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "none")
    assert export(linears, writer) == ["0"]
    finish(writer)
    again = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert again.keys() == {"0.weight", "0.bias"} and again["0.weight"].tensor_type == MXFP4
    assert again["0.weight"].shape.tolist() == [64, 24]
    assert np.array_equal(again["0.weight"].data, tensors["0.weight"][0])


def test_names(tmp_path: Path) -> None:
    tensors = first_layer()
    path = write(tmp_path / "a.gguf", {f"blk.{name}": entry for name, entry in tensors.items()})
    linears = model()
    for names, message in (
        (
            {"0.weight": "0"},
            r"import_: 0\.weight must be an MXFP4 or NVFP4 tensor of the file, got none of that name; correct",
        ),
        ({"blk.2.weight": "2"}, r"blk\.2\.weight must be an MXFP4 or NVFP4 tensor of the file, got F32"),
        ({"blk.0.weight": "1"}, r"import_: '1' must be a torch\.nn\.Linear of the model, got ReLU"),
        (None, r"import_: 'blk\.0' must be a torch\.nn\.Linear of the model, got none of that name"),
    ):
        with pytest.raises(ValueError, match=message):
            import_(linears, path, names)
    assert type(linears[0]) is nn.Linear
    assert import_(linears, path, {"blk.0.weight": "0"}) == ["0"]
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "none")
    with pytest.raises(ValueError, match="export: 2 must be a packed MXFP4 or NVFP4 layer of the model; correct names"):
        export(linears, writer, {"2": "blk.2.weight"})
    assert export(linears, writer, {"0": "blk.0.weight"}) == ["0"]
    finish(writer)
    assert torch.equal(read(tmp_path / "b.gguf")["blk.0.weight"].packed, read(path)["blk.0.weight"].packed)


def test_a_stack_of_experts(tmp_path: Path) -> None:
    blocks = ggml_blocks(random_codes(15, 64), e8m0(15, 2)).view(3, 5, 34)
    path = write(tmp_path / "a.gguf", {"experts.weight": (blocks.numpy(), MXFP4)})
    experts = nn.Module()
    experts.experts = nn.ModuleList(nn.Linear(64, 5, bias=False) for _ in range(3))
    assert import_(experts, path) == ["experts.0", "experts.1", "experts.2"]
    for expert, packed in enumerate(experts.experts):
        values = ops.mxfp4_dequantize(*from_blocks(blocks[expert]), 64)
        assert torch.equal(packed.dequantize().weight, values)


def test_a_nan_block_is_nan_in_a_tensor_and_an_error_in_a_layer(tmp_path: Path) -> None:
    tensors = first_layer()
    tensors["0.weight"][0][3, 17] = 255
    path, linears = write(tmp_path / "a.gguf", tensors), model()
    values = read(path)["0.weight"].dequantize()
    assert values[3, 32:].isnan().all() and values.isnan().sum() == 32
    with pytest.raises(ValueError, match=r"0: the scales must be finite, row 3 has nan for columns 32 to 63"):
        import_(linears, path)
    assert type(linears[0]) is nn.Linear


def test_k_not_a_multiple_of_the_block(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"rows of a multiple of 17 bytes, got shape \[2, 35\]; k must be a multiple of"
    ):
        from_blocks(torch.zeros(2, 35, dtype=torch.uint8))
    linears = nn.Sequential(nn.Linear(72, 8))
    bitmill.quantize_(linears, FP4Config("mxfp4"))
    bitmill.pack_(linears)
    with pytest.raises(ValueError, match=r"export: 0: to_blocks: packed must have shape \[8, 48\] .* multiple of 32"):
        export(linears, gguf.GGUFWriter(tmp_path / "a.gguf", "none"))


def test_wrong_dtypes_and_shapes() -> None:
    packed, scale = ops.mxfp4_quantize(torch.randn(2, 64))
    for given, message in (
        ((packed.int(), scale), "to_blocks: packed must be uint8, got int32"),
        ((packed, scale.float()), "to_blocks: scale must be uint8, got float32"),
        ((packed, scale[:1]), r"packed must have shape \[1, 32\] for these scales, got \[2, 32\]"),
        ((packed[0, 0], scale), "packed and scale must have rows, got a scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            to_blocks(*given)
    with pytest.raises(ValueError, match="from_blocks: blocks must be uint8, got float32"):
        from_blocks(torch.zeros(2, 34))
    with pytest.raises(ValueError, match=r"rows of a multiple of 17 bytes, got shape \[\]"):
        from_blocks(torch.tensor(3, dtype=torch.uint8))


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", first_layer())
    whole = path.read_bytes()
    for length in (0, 3, 20, 100, len(whole) // 2, whole.rindex(b"2.weight")):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.gguf cannot be read as a GGUF file: .*; copy it again"):
            read(path)
    start = gguf.GGUFReader(write(path, first_layer())).data_offset
    generator = np.random.default_rng(0)
    for _ in range(200):  # whatever a byte does, it is a result or one error
        damaged = bytearray(whole)
        damaged[generator.integers(start)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            import_(model(), path)
        except ValueError as error:
            assert str(error).startswith(("import_: ", f"{path} cannot be read as a GGUF file"))
    with pytest.raises(OSError, match="nowhere"):
        read(tmp_path / "nowhere.gguf")
