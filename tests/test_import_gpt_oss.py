# SPDX-License-Identifier: Apache-2.0
"""MXFP4 checkpoints of gpt-oss and transformers: tensors, files, models and their experts, and hostile ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitmill
from bitmill import FP4Config, ops
from bitmill.integrations.gpt_oss import SplitExperts, export, from_blocks, import_, read, split_experts_, to_blocks
from bitmill.nn import PackedFP4Linear
from fp4_file_inputs import e8m0, model, mxfp4_values, nibbles, random_codes


def pair(*leading: int, k: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, scales, and the codes that they are of."""
    codes = random_codes(*leading, k)
    return nibbles(codes).unflatten(-1, (k // 32, 16)), e8m0(*leading, k // 32), codes


def checkpoint() -> dict[str, Tensor]:
    """A state_dict for `model()` whose first layer is MXFP4."""
    blocks, scales, _ = pair(24)
    scales[0] = 127
    other = {key: t for key, t in model().state_dict().items() if key.startswith("2.")}
    return {"0.weight_blocks": blocks, "0.weight_scales": scales, "0.bias": torch.randn(24), **other}


def test_blocks_are_the_layout_of_mxfp4_quantize() -> None:
    for leading in ((3,), (2, 3), (), (2, 2, 2)):
        blocks, scales, codes = pair(*leading, k=96)
        packed, scale = from_blocks(blocks, scales)
        assert torch.equal(packed, nibbles(codes)) and torch.equal(scale, scales)
        assert torch.equal(ops.mxfp4_dequantize(packed, scale, 96), mxfp4_values(codes, scales))
        back = to_blocks(packed, scale)
        assert torch.equal(back[0], blocks) and torch.equal(back[1], scales)


def test_transformers_reads_the_same_numbers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="needs transformers")
    blocks, scales, _ = pair(2, 3)
    scales.clamp_(100, 150)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(ops.mxfp4_dequantize(*from_blocks(blocks, scales), 64).mT, expected)


def test_swapped_nibbles_need_their_order_named() -> None:
    blocks, scales, codes = pair(3)
    swapped = nibbles(codes, "high").unflatten(-1, (2, 16))
    assert torch.equal(from_blocks(swapped, scales, "high")[0], from_blocks(blocks, scales)[0])
    assert not torch.equal(from_blocks(swapped, scales)[0], from_blocks(blocks, scales)[0])
    assert torch.equal(to_blocks(*from_blocks(blocks, scales), "high")[0], swapped)
    with pytest.raises(ValueError, match='from_blocks: nibble_order must be "low" or "high", got "first"'):
        from_blocks(blocks, scales, "first")


def test_a_nan_block_is_nan_in_a_tensor_and_an_error_in_a_layer() -> None:
    blocks, scales, _ = pair(3)
    scales[2, 1] = 255
    values = ops.mxfp4_dequantize(*from_blocks(blocks, scales), 64)
    assert values[2, 32:].isnan().all() and values.isnan().sum() == 32
    tensors, linears = checkpoint(), model()
    tensors["0.weight_scales"][7, 1] = 255
    with pytest.raises(ValueError, match=r"0: the scales must be finite, row 7 has nan for columns 32 to 63"):
        import_(linears, tensors)
    assert type(linears[0]) is nn.Linear


def test_dtypes_of_torch_for_four_and_eight_bits() -> None:
    blocks, scales, _ = pair(3)
    for name, given in (("float4_e2m1fn_x2", blocks), ("float8_e8m0fnu", scales)):
        if not hasattr(torch, name):
            pytest.skip(f"this torch has no {name}")
        assert torch.equal(given.view(getattr(torch, name)).view(torch.uint8), given)
    same = from_blocks(blocks.view(torch.float4_e2m1fn_x2), scales.view(torch.float8_e8m0fnu))
    assert torch.equal(same[0], from_blocks(blocks, scales)[0])


def test_safetensors_with_four_bit_tensors(tmp_path: Path) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2") or not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no 4-bit dtype")
    tensors = checkpoint()
    typed = {
        **tensors,
        "0.weight_blocks": tensors["0.weight_blocks"].view(torch.float4_e2m1fn_x2),
        "0.weight_scales": tensors["0.weight_scales"].view(torch.float8_e8m0fnu),
    }
    save_file(typed, tmp_path / "model.safetensors")
    assert b'"F4"' in (tmp_path / "model.safetensors").read_bytes()
    found, expected = read(tmp_path / "model.safetensors")["0.weight"], read(tensors)["0.weight"]
    assert torch.equal(found.packed, expected.packed) and torch.equal(found.scale, expected.scale)


def test_exports_keep_the_packing(tmp_path: Path) -> None:
    linears = nn.Sequential(nn.Linear(512, 512, bias=False))
    bitmill.quantize_(linears, FP4Config("mxfp4"))
    bitmill.pack_(linears)
    save_file(export(linears), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 512 * 512 * 4.25 / 8 + 300


def test_wrong_dtypes_and_shapes() -> None:
    blocks, scales, _ = pair(3)
    packed, scale = from_blocks(blocks, scales)
    for given, message in (
        ((blocks.int(), scales), r"from_blocks: blocks must be uint8 or float4_e2m1fn_x2, got int32; load the tensor"),
        ((blocks, scales.float()), r"from_blocks: scales must be uint8 or float8_e8m0fnu, got float32"),
        (
            (blocks[..., :15], scales),
            r"blocks must have shape \[\.\.\., groups, 16\], got \[3, 2, 15\]; k must",
        ),
        ((blocks[0, 0], scales), r"blocks must have shape \[\.\.\., groups, 16\], got \[16\]"),
        ((blocks, scales[:2]), r"scales must have shape \[3, 2\] for these blocks, got \[2, 2\]; take both from one"),
        ((blocks.to_sparse(), scales), r"blocks must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            from_blocks(*given)
    for given, message in (
        (
            (packed[:, :-1], scale),
            r"to_blocks: packed must have shape \[3, 32\] for these scales, got \[3, 31\]; .* 32",
        ),
        ((packed[0, 0], scale), r"packed and scale must have rows, got a scalar"),
        ((packed.char(), scale), r"to_blocks: packed must be uint8, got int8"),
    ):
        with pytest.raises(ValueError, match=message):
            to_blocks(*given)


def test_k_not_a_multiple_of_the_block() -> None:
    linears = nn.Sequential(nn.Linear(72, 8))
    bitmill.quantize_(linears, FP4Config("mxfp4"))
    bitmill.pack_(linears)
    with pytest.raises(ValueError, match=r"export: 0: to_blocks: packed must have shape \[8, 48\] .* multiple of 32"):
        export(linears)
    blocks, scales, _ = pair(8, k=96)
    with pytest.raises(ValueError, match=r"0: the weight must have shape \[8, 72\] as in the model, got \[8, 96\]"):
        import_(nn.Sequential(nn.Linear(72, 8)), {"0.weight_blocks": blocks, "0.weight_scales": scales})


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_model_from_a_file_and_back(activations: str, tmp_path: Path) -> None:
    tensors, linears = checkpoint(), model().eval()
    save_file(tensors, tmp_path / "model.safetensors")
    assert import_(linears, tmp_path / "model.safetensors", activations) == ["0"]
    missing = linears.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ["0.weight", "0.scale"]
    packed = linears[0]
    assert isinstance(packed, PackedFP4Linear) and packed.config == FP4Config("mxfp4", activations=activations)
    assert not packed.training
    packed.validate()
    weight = read(tensors)["0.weight"].dequantize()
    assert torch.equal(packed.dequantize().weight, weight) and torch.equal(packed.bias, tensors["0.bias"])
    if activations == "float":
        x = torch.randn(3, 64)
        expected = nn.functional.linear(x, weight, tensors["0.bias"])
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)
    save_file(export(linears), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], t) for name, t in tensors.items())
    swapped = export(linears, "high")
    assert import_(model(), swapped, nibble_order="high") == ["0"]
    assert torch.equal(read(swapped, "high")["0.weight"].packed, read(tensors)["0.weight"].packed)


def test_names_without_weight_and_a_bias_beside_them() -> None:
    blocks, scales, _ = pair(24)
    tensors = {"0_blocks": blocks, "0_scales": scales.clamp(100, 140), "0_bias": torch.randn(24)}
    linears = model()
    assert import_(linears, tensors) == ["0"] and torch.equal(linears[0].bias, tensors["0_bias"])
    bare = model(bias=False)
    with pytest.raises(ValueError, match=r"0: the bias must be absent as in the model, got float32 \[24\] in the file"):
        import_(bare, tensors)
    del tensors["0_bias"]
    assert import_(bare, tensors) == ["0"] and bare[0].bias is None
    with pytest.raises(ValueError, match=r"0: the bias must be of floats \[24\] as in the model, got none in the file"):
        import_(model(), tensors)


def test_what_does_not_fit_leaves_the_model_alone() -> None:
    tensors, linears = checkpoint(), model()
    blocks, scales = tensors["0.weight_blocks"], tensors["0.weight_scales"]
    for changes, message in (
        (
            {"1.weight_blocks": blocks, "1.weight_scales": scales},
            "'1' must be a .*, got ReLU",
        ),
        (
            {"9.weight_blocks": blocks, "9.weight_scales": scales},
            "got none of that name",
        ),
        ({"2.weight_blocks": blocks}, r"must hold 2\.weight_scales beside 2\.weight_blocks; take the whole checkpoint"),
        ({"0.weight_blocks": blocks[:, :1]}, r"read: 0\.weight: from_blocks: scales must have shape \[24, 1\]"),
        (
            {"0.weight_blocks": blocks[0], "0.weight_scales": scales[0]},
            "must have a weight of 2 dimensions, or .* got a weight of 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            import_(linears, {**tensors, **changes})
    with pytest.raises(ValueError, match="there must be a layer in this format that filter_fn accepts, got none"):
        import_(linears, tensors, filter_fn=lambda module, name: False)
    assert type(linears[0]) is nn.Linear
    root = {"_blocks": blocks, "_scales": scales, "_bias": torch.ones(24)}
    with pytest.raises(
        ValueError, match=r"import_: '' must be a torch\.nn\.Linear of the model, got none of that name"
    ):
        import_(nn.Linear(64, 24), root)


def test_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(checkpoint(), path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot be read as a safetensors file: .*; copy it again"):
            import_(model(), path)
    path.write_bytes(whole)
    (tmp_path / "second.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"must hold every tensor once, got '0\.bias' twice"):
        import_(model(), tmp_path)
    for nowhere in (tmp_path / "none.safetensors", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"none.* must be a safetensors file or a folder of them, got neither"):
            read(nowhere)


def gpt_oss() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no gpt-oss")
    config = transformers.GptOssConfig(
        num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2, vocab_size=50, hidden_size=64,
        intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    host = transformers.GptOssForCausalLM(config).eval()
    for name, parameter in host.named_parameters():  # the initial biases are 0 and the gates never at their limit
        if "experts" in name:
            nn.init.normal_(parameter, std=1.0)
    return host


def test_split_experts_compute_the_same() -> None:
    host, ids = gpt_oss(), torch.arange(10).view(2, 5)
    wanted = host(ids).logits
    assert split_experts_(host) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert sum(type(module) is nn.Linear for module in host.modules()) == 2 * (4 + 6) + 1
    torch.testing.assert_close(host(ids).logits, wanted)
    with pytest.raises(ValueError, match="the model must have transformers' GptOssExperts, got none"):
        split_experts_(host)


def test_gpt_oss_runs_from_its_four_bits(tmp_path: Path) -> None:
    host, ids = gpt_oss(), torch.arange(10).view(2, 5)
    tensors = {}
    for name, t in host.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = to_blocks(*ops.mxfp4_quantize(t.mT.contiguous()))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            t.copy_(ops.mxfp4_dequantize(*from_blocks(blocks, scales), t.shape[1]).mT)
        else:
            tensors[name] = t.clone()
    wanted = host(ids).logits
    save_file(tensors, tmp_path / "model.safetensors")

    fresh = gpt_oss()
    split_experts_(fresh)
    names = import_(fresh, tmp_path)
    assert len(names) == 12 and names[0] == "model.layers.0.mlp.experts.down_proj.0"
    fresh.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(fresh(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    again = export(fresh)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], t) for name, t in tensors.items())

    bitmill.save(fresh, tmp_path / "packed.bitmill")
    loaded = gpt_oss()
    split_experts_(loaded)
    bitmill.load(loaded, tmp_path / "packed.bitmill")
    assert torch.equal(loaded(ids).logits, fresh(ids).logits)
    assert isinstance(loaded.model.layers[0].mlp.experts, SplitExperts)

    tensors["model.layers.0.mlp.experts.down_proj_bias"] = torch.zeros(2, 64)
    with pytest.raises(ValueError, match=r"got a weight of 3 and a bias of shape \[2, 64\]"):
        import_(fresh, tensors)
