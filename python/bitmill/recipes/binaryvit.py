# SPDX-License-Identifier: Apache-2.0
"""BinaryViT: what a fully binary vision transformer needs around its binary layers, as modules for research scripts.

A binary layer alone passes on one bit of each of its inputs. BinaryViT puts a full-precision path beside every one: a
shortcut over each linear layer, over the attention and over each block (average pools), and learned shifts in front of
every sign and around every nonlinearity.

Source: Le and Li, BinaryViT: Pushing Binary Vision Transformers Towards Convolutional Models, CVPRW 2023, section 3,
and the published code. Tokens are [batch, n, channels]. `binarize_` puts these modules into a transformers ViT;
`binaryvit_pyramid` is the paper's own model of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, prelu

from ..binarize import elastic_map_attention
from ..config import BinaryConfig
from ..convert import replace_modules
from ..nn import BinaryLinear
from ._groups import group_of

Grid = tuple[int, int]  # height and width, in patches
Norm = Callable[[int], nn.Module]  # of this many channels


def image_of(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens [batch, height * width, channels] as an image [batch, channels, height, width]; a view."""
    return tokens.mT.unflatten(-1, grid)


def tokens_of(image: Tensor) -> Tensor:
    """The inverse of `image_of`, for any grid."""
    return image.flatten(2).mT


class RPReLU(nn.Module):
    """PReLU between two learned shifts of every channel: PReLU(x - shift) + offset (Liu et al., ReActNet, 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift, self.offset = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        rows = (x - self.shift).flatten(0, -2)  # channels are the second dimension, as prelu wants them
        return prelu(rows, self.slope).view(x.shape) + self.offset


class LayerScale(nn.Module):
    """x * scale + offset of every channel, scales starting at 0.1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.full((channels,), 0.1)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


def shortcut(x: Tensor, channels: int) -> Tensor:
    """x [..., k] with `channels` channels: x itself, copies of it side by side, or means of neighbouring channels.

    Raises:
        ValueError: unless one of k and `channels` divides the other.
    """
    k = x.shape[-1]
    if channels % k == 0:
        return x.repeat(*[1] * (x.dim() - 1), channels // k) if channels > k else x
    if k % channels:
        raise ValueError(f"shortcut: channels must divide, or be a multiple of, the {k} of x, got {channels}")
    return x.unflatten(-1, (channels, k // channels)).mean(-1)


class ShortcutLinear(nn.Module):
    """RPReLU(norm(binary linear(x + shift)) + shortcut(x)), a drop-in for nn.Linear without a bias."""

    def __init__(self, linear: nn.Linear, norm: Norm = nn.LayerNorm) -> None:
        super().__init__()
        shortcut(torch.empty(1, linear.in_features), linear.out_features)  # refuse what has no shortcut now
        bare = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        bare.weight = linear.weight
        self.linear = BinaryLinear.from_linear(bare, BinaryConfig("binaryvit"))
        self.shift = nn.Parameter(torch.zeros(linear.in_features))
        self.norm, self.activation = norm(linear.out_features), RPReLU(linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x + self.shift))
        return self.activation(y + shortcut(x, y.shape[-1]))


class PoolBranches(nn.Module):
    """Sum of four averages over neighbouring patches (3 and 5, along columns and along rows), each with its scale and
    offset of every channel.

    Patches beyond the border count as 0. Scales start at 0, so the branches start silent. Tokens beyond the grid (a
    class token) come first and get nothing.

    Args:
        channels: of the tokens [batch, extra + height * width, channels].
        grid: (height, width) of the patches.
    """

    WINDOWS = ((1, 3), (3, 1), (1, 5), (5, 1))

    def __init__(self, channels: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.scale = nn.Parameter(torch.zeros(len(self.WINDOWS), channels))
        self.offset = nn.Parameter(torch.zeros(len(self.WINDOWS), channels))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.grid[0] * self.grid[1]
        if x.shape[1] < patches:
            raise ValueError(f"PoolBranches: expected at least {patches} tokens for the grid, got {x.shape[1]}")
        extra = x.shape[1] - patches
        image = image_of(x[:, extra:], self.grid)
        total = self.offset.sum(0)
        for scale, window in zip(self.scale, self.WINDOWS, strict=True):
            total = total + scale * tokens_of(avg_pool2d(image, window, 1, (window[0] // 2, window[1] // 2)))
        return torch.cat([x.new_zeros(x.shape[0], extra, x.shape[2]), total], 1) if extra else total


class BinaryViTAttention(nn.Module):
    """Self-attention with binary q, k, v, a learned {0, c} map of the softmax, and q + k + v beside its context.

    y = out(RPReLU(norm(context) + q + k + v)), context = map . sgn(v + t_v), map = c [softmax(sgn(q + t_q) sgn(k +
    t_k)^T / sqrt(d)) > c / 2]. q, k, v and out are ShortcutLinear. With a reduction r, k and v are those of
    ShortcutLinear(r x r means of x), and every patch has those of its r x r patches beside its context.
    x [batch, n, dim] to the same shape.

    Args:
        q, k, v, out: the projections; their weights become latent weights.
        num_heads: of the q's columns.
        step: where c starts. 0.005 in the paper, about the mean probability among 196 patches; 1 / n for n keys.
        norm: makes the normalisations.
        grid: (height, width) of the tokens, for a reduction above 1.
        reduction: patches of a side that share a key and a value.
    """

    def __init__(
        self,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        out: nn.Linear,
        num_heads: int,
        step: float = 0.005,
        norm: Norm = nn.LayerNorm,
        grid: Grid | None = None,
        reduction: int = 1,
    ) -> None:
        super().__init__()
        dim = q.out_features
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"BinaryViTAttention: the width {dim} must be a multiple of num_heads, got {num_heads}")
        if reduction < 1 or (reduction > 1 and (grid is None or min(grid) < reduction)):
            raise ValueError(
                f"BinaryViTAttention: reduction must be 1, or at most the sides of a grid, got {reduction} and {grid}"
            )
        self.num_heads, self.grid, self.reduction = num_heads, grid, reduction
        self.q, self.k, self.v, self.out = (ShortcutLinear(linear, norm) for linear in (q, k, v, out))
        self.reduce = ShortcutLinear(nn.Linear(dim, dim, bias=False), norm) if reduction > 1 else None
        self.shift = nn.Parameter(torch.zeros(3, dim))
        self.step = nn.Parameter(torch.tensor(step))
        self.norm, self.activation = norm(dim), RPReLU(dim)

    def forward(self, x: Tensor) -> Tensor:
        seen = x if self.reduce is None else self._reduced(x)
        projected = self.q(x), self.k(seen), self.v(seen)
        q, k, v = (
            (t + shift).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t, shift in zip(projected, self.shift, strict=True)
        )
        context = elastic_map_attention(q, k, v, self.step).transpose(1, 2).flatten(2)
        beside = projected[1] + projected[2]
        return self.out(self.activation(self.norm(context) + projected[0] + self._spread(beside)))

    def _reduced(self, x: Tensor) -> Tensor:
        assert self.grid is not None and self.reduce is not None
        if x.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"BinaryViTAttention: expected tokens for the grid {self.grid}, got {x.shape[1]}")
        return self.reduce(tokens_of(avg_pool2d(image_of(x, self.grid), self.reduction)))

    def _spread(self, x: Tensor) -> Tensor:
        """What is known of r x r patches, for each of them."""
        if self.grid is None or self.reduction == 1:
            return x
        height, width = (side // self.reduction for side in self.grid)
        return tokens_of(interpolate(image_of(x, (height, width)), self.grid))


class BinaryViTMlp(nn.Module):
    """scale * down(up(x)) + pool branches(x): an MLP of two ShortcutLinear, and the averages that its block adds.

    Args:
        up, down: their weights become latent weights; one of the widths of each divides the other.
        grid: (height, width) of the patches.
        norm: makes the normalisations.
    """

    def __init__(self, up: nn.Linear, down: nn.Linear, grid: Grid, norm: Norm = nn.LayerNorm) -> None:
        super().__init__()
        self.up, self.down = ShortcutLinear(up, norm), ShortcutLinear(down, norm)
        self.scale, self.pools = LayerScale(down.out_features), PoolBranches(down.out_features, grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.down(self.up(x))) + self.pools(x)


class BinaryViTMixer(nn.Module):
    """scale * attention(x), in the place of a transformers attention layer; returns (y, None)."""

    def __init__(self, attention: BinaryViTAttention, channels: int) -> None:
        super().__init__()
        self.attention, self.scale = attention, LayerScale(channels)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.scale(self.attention(hidden_states)), None


def binarize_(model: nn.Module) -> list[str]:
    """Put BinaryViT's layers into a ViT of transformers, in place: its projections, its attention and its MLPs.

    Latent weights are the model's own; biases of linear layers go, shifts, scales and norms come, and RPReLU takes the
    place of GELU, so make the optimizer afterwards. The model has to be trained: it does not compute what it did.

    Returns:
        The names of the linear layers that became binary.
    Raises:
        ValueError: if the model is not a ViT of transformers.
    """
    config: Any = getattr(model, "config", None)
    hosts: list[Any] = [module for module in model.modules() if type(module).__name__ == "ViTAttention"]
    mlps: list[Any] = [module for module in model.modules() if type(module).__name__ == "ViTMLP"]
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not hosts or not all(isinstance(getattr(host, part, None), nn.Linear) for host in hosts for part in parts):
        raise ValueError(
            f"binarize_: expected a ViT of transformers with q_proj, k_proj, v_proj and o_proj, got"
            f" {type(model).__name__}; build your model of the modules of bitmill.recipes.binaryvit"
        )
    side = config.image_size // config.patch_size
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and group_of(name)]
    replacements: dict[nn.Module, nn.Module] = {}
    for host in hosts:
        q, k, v, out = (getattr(host, part) for part in parts)
        attention = BinaryViTAttention(q, k, v, out, config.num_attention_heads, step=1 / side**2)
        replacements[host] = BinaryViTMixer(attention, config.hidden_size)
    for mlp in mlps:
        replacements[mlp] = BinaryViTMlp(mlp.fc1, mlp.fc2, (side, side))
    replace_modules(model, replacements)
    return names
