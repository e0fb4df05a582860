# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4 of compressed-tensors and ModelOpt: tensors, models, the two global scales, and hostile files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitmill
from bitmill import FP4Config, ops
from bitmill.integrations.compressed_tensors import export, from_tensors, import_, read, to_tensors
from bitmill.nn import PackedFP4Linear
from fp4_file_inputs import E2M1, e8m0, model, nibbles, random_codes

DIVISOR = 1843.7  # 2688 / amax; the reciprocal of its reciprocal, each a float32, is another number
NAMES = {
    "divisor": ("weight_packed", "weight_scale", "weight_global_scale"),
    "multiplier": ("weight", "weight_scale", "weight_scale_2"),
}


def e4m3(*shape: int) -> Tensor:
    """Scales of all sizes, the largest one included."""
    scales = torch.randint(1, 127, shape, dtype=torch.uint8)
    scales.view(-1)[0] = 126
    return scales.view(torch.float8_e4m3fn)


def nvfp4(n: int = 24, k: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and a divisor."""
    return random_codes(n, k), e4m3(n, k // 16), torch.tensor([DIVISOR])


def checkpoint(convention: str = "divisor") -> dict[str, Tensor]:
    """A state_dict for `model()` whose first layer is NVFP4."""
    codes, scale, number = nvfp4()
    parts = (nibbles(codes), scale, number if convention == "divisor" else 1 / number)
    other = {key: t for key, t in model().state_dict().items() if key.startswith("2.")}
    named = {f"0.{key}": t for key, t in zip(NAMES[convention], parts, strict=True)}
    return {**named, "0.bias": torch.randn(24), "0.input_global_scale": torch.ones(1), **other}


def test_nvfp4_is_the_layout_of_nvfp4_quantize() -> None:
    codes, scale, divisor = nvfp4()
    weight = from_tensors(nibbles(codes), scale, divisor)
    assert weight.format == "nvfp4" and torch.equal(weight.packed, nibbles(codes))
    assert torch.equal(weight.scale, scale.view(torch.uint8))
    exact = E2M1.double()[codes.int()] * scale.double().repeat_interleave(16, -1) / divisor.double()
    torch.testing.assert_close(weight.dequantize().double(), exact, rtol=2e-7, atol=0)
    multiplier = torch.tensor(weight.global_scale)
    assert torch.equal(weight.dequantize(), ops.nvfp4_dequantize(weight.packed, weight.scale, 64, multiplier))
    back = to_tensors(weight)
    for got, expected in zip(back, (nibbles(codes), scale, divisor), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_every_divisor_comes_back_bit_for_bit() -> None:
    codes, scale, _ = nvfp4(1, 16)
    divisors = torch.cat([1 + torch.rand(200), torch.exp2(100 * torch.rand(200)), torch.tensor([1.0, 3e38])])
    lost = 0
    for divisor in divisors.split(1):
        assert torch.equal(to_tensors(from_tensors(nibbles(codes), scale, divisor))[2], divisor)
        lost += not torch.equal(1 / (1 / divisor), divisor)
    assert lost > 20


def test_mxfp4() -> None:
    codes, scale = random_codes(24, 64), e8m0(24, 2)
    for convention in ("divisor", "multiplier", "none"):
        weight = from_tensors(nibbles(codes), scale, None, convention)
        assert weight.format == "mxfp4" and weight.global_scale is None
        assert torch.equal(weight.dequantize(), ops.mxfp4_dequantize(nibbles(codes), scale, 64))
        packed, back, number = to_tensors(weight, convention)
        assert torch.equal(packed, nibbles(codes)) and torch.equal(back, scale) and number is None
    if hasattr(torch, "float8_e8m0fnu"):
        assert torch.equal(from_tensors(nibbles(codes), scale.view(torch.float8_e8m0fnu)).scale, scale)


def test_missing_global_scale() -> None:
    codes, scale, divisor = nvfp4()
    for convention in ("divisor", "multiplier"):
        with pytest.raises(
            ValueError, match=f'global_scale must be there with convention="{convention}", got none; the'
        ):
            from_tensors(nibbles(codes), scale, None, convention)
    plain = from_tensors(nibbles(codes), scale, None, "none")
    assert plain.global_scale is None
    assert torch.equal(plain.dequantize(), ops.nvfp4_dequantize(nibbles(codes), scale.view(torch.uint8), 64))
    assert to_tensors(plain, "none")[2] is None and to_tensors(plain)[2].item() == 1
    with pytest.raises(ValueError, match='global_scale must be absent with convention="none", got one; pass "divisor"'):
        from_tensors(nibbles(codes), scale, divisor, "none")
    with pytest.raises(
        ValueError, match='convention must be "divisor" or "multiplier" for a weight with a global scale'
    ):
        to_tensors(from_tensors(nibbles(codes), scale, divisor), "none")
    tensors = checkpoint()
    del tensors["0.weight_global_scale"]
    with pytest.raises(ValueError, match=r"read: 0: from_tensors: global_scale must be there"):
        import_(model(), tensors)
    assert import_(model(), tensors, "none") == ["0"]


def test_inverted_global_scale() -> None:
    codes, scale, divisor = nvfp4()
    with pytest.raises(
        ValueError, match=r'at least 1 with convention="divisor", .* got 0\.000542388; pass "multiplier"'
    ):
        from_tensors(nibbles(codes), scale, 1 / divisor)
    with pytest.raises(ValueError, match=r'at most 1 with convention="multiplier", .* got 1843\.7; pass "divisor"'):
        from_tensors(nibbles(codes), scale, divisor, "multiplier")
    right = from_tensors(nibbles(codes), scale, 1 / divisor, "multiplier")
    torch.testing.assert_close(right.dequantize(), from_tensors(nibbles(codes), scale, divisor).dequantize())
    with pytest.raises(ValueError, match='convention must be "divisor", "multiplier" or "none", got "reciprocal"'):
        from_tensors(nibbles(codes), scale, divisor, "reciprocal")


def test_a_global_scale_that_is_no_number() -> None:
    codes, scale, _ = nvfp4()
    for value in (0.0, -3.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="global_scale must be positive and finite, got"):
            from_tensors(nibbles(codes), scale, torch.tensor([value]))
    for number in (torch.ones(2), torch.ones(0), torch.ones(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match="global_scale must be one float32, got"):
            from_tensors(nibbles(codes), scale, number)


def test_swapped_nibbles_need_their_order_named() -> None:
    codes, scale, divisor = nvfp4()
    weight = from_tensors(nibbles(codes, "high"), scale, divisor, nibble_order="high")
    assert torch.equal(weight.packed, nibbles(codes))
    assert not torch.equal(from_tensors(nibbles(codes, "high"), scale, divisor).packed, nibbles(codes))
    assert torch.equal(to_tensors(weight, nibble_order="high")[0], nibbles(codes, "high"))


def test_a_nan_block_is_nan_in_a_tensor_and_an_error_in_a_layer() -> None:
    tensors, linears = checkpoint(), model()
    tensors["0.weight_scale"].view(torch.uint8)[5, 1] = 127
    values = read(tensors)["0"].dequantize()
    assert values[5, 16:32].isnan().all() and values.isnan().sum() == 16
    with pytest.raises(ValueError, match=r"import_: 0: the scales must be finite, row 5 has nan for columns 16 to 31"):
        import_(linears, tensors)
    assert type(linears[0]) is nn.Linear


def test_k_not_a_multiple_of_the_block() -> None:
    codes, scale, divisor = nvfp4(4, 64)
    with pytest.raises(
        ValueError, match=r"scale must be float8_e4m3fn of 16 .* and k a multiple of 16, got \[4, 4\] and k = 60"
    ):
        from_tensors(nibbles(codes)[:, :30], scale, divisor)
    for format, k in (("mxfp4", 48), ("nvfp4", 40)):
        linears = nn.Sequential(nn.Linear(k, 8))
        bitmill.quantize_(linears, FP4Config(format))
        bitmill.pack_(linears)
        with pytest.raises(ValueError, match=r"export: 0: to_tensors: packed must have shape .* must be a multiple of"):
            export(linears)


def test_exports_keep_the_packing(tmp_path: Path) -> None:
    for format, bits in (("mxfp4", 4.25), ("nvfp4", 4.5)):
        linears = nn.Sequential(nn.Linear(512, 512, bias=False))
        bitmill.quantize_(linears, FP4Config(format))
        bitmill.pack_(linears)
        save_file(export(linears), tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").stat().st_size < 512 * 512 * bits / 8 + 400


def test_truncated_tensors_and_wrong_dtypes() -> None:
    codes, scale, divisor = nvfp4()
    packed = nibbles(codes)
    for given, message in (
        ((packed.int(), scale, divisor), "packed must be uint8 or float4_e2m1fn_x2, got int32"),
        ((packed, scale.float(), divisor), "scale must be uint8 or float8_e4m3fn or float8_e8m0fnu, got float32"),
        ((packed, scale.view(torch.uint8), divisor), r"uint8 of 32 columns a number, \[24, 2\], .* got \[24, 4\]"),
        ((packed, scale[:-1], divisor), r"\[24, 4\], and k a multiple of 16, got \[23, 4\] and k = 64"),
        ((packed[0, 0], scale, divisor), "packed must have rows, got a scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            from_tensors(*given)
    tensors = checkpoint()
    for name, t in (("0.weight_packed", tensors["0.weight_packed"][:-1]), ("0.bias", torch.ones(23))):
        with pytest.raises(ValueError, match=r"import_: |read: 0"):
            import_(model(), {**tensors, name: t})
    del tensors["0.weight_scale"]
    with pytest.raises(ValueError, match=r"must hold 0\.weight_scale beside 0\.weight_packed; take the whole"):
        read(tensors)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("convention", ["divisor", "multiplier"])
def test_a_model_from_a_file_and_back(convention: str, activations: str, tmp_path: Path) -> None:
    tensors, linears = checkpoint(convention), model().eval()
    save_file(tensors, tmp_path / "model.safetensors")
    assert import_(linears, tmp_path / "model.safetensors", convention, activations) == ["0"]
    linears[2].load_state_dict({key[2:]: t for key, t in tensors.items() if key.startswith("2.")})
    packed = linears[0]
    assert isinstance(packed, PackedFP4Linear) and packed.config == FP4Config("nvfp4", activations=activations)
    packed.validate()
    weight = read(tensors, convention)["0"].dequantize()
    assert torch.equal(packed.dequantize().weight, weight) and torch.equal(packed.bias, tensors["0.bias"])
    if activations == "float":
        x = torch.randn(3, 64)
        torch.testing.assert_close(packed(x), nn.functional.linear(x, weight, tensors["0.bias"]))
    save_file(export(linears, convention), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    del tensors["0.input_global_scale"]
    assert again.keys() == tensors.keys()
    for name, t in tensors.items():
        assert again[name].dtype == t.dtype
        if name == "0.weight_global_scale":  # of the multiplier that the layer keeps
            torch.testing.assert_close(again[name], t, rtol=2e-7, atol=0)
        else:
            assert torch.equal(again[name].view(torch.uint8), t.view(torch.uint8))


def test_layers_of_bitmill_written_and_read() -> None:
    for format in ("mxfp4", "nvfp4"):
        linears, fresh = model(k=32, n=32).eval(), model(k=32, n=32).eval()
        bitmill.quantize_(linears, FP4Config(format))
        bitmill.pack_(linears)
        for convention in ("divisor", "multiplier"):
            tensors = export(linears, convention)
            fresh = model(k=32, n=32).eval()
            assert import_(fresh, tensors, convention) == ["0", "2"]
            torch.testing.assert_close(fresh[0].dequantize().weight, linears[0].dequantize().weight, rtol=3e-7, atol=0)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_compressed_tensors_packs_and_reads_the_same(format: str) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", reason="needs compressed-tensors")
    codes = random_codes(4, 64)
    assert torch.equal(helpers.pack_fp4_to_uint8(E2M1[codes.int()]), nibbles(codes))
    assert torch.equal(helpers.unpack_fp4_from_uint8(nibbles(codes), 4, 64).float(), E2M1[codes.int()])
