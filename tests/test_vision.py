# SPDX-License-Identifier: Apache-2.0
"""Vision recipes on the ViT of transformers: BiViT and its script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import binarize
from bitmill.recipes._groups import group_of
from vision_inputs import vit

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
from bitmill.recipes import bivit  # noqa: E402

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
