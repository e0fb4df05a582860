# SPDX-License-Identifier: Apache-2.0
"""BinaryViT's own model: a pyramid of stages, batch normalisation throughout, a global average and no class token.

    stages of blocks, between them binary 2 x 2 convolutions that halve the grid and widen the tokens
    block: x = x + scale attention(norm(x)), then x = x + scale mlp(norm(x)) + pool branches(norm(x))

The patch convolution and the classifier are full precision; so are normalisations, shifts, scales and position tables.
Attention and MLP are those of `binaryvit`. Stages of many tokens average the tokens that keys and values are made of.

Source: Le and Li, BinaryViT, CVPRW 2023, section 3, and the published code. It trains on the probabilities of a
full-precision teacher alone (`bivit.distribution_loss`): AdamW without weight decay, rate 5e-4 falling as half a cosine
from the start, 300 epochs, no augmentation beyond crops and flips.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ..config import BinaryConfig
from ..nn import BinaryConv2d
from .binaryvit import BinaryViTAttention, BinaryViTMlp, Grid, LayerScale, RPReLU, image_of, shortcut, tokens_of


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of tokens [batch, n, channels]: a channel's statistics are those of all tokens of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


def positions(grid: Grid, channels: int) -> nn.Parameter:
    """A table [height * width, channels] with small random values."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(grid[0] * grid[1], channels), std=0.02))


class Downsampling(nn.Module):
    """Tokens of half the grid: RPReLU(norm(binary conv(y + shift)) + copies of the 2 x 2 means of y) + positions, with
    y = norm(x) and a 2 x 2 convolution of stride 2.

    Args:
        channels, wider: of its tokens in and out, the second a multiple of the first.
        grid: of the tokens in; an odd last row or column is left out.
    """

    def __init__(self, channels: int, wider: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.norm_before, self.norm = TokenBatchNorm(channels), TokenBatchNorm(wider)
        self.shift = nn.Parameter(torch.zeros(channels))
        self.conv = BinaryConv2d(channels, wider, 2, 2, bias=False, config=BinaryConfig("binaryvit"))
        self.activation = RPReLU(wider)
        self.positions = positions((grid[0] // 2, grid[1] // 2), wider)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_before(x)
        y = self.norm(tokens_of(self.conv(image_of(x + self.shift, self.grid))))
        means = tokens_of(avg_pool2d(image_of(x, self.grid), 2))
        return self.activation(y + shortcut(means, y.shape[-1])) + self.positions


class Block(nn.Module):
    """Attention and MLP, each behind a batch normalisation and beside a residual.

    Args:
        channels: of the tokens [batch, height * width, channels].
        hidden: of the MLP, a multiple of `channels`.
        num_heads: of the attention.
        grid: (height, width).
        reduction: patches of a side that share a key and a value.
        step: where the attention's c starts.
    """

    def __init__(self, channels: int, hidden: int, num_heads: int, grid: Grid, reduction: int, step: float) -> None:
        super().__init__()
        q, k, v, out = (nn.Linear(channels, channels, bias=False) for _ in range(4))
        up, down = nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels, bias=False)
        self.norm_attention, self.norm_mlp = TokenBatchNorm(channels), TokenBatchNorm(channels)
        self.attention = BinaryViTAttention(q, k, v, out, num_heads, step, TokenBatchNorm, grid, reduction)
        self.scale, self.mlp = LayerScale(channels), BinaryViTMlp(up, down, grid, TokenBatchNorm)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale(self.attention(self.norm_attention(x)))
        return x + self.mlp(self.norm_mlp(x))


class BinaryViT(nn.Module):
    """The model; the defaults are the paper's, for 224 x 224 pixels. `pack_`, `save` and `load` take it as it is.

    Args:
        image_size: height and width of the images, or one number for both.
        num_classes: of the classifier.
        in_channels: of the images.
        patch: pixels of a side that make a token of the first stage; an incomplete last row or column is left out.
        widths: channels of each stage, each a multiple of the one before.
        depths: blocks of each stage.
        heads: of each stage's attention.
        mlp_ratios: hidden channels of each stage's MLPs, in widths.
        reductions: patches of a side that share a key and a value, in each stage.
        step: where c starts in every attention; None for 1 / n for n keys, which small images need: above c a
            probability passes no gradient.
    Raises:
        ValueError: for sizes that do not fit each other.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        patch: int = 4,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 8, 4),
        heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 1, 1),
        step: float | None = 0.005,
    ) -> None:
        super().__init__()
        of_stages = {"depths": depths, "heads": heads, "mlp_ratios": mlp_ratios, "reductions": reductions}
        for name, values in {"widths": widths, **of_stages}.items():
            if len(values) != len(widths) or not values or min(values) < 1:
                raise ValueError(
                    f"BinaryViT: {name} must be one positive number a stage ({len(widths)}), got {list(values)}"
                )
        for before, after in itertools.pairwise(widths):
            if after % before:
                raise ValueError(f"BinaryViT: widths must be multiples of the ones before, got {list(widths)}")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = height, width
        grid = (height // patch, width // patch) if patch > 0 else (0, 0)
        if min(grid) >> (len(widths) - 1) < 1:
            raise ValueError(
                f"BinaryViT: {len(widths)} stages need at least {2 ** (len(widths) - 1)} patches of {patch} pixels a"
                f" side, got images of {height} x {width}"
            )
        self.patches = nn.Conv2d(in_channels, widths[0], patch, patch)
        self.norm_patches, self.positions = TokenBatchNorm(widths[0]), positions(grid, widths[0])
        self.stages = nn.ModuleList()
        for i, channels in enumerate(widths):
            stage = nn.Sequential()
            if i:
                stage.append(Downsampling(widths[i - 1], channels, grid))
                grid = grid[0] // 2, grid[1] // 2
            r = reductions[i]
            start = step if step is not None else 1 / max((grid[0] // r) * (grid[1] // r), 1)
            for _ in range(depths[i]):
                stage.append(Block(channels, mlp_ratios[i] * channels, heads[i], grid, r, start))
            self.stages.append(stage)
        self.norm, self.classifier = TokenBatchNorm(widths[-1]), nn.Linear(widths[-1], num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, height, width]."""
        wanted = self.patches.in_channels, *self.image_size
        if pixels.shape[1:] != wanted:
            raise ValueError(
                f"BinaryViT: images must have shape [batch, {', '.join(map(str, wanted))}], got {list(pixels.shape)}"
            )
        x = self.norm_patches(tokens_of(self.patches(pixels))) + self.positions
        for stage in self.stages:
            x = stage(x)
        return self.classifier(self.norm(x).mean(1))
