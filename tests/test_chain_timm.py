# SPDX-License-Identifier: Apache-2.0
"""Chains in timm's ViT and Swin: the same numbers as layer by layer and as the training form, and when they run."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import BinaryConfig, pack_, quantize_
from bitmill.chained import Chained, chains, unchain_
from bitmill.recipes import bivit
from timm_host import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")


def randomised(model: nn.Module) -> nn.Module:
    """Biases that are not 0, scores that differ by position; eval mode."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "relative_position_bias_table")):
                p.normal_(0, 0.1 if name.endswith("bias") else 1.0)
    return model.eval()


def vit(attention: str = "softmax_aware", mlp_act_bits: int = 1, **options: Any) -> nn.Module:
    """Of 25 patches and a class token."""
    sizes: dict[str, Any] = {"embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, **options}
    model = import_timm().models.VisionTransformer(40, 8, 3, 7, **sizes)
    bivit.binarize_(model, mlp_act_bits=mlp_act_bits, attention=attention)
    return randomised(model)


def swin(attention: str = "softmax_aware") -> nn.Module:
    """Windows of 16 among 64 tokens, the second block's shifted; then one window of 16."""
    sizes: dict[str, Any] = {"embed_dim": 64, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4}
    model = import_timm().models.SwinTransformer(32, 4, 3, 7, **sizes)
    assert model.layers[0].blocks[1].attn_mask is not None
    bivit.binarize_(model, mlp_act_bits=1, attention=attention)
    return randomised(model)


MODELS = {
    "vit": (vit, 40),
    "vit, bool": (lambda: vit("bool"), 40),
    "vit, heads of 32": (lambda: vit(num_heads=4), 40),
    "swin": (swin, 32),
    "swin, bool": (lambda: swin("bool"), 32),
}


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Packed layer by layer, and in chains."""
    plain, chained = copy.deepcopy(model), copy.deepcopy(model)
    pack_(plain, chain=False)
    pack_(chained)
    assert not any(isinstance(m, Chained) for m in plain.modules())
    return plain, chained


@pytest.mark.parametrize("name", MODELS)
def test_chain_equals_layers_and_training_form(name: str) -> None:
    build, size = MODELS[name]
    model = build()
    plain, chained = both(model)
    found = dict(chains(chained))
    assert len(found) == 6  # of ViT two attentions, two MLPs and both blocks; of Swin three of each
    assert set(found.values()) == {""}
    for images in (torch.randn(3, 3, size, size), torch.randn(1, 3, size, size)):
        with torch.no_grad():
            want = model(images)
            assert torch.equal(plain(images), want)
            assert torch.equal(chained(images), want)


def test_elastic_attention_is_chained_once_its_steps_are_set() -> None:
    model = vit("elastic")
    images = torch.randn(2, 3, 40, 40)
    _, chained = both(model)
    assert "steps of the attention have not been set" in dict(chains(chained))["blocks.0.attn"]
    with torch.no_grad():
        model.train()(images)
        plain, chained = both(model.eval())
        assert set(dict(chains(chained)).values()) == {""}
        assert torch.equal(chained(images), plain(images))


def test_float_mlp_keeps_the_attention_chained() -> None:
    model = vit(mlp_act_bits=32)
    plain, chained = both(model)
    found = dict(chains(chained))
    assert found["blocks.0.attn"] == ""
    assert found["blocks.0.mlp"].startswith("the first layer has activations of 32 bits")
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        want = model(images)
        assert torch.equal(plain(images), want)
        assert torch.equal(chained(images), want)


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"qk_norm": True}, "blocks.1.attn", "its q_norm is a LayerNorm, not an Identity"),
        ({"scale_attn_norm": True}, "blocks.1.attn", "its norm is a LayerNorm, not an Identity"),
        ({"scale_mlp_norm": True}, "blocks.1.mlp", "its norm is a LayerNorm, not an Identity"),
        ({"embed_dim": 96, "num_heads": 4}, "blocks.1.attn", "heads of 24 columns are not whole words of 32"),
        ({"init_values": 0.5}, "blocks.1", "its ls1 is a LayerScale, not an Identity"),
    ],
)
def test_reasons(options: dict[str, Any], name: str, reason: str) -> None:
    model = vit(**options)
    plain, chained = both(model)
    found = dict(chains(chained))
    assert found[name] == reason
    assert list(found.values()).count("") == (4 if name == "blocks.1" else 2), "the other parts of every block"
    assert f"{name} computes layer by layer: {reason}" in str(bitmill.summary(chained))
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        want = model(images)
        assert torch.equal(plain(images), want)
        assert torch.equal(chained(images), want)


def test_zero_biases_make_zeros_in_the_fused_projection() -> None:
    model = vit()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias.zero_()
    plain, chained = both(model)
    assert chained.blocks[0].attn.chain.projected.negative is not None
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(chained(images), plain(images))


def test_masks() -> None:
    plain, chained = both(vit())
    x = torch.randn(2, 20, 128)
    keep = torch.rand(2, 1, 20, 20) < 0.6
    additive = torch.where(keep, torch.randn(2, 2, 20, 20), -torch.inf)
    for mask in (keep, additive, additive.double(), additive.bfloat16(), additive[0, 0]):
        with torch.no_grad():
            got = chained.blocks[0].attn(x, attn_mask=mask)
            assert torch.equal(got, plain.blocks[0].attn(x, attn_mask=mask)), mask.dtype
    with pytest.raises(ValueError, match="mask must be bool"), torch.no_grad():
        chained.blocks[0].attn(x, attn_mask=keep.long())


def test_what_a_chain_cannot_do_is_computed_layer_by_layer() -> None:
    plain, chained = both(vit())
    images = torch.randn(2, 3, 40, 40)
    attention, mlp = chained.blocks[1].attn, chained.blocks[0].mlp
    seen: list[nn.Module] = []
    with torch.no_grad():
        want = plain(images)
        parts = [attention.attention, attention.qkv, mlp.act, mlp.drop1]
        handles = [part.register_forward_hook(lambda module, args, output: seen.append(module)) for part in parts]
        assert torch.equal(chained(images), want)
        assert seen == [mlp.act, mlp.drop1, attention.qkv, attention.attention]
        for handle in handles:
            handle.remove()
        half, plain_half = copy.deepcopy(chained).bfloat16(), copy.deepcopy(plain).bfloat16()
        assert torch.equal(half(images.bfloat16()), plain_half(images.bfloat16()))
        attention.chain.most_keys = 8
        assert torch.equal(chained(images), want)
    x = torch.randn(2, 26, 128, requires_grad=True)
    chained.blocks[0](x).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_whatever_is_watched_or_replaced_in_a_block_is_called() -> None:
    plain, chained = both(vit(drop_path_rate=0.2))
    images, seen = torch.randn(2, 3, 40, 40), []
    block = chained.blocks[1]
    want = plain(images)
    for module in (block.norm1, block.attn, block.attn.proj, block.drop_path2, block.mlp, block.mlp.fc2):
        handle = module.register_forward_hook(lambda module, *_: seen.append(type(module)))
        assert torch.equal(chained(images), want)
        assert seen.pop() is type(module) and not seen
        handle.remove()
    for model in (plain, chained):
        model.blocks[1].norm2._fast_norm = True  # another kernel, where apex is there
        model.blocks[0].norm1 = nn.Identity()
    assert torch.equal(chained(images), plain(images))


def test_position_bias_gets_its_gradient() -> None:
    """An input without a gradient, in eval mode."""
    plain, chained = both(swin())
    x = torch.randn(4, 16, 64)
    gradients = []
    for model in (plain, chained):
        attention = model.layers[0].blocks[0].attn
        attention(x).sum().backward()
        gradients.append(attention.relative_position_bias_table.grad)
    assert gradients[0].any()
    assert torch.equal(gradients[0], gradients[1])


def test_dropout_that_still_drops_between_the_layers() -> None:
    """Monte Carlo dropout: the model in eval mode, its dropout in training mode."""
    _, chained = both(vit(proj_drop_rate=0.5))
    x = torch.randn(1, 26, 128)
    with torch.no_grad():
        for mlp in (block.mlp for block in chained.blocks):
            assert torch.equal(mlp(x), mlp(x))
            mlp.drop1.train()
            assert not torch.equal(mlp(x), mlp(x))
        attention = chained.blocks[0].attn
        attention.proj_drop.train()
        assert not torch.equal(attention(x), attention(x))


@pytest.mark.parametrize("name", ("vit", "swin"))
def test_state_save_and_load(name: str, tmp_path: Path) -> None:
    """A chain is no part of the state: files of either kind are the same, and load into either."""
    build, size = MODELS[name]
    plain, chained = both(build())
    assert list(plain.state_dict()) == list(chained.state_dict())
    bitmill.save(plain, tmp_path / "plain")
    bitmill.save(chained, tmp_path / "chained")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "chained").read_bytes()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        want = chained(images)
        for fresh in (build(), both(build())[1]):
            bitmill.load(fresh, tmp_path / "chained")
            assert set(dict(chains(fresh)).values()) == {""}
            assert torch.equal(fresh(images), want)


@pytest.mark.parametrize("name", ("vit", "swin"))
def test_copies_and_pickles(name: str) -> None:
    build, size = MODELS[name]
    _, chained = both(build())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        want = chained(images)
        for other in (copy.deepcopy(chained), pickle.loads(pickle.dumps(chained))):
            block = other.blocks[0] if name == "vit" else other.layers[0].blocks[1]
            assert block.attn.chain.out[0] is block.attn.proj
            assert block.attn.chain.layers[0] is block.attn.qkv
            assert block.mlp.chain.down[0] is block.mlp.fc2
            assert torch.equal(other(images), want)


def test_unchain() -> None:
    plain, chained = both(vit())
    assert len(unchain_(chained)) == 6
    assert type(chained.blocks[0].mlp).__name__ == "Mlp"
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(chained(images), plain(images))


def test_export() -> None:
    _, chained = both(swin())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(chained, (x,), strict=False)
        assert any("binary_self_attention" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x), chained(x))


def test_an_mlp_alone_is_chained_without_the_integration() -> None:
    mlp = import_timm().layers.Mlp(64, 96)
    model = nn.ModuleDict({"mlp": randomised(mlp)})
    quantize_(model, BinaryConfig("bivit"))
    x: Tensor = torch.randn(5, 64)
    with torch.no_grad():
        want = model["mlp"](x)
        pack_(model)
        assert dict(chains(model)) == {"mlp": ""}
        assert torch.equal(model["mlp"](x), want)


def test_timm_is_imported_by_nobody_who_has_no_model_of_it() -> None:
    code = """
import sys
import bitmill, bitmill.integrations.timm, torch
model = torch.nn.Sequential(torch.nn.Linear(32, 32))
bitmill.quantize_(model, bitmill.BinaryConfig())
bitmill.pack_(model)
assert not any(name.partition(".")[0] == "timm" for name in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
