# SPDX-License-Identifier: Apache-2.0
"""BinaryViT: its modules, its form of a transformers ViT, and the model of its paper."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bitmill
from bitmill.recipes import binaryvit, bivit
from bitmill.recipes.binaryvit_pyramid import BinaryViT
from vision_inputs import vit, write_images


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
        branches.offset.copy_(torch.tensor([0.25, 0.125, 0.0625, 0.0625]).unsqueeze(1))
    got = branches(x)
    assert not got[:, 0].any()
    image = x[:, 1:].view(2, 3, 4, 2)
    for i, j in ((0, 0), (1, 2), (2, 3)):
        want = torch.full((2, 2), 0.5)
        for scale, (height, width) in zip(branches.scale, ((0, 1), (1, 0), (0, 2), (2, 0)), strict=True):
            near = image[:, max(i - height, 0) : i + height + 1, max(j - width, 0) : j + width + 1]
            want = want + scale * near.sum((1, 2)) / ((2 * height + 1) * (2 * width + 1))
        torch.testing.assert_close(got[:, 1 + 4 * i + j], want)
    with pytest.raises(ValueError, match="at least 12 tokens for the grid, got 11"):
        branches(x[:, :11])


def test_binaryvit_on_a_vit() -> None:
    pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
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


# ---- the model


def straight_through(value: Tensor, path: Tensor) -> Tensor:
    """The value, with the gradient of the path."""
    return path + (value - path).detach()


class Reference:
    """The model of the paper, written down with images [batch, channels, height, width] from the parameters' names.

    `nearest` is how far the value nearest to the threshold of a bit lies from it.
    """

    def __init__(self, model: BinaryViT) -> None:
        self.p, self.model, self.nearest = dict(model.named_parameters()), model, float("inf")

    def sign(self, x: Tensor) -> Tensor:
        """The slope 2 - 2 |x| is that of 2x - x |x|, which is flat beyond 1."""
        self.nearest = min(self.nearest, x.abs().min().item())
        inside = x.clamp(-1, 1)
        return straight_through(torch.sign(x), 2 * inside - inside * inside.abs())

    def elastic(self, p: Tensor, c: Tensor) -> Tensor:
        u = p / c
        self.nearest = min(self.nearest, (u - 0.5).abs().min().item())
        return c * straight_through(u.round().clamp(0, 1), u.clamp(0, 1))

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        return functional.batch_norm(x, None, None, self.p[f"{name}.weight"], self.p[f"{name}.bias"], training=True)

    def channels(self, name: str, row: int | None = None) -> Tensor:
        parameter = self.p[name] if row is None else self.p[name][row]
        return parameter.view(-1, 1, 1)

    def rprelu(self, x: Tensor, name: str) -> Tensor:
        x = x - self.channels(f"{name}.shift")
        return functional.prelu(x, self.p[f"{name}.slope"]) + self.channels(f"{name}.offset")

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Norm, shortcut and RPReLU around a binary 1 x 1 convolution."""
        weight = self.p[f"{name}.linear.weight"]
        k, n = x.shape[1], len(weight)
        centred = weight - weight.mean(1, keepdim=True)
        scaled = weight.detach().abs().mean(1, keepdim=True)
        binary = straight_through(scaled * torch.sign(centred), centred.clamp(-1, 1))
        y = functional.conv2d(self.sign(x + self.channels(f"{name}.shift")), binary[:, :, None, None])
        beside = torch.cat([x] * (n // k), 1) if n >= k else x.unflatten(1, (n, k // n)).mean(2)
        return self.rprelu(self.batch_norm(y, f"{name}.norm") + beside, f"{name}.activation")

    def attention(self, x: Tensor, name: str, heads: int, reduction: int) -> Tensor:
        seen = self.linear(functional.avg_pool2d(x, reduction), f"{name}.reduce") if reduction > 1 else x
        projected = [self.linear(t, f"{name}.{part}") for part, t in (("q", x), ("k", seen), ("v", seen))]
        signs = [self.sign(t + self.channels(f"{name}.shift", i)) for i, t in enumerate(projected)]
        q, k, v = (t.flatten(2).unflatten(1, (heads, -1)).mT for t in signs)
        chosen = self.elastic(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1), self.p[f"{name}.step"])
        context = (chosen @ v).mT.flatten(1, 2).view(x.shape)
        beside = [functional.interpolate(t, x.shape[2:]) for t in projected]
        return self.linear(
            self.rprelu(self.batch_norm(context, f"{name}.norm") + sum(beside), f"{name}.activation"), f"{name}.out"
        )

    def scaled(self, x: Tensor, name: str, row: int | None = None) -> Tensor:
        return x * self.channels(f"{name}.scale", row) + self.channels(f"{name}.offset", row)

    def block(self, x: Tensor, name: str, heads: int, reduction: int) -> Tensor:
        y = self.attention(self.batch_norm(x, f"{name}.norm_attention"), f"{name}.attention", heads, reduction)
        x = x + self.scaled(y, f"{name}.scale")
        y = self.batch_norm(x, f"{name}.norm_mlp")
        x = x + self.scaled(self.linear(self.linear(y, f"{name}.mlp.up"), f"{name}.mlp.down"), f"{name}.mlp.scale")
        for i, (h, w) in enumerate(((1, 3), (3, 1), (1, 5), (5, 1))):
            padded = functional.pad(y, (w // 2, w // 2, h // 2, h // 2))
            x = x + self.scaled(padded.unfold(2, h, 1).unfold(3, w, 1).mean((4, 5)), f"{name}.mlp.pools", i)
        return x

    def positions(self, name: str, shape: torch.Size) -> Tensor:
        return self.p[name].T.reshape(shape[1:])

    def downsampling(self, x: Tensor, name: str) -> Tensor:
        x = self.batch_norm(x, f"{name}.norm_before")
        filters = self.p[f"{name}.conv.weight"]
        scale = filters.detach().abs().mean((1, 2, 3), keepdim=True)
        y = functional.conv2d(
            self.sign(x + self.channels(f"{name}.shift")),
            straight_through(scale * torch.sign(filters), filters.clamp(-1, 1)),
            stride=2,
        )
        means = functional.avg_pool2d(x, 2)
        y = self.batch_norm(y, f"{name}.norm") + torch.cat([means] * (len(filters) // x.shape[1]), 1)
        y = self.rprelu(y, f"{name}.activation")
        return y + self.positions(f"{name}.positions", y.shape)

    def __call__(self, pixels: Tensor, heads: tuple[int, ...], reductions: tuple[int, ...]) -> Tensor:
        filters = self.p["patches.weight"]
        x = functional.conv2d(pixels, filters, self.p["patches.bias"], filters.shape[-1])
        x = self.batch_norm(x, "norm_patches")
        x = x + self.positions("positions", x.shape)
        for i, stage in enumerate(self.model.stages):
            for j in range(len(stage)):
                name = f"stages.{i}.{j}"
                x = self.downsampling(x, name) if i and not j else self.block(x, name, heads[i], reductions[i])
        pooled = self.batch_norm(x, "norm").mean((2, 3))
        return functional.linear(pooled, self.p["classifier.weight"], self.p["classifier.bias"])


SIZES: dict[str, Any] = {"in_channels": 2, "patch": 4, "widths": (32, 64, 128), "depths": (2, 1, 1), "heads": (1, 2, 2)}
SIZES |= {"mlp_ratios": (4, 2, 1), "reductions": (4, 2, 1), "step": None}


def small(image: Any = 32, **changes: Any) -> BinaryViT:
    """With parameters away from where they start."""
    model = BinaryViT(image, 5, **(SIZES | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("step"):
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.mark.parametrize("image", [(32, 32), (30, 45)])
def test_the_model_is_the_papers(image: tuple[int, int]) -> None:
    """Logits and all gradients, in training mode; 30 x 45 pixels are 7 x 11 patches, 3 x 5 and 1 x 2."""
    heads, reductions, nearest = SIZES["heads"], SIZES["reductions"], 0.0
    while nearest < 1e-5:  # a value at the threshold of a bit may fall on either side of it
        model, pixels, upstream = small(image, depths=(1, 1, 1)), torch.randn(3, 2, *image), torch.randn(3, 5)
        reference = Reference(copy.deepcopy(model))
        want, nearest = reference(pixels, heads, reductions), reference.nearest
    got = model(pixels)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    got.backward(upstream)
    want.backward(upstream)
    for (name, p), q in zip(model.named_parameters(), reference.p.values(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        assert (p.grad - q.grad).norm() <= 2e-4 * q.grad.norm() + 1e-4, name  # what a norm removes is 0 or noise
    assert all(float(p.grad.abs().sum()) > 0 for name, p in model.named_parameters() if name.endswith("step"))


def test_sizes_of_the_paper() -> None:
    """Its published model: 22.6 M parameters, 56 x 56 patches, 49 tokens at the end."""
    with torch.device("meta"):
        model = BinaryViT()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert model.stages[3][0].positions.shape == (49, 512)
    binary = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("linear.weight", "conv.weight")))
    assert binary == sum(
        depth * (4 * w * w + (r > 1) * w * w + 2 * ratio * w * w)
        for depth, w, r, ratio in ((3, 64, 8, 8), (4, 128, 4, 8), (8, 256, 1, 4), (4, 512, 1, 4))
    ) + 4 * (64 * 128 + 128 * 256 + 256 * 512)


@pytest.mark.parametrize("image", [(32, 32), (30, 45)])
def test_the_packed_model_is_the_training_form(image: tuple[int, int], tmp_path: Path) -> None:
    model, pixels = small(image), torch.randn(3, 2, *image)
    for _ in range(3):
        model(torch.randn(4, 2, *image))  # running statistics
    model.eval()
    codes: list[Tensor] = []

    def watch(kinds: Any) -> int:
        layers = [m for m in model.modules() if isinstance(m, kinds)]
        for layer in layers:
            layer.register_forward_hook(lambda _, x, y: codes.extend((x[0].sign(), y)))
        return len(layers)

    fresh, bare = small(image), copy.deepcopy(model)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
        trained = bare(pixels)
        watched = watch((bitmill.nn.BinaryLinear, bitmill.nn.BinaryConv2d))
        assert torch.equal(model(pixels), trained)
        before, codes[:] = list(codes), []
        model = copy.deepcopy(bare)
        assert len(bitmill.pack_(model)) == watched == 4 * 6 + 3 + 2
        assert watch((bitmill.nn.PackedBinaryLinear, bitmill.nn.PackedBinaryConv2d)) == watched
        assert torch.equal(model(pixels), trained)
        assert all(torch.equal(a, b) for a, b in zip(codes, before, strict=True))
        torch.testing.assert_close(model(pixels[:1]), trained[:1])
    torch.testing.assert_close(model(pixels), trained)  # with gradients on, attention takes its training path
    bitmill.pack_(bare)
    bitmill.save(bare, tmp_path / "model.safetensors")
    bitmill.load(fresh.eval(), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(pixels), trained)


def test_autocast_and_empty_batches() -> None:
    model, pixels = small().eval(), torch.randn(2, 2, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(pixels).isfinite().all()
    assert model(pixels[:0]).shape == (0, 5)


def test_models_that_do_not_fit() -> None:
    for image, changes, message in (
        (32, {"depths": (1, 1)}, r"depths must be one positive number a stage \(3\), got \[1, 1\]"),
        (32, {"heads": (1, 0, 1)}, "heads must be one positive number a stage"),
        (32, {"widths": ()}, r"widths must be one positive number a stage \(0\), got \[\]"),
        (32, {"widths": (32, 48, 96)}, r"widths must be multiples of the ones before, got \[32, 48, 96\]"),
        (32, {"heads": (1, 3, 1)}, "the width 64 must be a multiple of num_heads, got 3"),
        (32, {"reductions": (9, 1, 1)}, r"reduction must be 1, or at most the sides of a grid, got 9 and \(8, 8\)"),
        (32, {"patch": 0}, "3 stages need at least 4 patches of 0 pixels a side"),
        ((32, 15), {}, "3 stages need at least 4 patches of 4 pixels a side, got images of 32 x 15"),
    ):
        with pytest.raises(ValueError, match=message):
            small(image, **changes)
    for pixels in (torch.randn(1, 2, 32, 36), torch.randn(1, 3, 32, 32), torch.randn(2, 32, 32)):
        with pytest.raises(ValueError, match=r"images must have shape \[batch, 2, 32, 32\], got"):
            small()(pixels)
    layer = binaryvit.BinaryViTAttention(*(nn.Linear(8, 8) for _ in range(4)), 2, grid=(4, 4), reduction=2)
    with pytest.raises(ValueError, match=r"expected tokens for the grid \(4, 4\), got 17"):
        layer(torch.randn(1, 17, 8))


def test_the_program_trains_the_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    from bitmill.recipes.scripts import bivit as script

    data, start, out = str(write_images(tmp_path / "images")), str(tmp_path / "start"), tmp_path / "out"
    common = ["--data", data, "--batch-size", "8", "--every", "3", "--epochs", "1"]
    assert script.main([*common, "--out", start, "--patch", "4", "--width", "32", "--layers", "1"]) == 0
    student = [*common, "--teacher", start, "--student", "binaryvit-pyramid", "--patch", "1", "--width", "64"]
    assert script.main([*student, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["packed"] == result["trained"] and result["largest_difference_of_logits"] == 0
    assert result["file_bytes"] == (out / "packed.safetensors").stat().st_size
    with pytest.raises(SystemExit, match="--stages 2 goes with bibert, bivit or naive, got binaryvit-pyramid"):
        script.main([*student, "--out", str(tmp_path / "two"), "--stages", "2"])
