# SPDX-License-Identifier: Apache-2.0
"""Binary vision models of other libraries: Swin of transformers, ViT and Swin of timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bitmill
from bitmill import binarize
from bitmill.nn import BinaryLinear
from bitmill.recipes._groups import group_of
from timm_host import import_timm

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
from bitmill.recipes import bivit  # noqa: E402


def swin() -> Any:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=32, depths=[2], num_heads=[2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def test_swin_of_transformers() -> None:
    """The relative position bias and the mask of shifted windows reach the decision."""
    model, x = swin().eval(), torch.randn(2, 1, 16, 16)
    names = bivit.binarize_(model, mlp_act_bits=1)
    assert len(names) == 12
    attention = model.swin.encoder.layers[0].blocks[1].attention
    with torch.no_grad():
        attention.relative_position_bias.relative_position_bias_table.normal_()
    windows, mask = torch.randn(8, 16, 32), torch.where(torch.rand(4, 16, 16) < 0.3, -100.0, 0.0)
    q, k, v = (
        p(windows).unflatten(-1, (2, 16)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    bias = attention.relative_position_bias()[0]
    for i in range(8):
        context = binarize.softmax_aware_attention(q[i], k[i], v[i], bias + mask[i % 4])
        want = attention.o_proj(context.transpose(0, 1).flatten(1))
        torch.testing.assert_close(attention(windows, mask)[0][i], want)
    trained = model(x).logits
    bitmill.pack_(model)
    torch.testing.assert_close(model(x).logits, trained, atol=1e-5, rtol=1e-5)


def test_timm_vit() -> None:
    timm, x = import_timm(), torch.randn(2, 1, 8, 8)
    model = timm.models.VisionTransformer(8, 4, 1, 4, embed_dim=32, depth=2, num_heads=2, qk_norm=True)
    names = set(model.state_dict())
    swapped = bivit.binarize_(model, mlp_act_bits=1)
    assert len(swapped) == 8 and {name.split(".")[-1] for name in swapped} == {"qkv", "proj", "fc1", "fc2"}
    assert {name for name in model.state_dict() if not name.endswith("weight_scale")} == names
    attention, tokens = model.blocks[0].attn.eval(), torch.randn(3, 5, 32)
    assert isinstance(attention.qkv, BinaryLinear)
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in attention.qkv(tokens).chunk(3, -1))
    for mask in (None, torch.rand(5, 5) < 0.7):
        context = binarize.softmax_aware_attention(attention.q_norm(q), attention.k_norm(k), v, mask)
        assert torch.equal(attention(tokens, mask), attention.proj(context.transpose(1, 2).flatten(2)))
    model.train()
    model(x).sum().backward()
    model.eval()
    trained = model(x)
    bitmill.pack_(model)
    torch.testing.assert_close(model(x), trained, atol=1e-5, rtol=1e-5)


def test_timm_swin() -> None:
    timm, x = import_timm(), torch.randn(2, 1, 16, 16)
    from bitmill.integrations.timm import BinaryWindowAttention, binarize_attention_

    model = timm.models.SwinTransformer(16, 2, 1, 4, embed_dim=32, depths=(2,), num_heads=(2,), window_size=4)
    names = set(model.state_dict())
    host = model.layers[0].blocks[1].attn
    with torch.no_grad():
        host.relative_position_bias_table.normal_()
    bias = host._get_rel_pos_bias()[0]
    assert binarize_attention_(model) == ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn"]
    assert binarize_attention_(model) == []
    attention = model.layers[0].blocks[1].attn
    assert isinstance(attention, BinaryWindowAttention) and set(model.state_dict()) == names
    windows, mask = torch.randn(8, 16, 32), torch.where(torch.rand(4, 16, 16) < 0.3, -100.0, 0.0)
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in attention.qkv(windows).chunk(3, -1))
    for i in range(8):
        context = binarize.softmax_aware_attention(q[i], k[i], v[i], bias + mask[i % 4])
        want = attention.proj(context.transpose(0, 1).flatten(1))
        torch.testing.assert_close(attention(windows, mask)[i], want)
    bitmill.quantize_(model, bitmill.BinaryConfig("bivit"), lambda _, name: group_of(name) is not None)
    model.eval()
    trained = model(x)
    bitmill.pack_(model)
    torch.testing.assert_close(model(x), trained, atol=1e-5, rtol=1e-5)


def test_elastic_attention_in_timm() -> None:
    timm, x = import_timm(), torch.randn(2, 1, 8, 8)
    from bitmill.integrations.timm import binarize_attention_

    model = timm.models.VisionTransformer(8, 4, 1, 4, embed_dim=32, depth=2, num_heads=2)
    binarize_attention_(model, "elastic", zero="plus")
    model.train()(x).sum().backward()
    attention = model.blocks[0].attn.eval()
    steps = [attention.attention.get_parameter(f"alpha_{name}") for name in "qkva"]
    assert attention.attention.alpha_ready and all(step.grad is not None for step in steps)
    tokens = torch.randn(3, 5, 32)
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in attention.qkv(tokens).chunk(3, -1))
    context = binarize.elastic_attention(q, k, v, *steps, zero="plus")
    torch.testing.assert_close(attention(tokens), attention.proj(context.transpose(1, 2).flatten(2)))


def test_attentions_of_timm_that_do_not_fit() -> None:
    timm = import_timm()
    from bitmill.integrations.timm import binarize_attention_

    model = timm.models.SwinTransformerV2(16, 2, 1, 4, embed_dim=32, depths=(1,), num_heads=(2,), window_size=4)
    with pytest.raises(ValueError, match=r"swin_transformer_v2.WindowAttention does not fit \(it differs in cpb_mlp"):
        binarize_attention_(model)
    model = timm.models.VisionTransformer(8, 4, 1, 4, embed_dim=32, depth=2, num_heads=2)
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks.1.attn: .* does not fit \(it has hooks"):
        binarize_attention_(model)
    assert type(model.blocks[0].attn).__name__ == "Attention"
