# SPDX-License-Identifier: Apache-2.0
"""Vision recipes on the ViT of transformers: BiViT and its script, BinaryViT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import binarize
from bitmill.recipes._groups import group_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
from bitmill.recipes import binaryvit, bivit  # noqa: E402


def vit(**changes: Any) -> Any:
    values = dict(image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2, num_labels=4)
    values |= dict(num_attention_heads=2, intermediate_size=48)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**(values | changes)))


# ---- BiViT


def test_groups_of_layers() -> None:
    names = {
        "vit.layers.0.attention.q_proj": "attn",
        "vit.encoder.layer.0.attention.output.dense": "attn",
        "blocks.3.attn.qkv": "attn",
        "vit.encoder.layer.0.output.dense": "mlp",
        "bert.encoder.layer.0.intermediate.dense": "mlp",
        "layers.0.blocks.1.mlp.fc2": "mlp",
        "classifier": None,
        "vit.pooler.dense": None,
        "head.fc": None,
        "layers.1.downsample.reduction": None,
    }
    assert {name: group_of(name) for name in names} == names


def test_distribution_loss_is_the_divergence_and_a_constant() -> None:
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    loss = bivit.distribution_loss(student, teacher)
    p = torch.softmax(teacher, -1).detach()
    divergence = nn.functional.kl_div(torch.log_softmax(student, -1), p, reduction="batchmean")
    torch.testing.assert_close(loss, divergence - (p * p.log()).sum() / 5)
    loss.backward()
    torch.testing.assert_close(student.grad, (torch.softmax(student, -1) - p).detach() / 5)
    assert teacher.grad is None


def test_cosine_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = bivit.cosine_schedule(optimizer, 100, warmup=0.1)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(1.0) and rates[99] == pytest.approx(0.0)


@pytest.mark.parametrize("mlp_act_bits", [1, 32])
def test_cross_layer_stages(mlp_act_bits: int) -> None:
    model, x = vit(), torch.randn(3, 1, 8, 8)
    latent = model.vit.layers[0].attention.q_proj.weight
    first = bivit.binarize_(model, ("attn",))
    assert len(first) == 8 and all(".attention." in name for name in first)
    assert type(model.vit.layers[0].mlp.fc1) is nn.Linear
    second = bivit.binarize_(model, ("mlp",), mlp_act_bits)
    assert len(second) == 4 and all(".mlp." in name for name in second)
    block = model.vit.layers[0]
    assert block.attention.q_proj.weight is latent and block.attention.q_proj.weight_scale is not None
    assert block.mlp.fc1.config.act_bits == mlp_act_bits and block.attention.o_proj.config.act_bits == 1
    assert type(model.classifier) is nn.Linear
    model.train()
    bivit.distribution_loss(model(x).logits, torch.randn(3, 4)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None and "pooler" not in name]
    assert not missing
    model.eval()
    trained = model(x).logits
    assert len(bitmill.pack_(model)) == 12
    torch.testing.assert_close(model(x).logits, trained, atol=1e-5, rtol=1e-5)


def test_attention_of_the_model_is_bivits() -> None:
    model, x = vit().eval(), torch.randn(2, 5, 32)
    bivit.binarize_(model)
    attention = model.vit.layers[0].attention
    q, k, v = (
        p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    context = binarize.softmax_aware_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(attention(x)[0], attention.o_proj(context))


def test_binarize_errors() -> None:
    with pytest.raises(ValueError, match=r"groups must be some of attn, mlp, got \('ffn',\)"):
        bivit.binarize_(vit(), ("ffn",))
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'softmax'"):
        bivit.binarize_(vit(), attention="softmax")
    with pytest.raises(ValueError, match="expected a model with timm's Attention, got only Linear, Sequential"):
        bivit.binarize_(nn.Sequential(nn.Linear(3, 3)))


def test_script_trains_packs_and_goes_on(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitmill.recipes.scripts import bivit as script

    start = str(tmp_path / "start")
    common = ["--data", str(idx_folder), "--batch-size", "8", "--every", "3", "--epochs", "2"]
    assert script.main([*common, "--out", start, "--patch", "4", "--width", "32", "--layers", "1"]) == 0
    student = [*common, "--teacher", start, "--student", "bivit", "--mlp-act-bits", "1", "--augment"]
    script.main([*student, "--out", str(tmp_path / "whole")])
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["packed"] == result["trained"] and result["largest_difference_of_logits"] == 0
    assert result["file_bytes"] == (tmp_path / "whole" / "packed.safetensors").stat().st_size

    loss, calls = bivit.distribution_loss, iter(range(100))

    def stop(*args: Tensor) -> Tensor:
        if next(calls) == 9:  # in the second stage, after its checkpoint at step 3
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(bivit, "distribution_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main([*student, "--out", str(tmp_path / "cut")])
    monkeypatch.setattr(bivit, "distribution_loss", loss)
    script.main([*student, "--out", str(tmp_path / "cut")])
    files = [tmp_path / run / "packed.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(SystemExit, match="other values of --epochs"):
        script.main([*student, "--epochs", "3", "--out", str(tmp_path / "cut")])


def test_row_scale_changes_gradients_and_no_prediction() -> None:
    torch.manual_seed(1)
    state, x = vit().state_dict(), torch.randn(6, 1, 8, 8)
    outputs = []
    for row_scale in (False, True):
        model = vit()
        model.load_state_dict(state)
        bivit.binarize_(model, row_scale=row_scale)
        outputs += [model.train()(x).logits.detach(), model.eval()(x).logits.detach()]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0])
    passed = []
    for row_scale in (False, True):
        attention = bitmill.nn.BinaryAttention("softmax_aware", row_scale=row_scale)
        torch.manual_seed(2)
        q, k, v = (torch.randn(2, 3, 5, 16, requires_grad=True) for _ in range(3))
        context = attention(q, k, v)
        assert torch.equal(context, binarize.softmax_aware_attention(q, k, v, row_scale=row_scale))
        assert torch.equal(attention.eval()(q, k, v), binarize.softmax_aware_attention(q, k, v))
        passed.append(float(torch.autograd.grad(binarize.sign(context, "clip_open").sum(), context)[0].mean()))
    assert passed[0] < 0.5 and passed[1] > 0.9  # the share of the context that learns
    with pytest.raises(ValueError, match="row_scale goes with kind softmax_aware, got bool"):
        bitmill.nn.BinaryAttention("bool", row_scale=True)


# ---- BinaryViT


def test_rprelu() -> None:
    layer, x = binaryvit.RPReLU(3), torch.randn(50, 3)
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([0.5, -1.0, 0.0]))
        layer.offset.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.slope.copy_(torch.tensor([0.1, 0.2, -0.3]))
    want = nn.functional.prelu(x - layer.shift, layer.slope) + layer.offset
    torch.testing.assert_close(layer(x), want)


def test_shortcuts() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(binaryvit.shortcut(x, 4), x)
    assert binaryvit.shortcut(x, 8).tolist() == [[1, 2, 3, 4, 1, 2, 3, 4]]
    assert binaryvit.shortcut(x, 2).tolist() == [[1.5, 3.5]]
    for channels in (3, 6):
        with pytest.raises(ValueError, match=f"channels must divide, or be a multiple of, the 4 of x, got {channels}"):
            binaryvit.shortcut(x, channels)
    with pytest.raises(ValueError, match="channels must divide"):
        binaryvit.ShortcutLinear(nn.Linear(4, 6))


def test_shortcut_linear() -> None:
    linear, x = nn.Linear(16, 32), torch.randn(2, 5, 16)
    layer = binaryvit.ShortcutLinear(linear)
    with torch.no_grad():
        layer.shift.normal_()
    w = linear.weight - linear.weight.mean(1, keepdim=True)
    y = torch.sign(x + layer.shift) @ (linear.weight.abs().mean(1, keepdim=True) * torch.sign(w)).T
    want = nn.functional.prelu(
        (nn.functional.layer_norm(y, (32,)) + torch.cat([x, x], -1)).flatten(0, 1), torch.full((32,), 0.25)
    )
    torch.testing.assert_close(layer(x).flatten(0, 1), want, atol=1e-5, rtol=1e-5)
    trained = layer.eval()(x)
    bitmill.pack_(layer)
    torch.testing.assert_close(layer(x), trained)


def test_pool_branches() -> None:
    branches, x = binaryvit.PoolBranches(2, (3, 4)), torch.randn(2, 13, 2)
    assert not branches(x).any()
    with torch.no_grad():
        branches.scale.copy_(torch.arange(1.0, 9.0).view(4, 2))
        branches.offset.fill_(0.5)
    got = branches(x)
    assert not got[:, 0].any()
    image = x[:, 1:].view(2, 3, 4, 2)
    for i, j in ((0, 0), (1, 2), (2, 3)):
        want = torch.full((2, 2), 0.5)
        for scale, (height, width) in zip(branches.scale, ((0, 1), (1, 0), (0, 2), (2, 0)), strict=True):
            near = image[:, max(i - height, 0) : i + height + 1, max(j - width, 0) : j + width + 1]
            want = want + scale * near.mean((1, 2))
        torch.testing.assert_close(got[:, 1 + 4 * i + j], want)
    with pytest.raises(ValueError, match="at least 12 tokens for the grid, got 11"):
        branches(x[:, :11])


def test_binaryvit_on_a_vit() -> None:
    model, x = vit(intermediate_size=64), torch.randn(3, 1, 8, 8)
    latent = model.vit.layers[1].attention.k_proj.weight
    names = binaryvit.binarize_(model)
    assert len(names) == 12
    mixer = model.vit.layers[1].attention
    assert mixer.attention.k.linear.weight is latent and mixer.attention.step.item() == 0.25
    bivit.distribution_loss(model.train()(x).logits, torch.randn(3, 4)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None and "pooler" not in name]
    assert not missing and float(mixer.attention.step.grad) != 0
    model.eval()
    trained = model(x).logits
    assert len(bitmill.pack_(model)) == 12
    torch.testing.assert_close(model(x).logits, trained, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match="expected a ViT of transformers with q_proj, k_proj, v_proj and o_proj, got Linear"
    ):
        binaryvit.binarize_(nn.Linear(3, 3))
