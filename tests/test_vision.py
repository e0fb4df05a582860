# SPDX-License-Identifier: Apache-2.0
"""Vision: image files, BiViT and its script, Sparsifiner, and the hosts: transformers' ViT and Swin, timm's."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import binarize
from bitmill.nn import BinaryLinear
from bitmill.recipes._groups import group_of
from bitmill.recipes.images import Images, load_images, logits_of
from bitmill.recipes.sparsifiner import MaskPredictor, SparsifinerAttention
from timm_host import import_timm

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
from bitmill.recipes import binaryvit, bivit  # noqa: E402


def write_idx(path: Path, values: Tensor) -> None:
    header = struct.pack(f">{values.dim() + 1}i", 0x800 + values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for split, count in (("train", 40), ("t10k", 12)):
        pixels = torch.randint(256, (count, 8, 8), dtype=torch.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", torch.arange(count, dtype=torch.uint8) % 4)
    return folder


def vit(**changes: Any) -> Any:
    values = dict(image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2, num_labels=4)
    values |= dict(num_attention_heads=2, intermediate_size=48)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**(values | changes)))


# ---- images


def test_idx_files(idx_folder: Path) -> None:
    train, test = load_images(idx_folder)
    assert train.pixels.shape == (40, 1, 8, 8) and len(test) == 12
    assert test.labels.tolist() == [0, 1, 2, 3] * 3
    values = train.pixels.double()
    torch.testing.assert_close(train.mean, values.mean().float().reshape(1))
    torch.testing.assert_close(train.std, values.std(correction=0).float().reshape(1))
    pixels, labels = train.batch([3, 5])
    torch.testing.assert_close(pixels * train.std + train.mean, train.pixels[[3, 5]].float(), atol=1e-3, rtol=0)
    assert labels.tolist() == [3, 1]


def test_augmented_images_are_shifts_and_flips() -> None:
    pixels = torch.arange(1, 31, dtype=torch.uint8).view(1, 1, 5, 6).repeat(60, 2, 1, 1)
    images = Images(pixels, torch.zeros(60, dtype=torch.long), torch.zeros(2), torch.ones(2))
    batch, _ = images.batch(range(60), augment=True)
    padded = nn.functional.pad(pixels[0].float(), (2, 2, 2, 2))
    crops = [padded[:, i : i + 5, j : j + 6] for i in range(5) for j in range(5)]
    allowed = crops + [crop.flip(-1) for crop in crops]
    found = [next((i for i, a in enumerate(allowed) if torch.equal(a, image)), -1) for image in batch]
    assert min(found) >= 0 and len(set(found)) > 10
    torch.manual_seed(0)
    first, _ = images.batch(range(60), augment=True)
    torch.manual_seed(0)
    assert torch.equal(images.batch(range(60), augment=True)[0], first)


def test_tar_of_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    colours = {"cat": (10, 20, 30), "ship": (200, 100, 0), "airplane": (0, 0, 255)}
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"cifar10-png-{split}.tar.xz", "w:xz") as archive:
            for name, colour in colours.items():
                data = io.BytesIO()
                image.new("RGB", (4, 4), colour).save(data, "PNG")
                member = tarfile.TarInfo(f"{split}/{name}/0001.png")
                member.size = data.tell()
                data.seek(0)
                archive.addfile(member, data)
    train, _ = load_images(tmp_path)
    assert train.labels.tolist() == [3, 8, 0]
    assert train.pixels[:, :, 1, 2].tolist() == [list(colour) for colour in colours.values()]
    torch.testing.assert_close(train.mean, torch.tensor([70.0, 40.0, 95.0]))


def test_bad_image_files(idx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected train-images-idx3-ubyte.gz or cifar10-\*train.tar"):
        load_images(tmp_path)
    labels = idx_folder / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for data, message in (
        (whole[:-12], "gzip-ed IDX file, got one that does not decompress"),
        (b"no gzip", "does not decompress"),
        (gzip.compress(gzip.decompress(whole)[:-1]), r"expected \[40\] bytes of data, got 39"),
        (gzip.compress(b"\0\0\x08\x03"), "expected an IDX file with magic 0x801"),
        (gzip.compress(struct.pack(">2i", 0x801, 39) + bytes(39)), "as many train images as labels, got 40 and 39"),
    ):
        labels.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_images(idx_folder)


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


# ---- Sparsifiner


def test_predicted_masks() -> None:
    predictor = MaskPredictor(8, 20, keep=0.3, reduction=2, topk=4)
    with torch.no_grad():
        predictor.basis.normal_()
    q, k, v = torch.randn(3, 2, 4, 20, 8).unbind(0)
    mask = predictor(q, k)
    assert mask[:, :, 0].all() and (mask[:, :, 1:].sum(-1) == 6).all()
    kept = predictor.estimate(q, k).masked_fill(~mask[:, :, 1:], torch.inf).amin(-1)
    dropped = predictor.estimate(q, k).masked_fill(mask[:, :, 1:], -torch.inf).amax(-1)
    assert (kept >= dropped).all()
    binary = binarize.softmax_aware_attention(q, k, v, mask)
    signs = torch.sign(q) @ torch.sign(k).mT / 8**0.5
    chosen = binarize.softmax_aware_map(signs.masked_fill(~mask, -torch.inf))
    assert torch.equal(binary, chosen @ torch.sign(v)) and not bool((chosen.bool() & ~mask).any())
    predictor.estimate(q, k).sum().backward()
    assert all(p.grad is not None for p in predictor.parameters())


def test_sparsifiner_errors() -> None:
    for arguments, message in (
        ((8, 20, 0.0), r"keep must lie in \(0, 1\], got 0.0"),
        ((8, 20, 0.5, 6), "topk must lie between 1 and tokens // reduction = 3, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskPredictor(*arguments)
    with pytest.raises(ValueError, match=r"expected q and k \[batch, heads, 60, d\], got \[1, 2, 59, 8\]"):
        SparsifinerAttention(16, 2, 60)(torch.randn(1, 59, 16))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads = 3, got 16"):
        SparsifinerAttention(16, 3, 60)


# ---- hosts


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


def test_logits_come_in_order(idx_folder: Path) -> None:
    _, test = load_images(idx_folder)
    got = logits_of(lambda x: x.flatten(1)[:, :4], test, batch_size=5)
    assert torch.equal(got, test.batch(range(12))[0].flatten(1)[:, :4])
