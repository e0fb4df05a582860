# SPDX-License-Identifier: Apache-2.0
"""4-bit state dicts of bitsandbytes: written by its formulas, by the package itself where it is, and hostile ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitmill
from bitmill import FP4Config, ops
from bitmill.integrations.bitsandbytes import export, import_, read
from bitmill.nn import PackedFP4Linear
from fp4_file_inputs import model, nibbles, random_codes

FORMATS = {"nf4": "nf4", "fp4": "bnb-fp4"}


def as_json(values: object) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def facts(kind: str, n: int, k: int, blocksize: int = 64) -> dict[str, object]:
    return {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": [n, k]}


def layer(kind: str, n: int, k: int, blocksize: int = 64, nested: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of layer 0, and the float32 weight that they stand for."""
    codes = random_codes(n * k)
    blocks = math.ceil(n * k / blocksize)
    table = torch.tensor(ops.code_values(FORMATS[kind]))
    state: dict[str, object] = facts(kind, n, k, blocksize)
    tensors = {"0.weight": nibbles(codes, "high").view(-1, 1), "0.weight.quant_map": table}
    if nested:
        tensors["0.weight.absmax"] = torch.randint(256, (blocks,), dtype=torch.uint8)
        tensors["0.weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        tensors["0.weight.nested_absmax"] = torch.rand(math.ceil(blocks / 4))
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 1.25}
        levels = torch.linspace(-1, 1, 256)[tensors["0.weight.absmax"].int()]
        absmax = levels * tensors["0.weight.nested_absmax"].repeat_interleave(4)[:blocks] + 1.25
    else:
        absmax = tensors["0.weight.absmax"] = torch.rand(blocks) + 0.5
    tensors[f"0.weight.quant_state.bitsandbytes__{kind}"] = as_json(state)
    return tensors, (table[codes.int()] * absmax.repeat_interleave(blocksize)[: n * k]).view(n, k)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_exact(kind: str, nested: bool) -> None:
    for n, k, blocksize, group in (
        (24, 64, 64, 64),
        (5, 96, 64, 32),
        (4, 32, 128, 32),
        (3, 72, 64, 8),
        (6, 128, 32, 32),
        (2, 4096, 4096, 4096),
    ):
        tensors, expected = layer(kind, n, k, blocksize, nested)
        weight = read(tensors)["0"]
        assert (weight.codebook, weight.k, weight.group_size) == (FORMATS[kind], k, group)
        assert torch.equal(weight.dequantize(), expected)
        linears = model(k, n, bias=False)
        if group % 16:
            with pytest.raises(ValueError, match=r"import_: 0: FP4Config: group_size must be .* multiple of 16"):
                import_(linears, tensors)
            continue
        assert import_(linears, tensors) == ["0"]
        linears[0].validate()
        assert linears[0].config == FP4Config(FORMATS[kind], group_size=group)
        assert torch.equal(linears[0].dequantize().weight, expected)
        x = torch.randn(3, k)
        torch.testing.assert_close(linears[0](x), x @ expected.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_gives_the_same_numbers(kind: str, nested: bool, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    theirs = nn.Sequential(
        bnb.nn.Linear4bit(128, 192, compute_dtype=torch.float32, compress_statistics=nested, quant_type=kind),
        nn.GELU(),
        bnb.nn.Linear4bit(192, 8, False, compute_dtype=torch.float32, compress_statistics=nested, quant_type=kind),
    )
    for module in (theirs[0], theirs[2]):
        module.weight = bnb.nn.Params4bit(
            torch.randn(module.weight.shape) * 0.1, requires_grad=False, compress_statistics=nested, quant_type=kind
        )
    theirs.to("cpu")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = nn.Sequential(nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 8, False))
    assert import_(ours, tmp_path / "model.safetensors") == ["0", "2"]
    for module, packed in ((theirs[0], ours[0]), (theirs[2], ours[2])):
        dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(packed.dequantize().weight, dense)
    x = torch.randn(16, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_storage_in_other_dtypes() -> None:
    tensors, expected = layer("nf4", 24, 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stored = {**tensors, "0.weight": tensors["0.weight"].flatten().view(dtype).unsqueeze(1)}
        assert torch.equal(read(stored)["0"].dequantize(), expected)


def test_a_model_from_a_file_and_back(tmp_path: Path) -> None:
    for kind in FORMATS:
        tensors, _ = layer(kind, 24, 64)
        tensors["0.weight.quant_state.bitsandbytes__" + kind] = as_json({**facts(kind, 24, 64), "dtype": "float32"})
        other = {key: t for key, t in model().state_dict().items() if key != "0.weight"}
        save_file({**tensors, **other}, tmp_path / "model.safetensors")
        linears = model()
        assert import_(linears, tmp_path / "model.safetensors") == ["0"]
        linears.load_state_dict(other, strict=False)
        assert isinstance(linears[0], PackedFP4Linear) and torch.equal(linears[0].bias, other["0.bias"])
        save_file(export(linears), tmp_path / "again.safetensors")
        again = load_file(tmp_path / "again.safetensors")
        facts_again = again.pop(f"0.weight.quant_state.bitsandbytes__{kind}")
        assert json.loads(bytes(facts_again.tolist())) == {**facts(kind, 24, 64), "dtype": "float32"}
        assert len(again) == len(tensors) + len(other) - 1
        assert all(torch.equal(t, {**tensors, **other}[name]) for name, t in again.items())


def test_layers_of_bitmill_written_and_read() -> None:
    linears = model(k=64, n=64)
    bitmill.quantize_(linears, FP4Config("nf4", group_size=32))
    bitmill.pack_(linears)
    fresh = model(k=64, n=64)
    assert import_(fresh, export(linears)) == ["0", "2"]
    assert torch.equal(fresh[0].dequantize().weight, linears[0].dequantize().weight)
    linears = nn.Sequential(nn.Linear(72, 8))
    bitmill.quantize_(linears, FP4Config("nf4"))
    bitmill.pack_(linears)
    with pytest.raises(ValueError, match="export: 0: in_features must be a multiple of group_size = 64, got 72"):
        export(linears)


def test_k_not_a_multiple_of_the_block() -> None:
    tensors, _ = layer("nf4", 4, 76)
    with pytest.raises(
        ValueError, match="read: 0: k and blocksize must share a factor of 8, got k = 76 and blocksize = 64"
    ):
        read(tensors)


def test_a_scale_that_is_nan() -> None:
    tensors, _ = layer("nf4", 24, 64)
    tensors["0.weight.absmax"][7] = torch.nan
    assert read(tensors)["0"].dequantize()[7].isnan().all()
    with pytest.raises(ValueError, match="import_: 0: the scales must be finite, row 7 has nan for columns 0 to 63"):
        import_(model(bias=False), tensors)


def test_truncated_tensors_and_wrong_dtypes() -> None:
    for nested in (False, True):
        tensors, _ = layer("nf4", 24, 64, nested=nested)
        for name in tensors:
            if "quant_state" in name:
                continue
            for t in (tensors[name][:-1], tensors[name].to(torch.int64)):
                with pytest.raises(ValueError, match=f"read: 0: .*{name} must "):
                    read({**tensors, name: t})
            if name != "0.weight.nested_absmax":
                with pytest.raises(ValueError, match=f"read: 0: {name} must be there, got none; take the whole"):
                    read({key: t for key, t in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"read: 0: 0\.weight\.absmax must be float32 of 24 elements, got uint8"):
        read({key: t for key, t in tensors.items() if "nested" not in key})
    other = torch.tensor(ops.code_values("bnb-fp4"))
    with pytest.raises(ValueError, match=r"0\.weight\.quant_map must be the table of 'nf4', got another one"):
        read({**tensors, "0.weight.quant_map": other})


def test_a_damaged_quant_state() -> None:
    tensors, _ = layer("nf4", 24, 64, nested=True)
    key = "0.weight.quant_state.bitsandbytes__nf4"
    good = json.loads(bytes(tensors[key].tolist()))
    for changes, message in (
        ({"quant_type": "fp4"}, "quant_type must be 'nf4' as in the name, got 'fp4'"),
        ({"blocksize": 0}, "blocksize must be a positive number, got 0"),
        ({"blocksize": 1 << 50}, "blocksize must be a positive number"),
        ({"blocksize": True}, "blocksize must be a positive number, got True"),
        ({"blocksize": 63}, "k and blocksize must share a factor of 8"),
        ({"shape": [24, 64, 1]}, r"shape must be \[n, k\], got \[24, 64, 1\]"),
        ({"shape": [1 << 39, 1 << 39]}, r"0\.weight must have \d+ bytes for shape .*, got 768; the file is truncated"),
        ({"shape": None}, r"shape must be \[n, k\], got None"),
        ({"nested_blocksize": -4}, "nested_blocksize must be a positive number"),
        ({"nested_blocksize": 1 << 39}, r"0\.weight\.nested_absmax must be float32 of 1 elements"),
        ({"nested_offset": math.nan}, "nested_offset must be a finite float32, got nan"),
        ({"nested_offset": 10**400}, "nested_offset must be a finite float32, got 1000"),
        ({"nested_offset": -1e300}, "nested_offset must be a finite float32, got -1e[+]300"),
    ):
        with pytest.raises(ValueError, match=f"read: 0: {message}"):
            read({**tensors, key: as_json({**good, **changes})})
    for data in (b"", b"{", b"[]", b"[" * 60000, b"\xff", b"{}" + b" " * (1 << 16)):
        with pytest.raises(ValueError, match=r"read: 0: quant_state must be a JSON object|quant_type must be"):
            read({**tensors, key: torch.tensor(list(data), dtype=torch.uint8)})
    with pytest.raises(ValueError, match="read: 0: the kind must be nf4 or fp4, got 'int4'"):
        read({"0.weight.quant_state.bitsandbytes__int4": tensors[key]})


def test_what_does_not_fit_leaves_the_model_alone() -> None:
    tensors, _ = layer("nf4", 24, 64)
    linears = model()
    for changes, message in (
        ({}, r"import_: 0: the bias must be of floats \[24\] as in the model, got none in the file"),
        ({"0.bias": torch.ones(23)}, r"the bias must be of floats \[24\] as in the model, got float32 \[23\]"),
        ({"0.bias": torch.ones(24).int()}, r"the bias must be of floats \[24\] as in the model, got int32 \[24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            import_(linears, {**tensors, **changes})
    with pytest.raises(ValueError, match=r"0: the weight must have shape \[24, 32\] as in the model, got \[24, 64\]"):
        import_(model(k=32, bias=False), tensors)
    assert type(linears[0]) is nn.Linear
