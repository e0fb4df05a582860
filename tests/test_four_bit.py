# SPDX-License-Identifier: Apache-2.0
"""Whole folders of 4-bit language models, as other projects publish them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
tokenizers = pytest.importorskip("tokenizers")

import bitmill  # noqa: E402
from bitmill import FP4Config  # noqa: E402
from bitmill.integrations import bitsandbytes, compressed_tensors, gpt_oss  # noqa: E402
from bitmill.integrations.four_bit import read_four_bit  # noqa: E402
from bitmill.integrations.language import load_pretrained, save_pretrained  # noqa: E402
from bitmill.nn import PackedFP4Linear  # noqa: E402
from bitmill.recipes.language_folder import open_folder  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPORTS = {
    ("compressed-tensors", "nvfp4"): lambda model: compressed_tensors.export(model, "divisor"),
    ("compressed-tensors", "mxfp4"): lambda model: compressed_tensors.export(model, "divisor"),
    ("modelopt", "nvfp4"): lambda model: compressed_tensors.export(model, "multiplier"),
    ("bitsandbytes", "nf4"): bitsandbytes.export,
    ("bitsandbytes", "bnb-fp4"): bitsandbytes.export,
}


def ids() -> Tensor:
    return torch.arange(10).view(2, 5)


def write(folder: Path, model: Any, tensors: dict[str, Tensor], method: str | None) -> Path:
    """A folder as it is published: tied and shared tensors once, and what the config says of the method."""
    words = tokenizers.models.WordLevel({str(i): i for i in range(11)}, unk_token="0")
    raw = tokenizers.Tokenizer(words)
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="0").save_pretrained(folder)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if method is not None:
        config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def quantised_llama(format: str, tied: bool = False) -> Any:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    bitmill.quantize_(model, FP4Config(format), lambda module, name: name != "lm_head")
    bitmill.pack_(model)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("method", "format"), EXPORTS)
def test_a_folder_of_another_project(method: str, format: str, tied: bool, tmp_path: Path) -> None:
    model = quantised_llama(format, tied)
    folder = write(tmp_path, model, EXPORTS[method, format](model), method)
    loaded, tokenizer = read_four_bit(folder)
    assert sum(isinstance(module, PackedFP4Linear) for module in loaded.modules()) == 14
    assert type(loaded.lm_head) is nn.Linear and not hasattr(loaded.config, "quantization_config")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(open_folder(folder).model(ids()).logits, loaded(ids()).logits)
    save_pretrained(loaded, tokenizer, tmp_path / "packed")
    assert torch.equal(load_pretrained(tmp_path / "packed").model(ids()).logits, loaded(ids()).logits)
    if method == "bitsandbytes":
        with pytest.raises(ValueError, match=r"activations must be .float. for bitsandbytes, .* got 'int8'"):
            read_four_bit(folder, "int8")
    else:
        int8, _ = read_four_bit(folder, "int8")
        assert int8.model.layers[0].mlp.up_proj.config.activations == "int8"


def test_gpt_oss_from_its_folder(tmp_path: Path) -> None:
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no gpt-oss")
    config = transformers.GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, dtype="bfloat16")
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16).eval()
    gpt_oss.split_experts_(model)
    bitmill.quantize_(model, FP4Config("mxfp4"), lambda module, name: ".experts." in name)
    bitmill.pack_(model)
    tensors = gpt_oss.export(model)
    assert "model.layers.1.mlp.experts.down_proj_blocks" in tensors
    loaded, _ = read_four_bit(write(tmp_path, model, tensors, "mxfp4"))
    assert torch.equal(loaded(ids()).logits, model(ids()).logits) and loaded.dtype == torch.bfloat16


def test_folders_that_are_not_whole_or_of_another_method(tmp_path: Path) -> None:
    model = quantised_llama("nvfp4")
    tensors = compressed_tensors.export(model)
    for method, message in (
        (None, r"must have a quant_method of mxfp4, compressed-tensors, modelopt, bitsandbytes, got None; a model"),
        ("gptq", r"must have a quant_method of .*, got 'gptq'"),
        ("modelopt", r"down_proj: from_tensors: global_scale must be at most 1 with .*; pass .divisor."),
    ):
        with pytest.raises(ValueError, match=message):
            read_four_bit(write(tmp_path, model, tensors, method))
    folder = write(tmp_path, model, tensors, "compressed-tensors")
    whole = load_file(folder / "model.safetensors")
    for name, message in (
        ("model.norm.weight", r"must hold the whole model, model\.norm\.weight is missing"),
        ("model.layers.0.mlp.up_proj.weight_scale", r"must hold model\.layers\.0\.mlp\.up_proj\.weight_scale beside"),
        ("model.layers.0.mlp.up_proj.weight_packed", r"model\.layers\.0\.mlp\.up_proj\.weight is missing"),
    ):
        save_file({key: t for key, t in whole.items() if key != name}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"read_four_bit: .*{message}"):
            read_four_bit(folder)
    for name, t in (
        ("model.layers.0.mlp.up_proj.pre_quant_scale", torch.ones(64)),
        ("lm_head.weight_scale", torch.ones(1)),
        ("lm_head.weight", whole["lm_head.weight"].to(torch.float8_e4m3fn)),
    ):
        save_file({**whole, name: t}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"must have 4-bit floats and no other numbers, got '{re.escape(name)}'"):
            read_four_bit(folder)
    save_file({**whole, "model.norm.weight": torch.ones(63)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be read as a model"):
        read_four_bit(folder)
    for text in ("", "[]", '{"quantization_config": 3}', '{"quantization_config": {"quant_method": ["modelopt"]}}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"must have a quant_method of .*, got None; a model"):
            read_four_bit(folder)
    with pytest.raises(ValueError, match=r"must be a folder with config\.json and safetensors; it has no config"):
        read_four_bit(tmp_path / "nowhere")
