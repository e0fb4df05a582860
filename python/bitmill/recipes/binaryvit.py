# SPDX-License-Identifier: Apache-2.0
"""BinaryViT: what a fully binary vision transformer needs around its binary layers, as modules for research scripts.

A binary layer alone passes on one bit of each of its inputs. BinaryViT puts a full-precision path beside every one: a
shortcut over each linear layer, over the attention and over each block (average pools), and learned shifts in front of
every sign and around every nonlinearity.

Source: Le and Li, BinaryViT: Pushing Binary Vision Transformers Towards Convolutional Models, CVPRW 2023, section 3,
and the published code. Tokens are [batch, n, channels]. `binarize_` puts these modules into a transformers ViT; the
pyramid of stages, its batch normalisation and its global pool are properties of the paper's own model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..binarize import elastic, sign
from ..config import BinaryConfig
from ..convert import replace_modules
from ..nn import BinaryLinear
from ..ops._library import without_autocast
from ._groups import group_of


class RPReLU(nn.Module):
    """PReLU between two learned shifts of every channel: PReLU(x - shift) + offset (Liu et al., ReActNet, 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift, self.offset = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.shift
        return torch.where(x >= 0, x, self.slope * x) + self.offset


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

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        shortcut(torch.empty(1, linear.in_features), linear.out_features)  # refuse what has no shortcut now
        bare = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        bare.weight = linear.weight
        self.linear = BinaryLinear.from_linear(bare, BinaryConfig("binaryvit"))
        self.shift = nn.Parameter(torch.zeros(linear.in_features))
        self.norm, self.activation = nn.LayerNorm(linear.out_features), RPReLU(linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x + self.shift))
        return self.activation(y + shortcut(x, y.shape[-1]))


class PoolBranches(nn.Module):
    """Sum of four averages over neighbouring patches (3 and 5, along rows and along columns), each scaled per channel.

    Scales start at 0, so the branches start silent. Tokens beyond the grid (a class token) come first and get nothing.

    Args:
        channels: of the tokens [batch, extra + height * width, channels].
        grid: (height, width) of the patches.
    """

    WINDOWS = ((1, 3), (3, 1), (1, 5), (5, 1))

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.scale = nn.Parameter(torch.zeros(len(self.WINDOWS), channels))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.grid[0] * self.grid[1]
        if x.shape[1] < patches:
            raise ValueError(f"PoolBranches: expected at least {patches} tokens for the grid, got {x.shape[1]}")
        image = x[:, x.shape[1] - patches :].mT.unflatten(-1, self.grid)
        branches = [
            scale[:, None, None]
            * nn.functional.avg_pool2d(image, window, 1, tuple(w // 2 for w in window), count_include_pad=False)
            for scale, window in zip(self.scale, self.WINDOWS, strict=True)
        ]
        extra = x.new_zeros(x.shape[0], x.shape[1] - patches, x.shape[2])
        return torch.cat([extra, torch.stack(branches).sum(0).flatten(2).mT + self.offset], 1)


class BinaryViTAttention(nn.Module):
    """Self-attention with binary q, k, v, a learned {0, c} map of the softmax, and q + k + v beside its context.

    y = out(norm(context) + q + k + v), context = map . sgn(v + t_v), map = c [softmax(sgn(q + t_q) sgn(k + t_k)^T /
    sqrt(d)) > c / 2]. q, k, v and out are ShortcutLinear. x [batch, n, dim] to the same shape.

    Args:
        q, k, v, out: the projections; their weights become latent weights.
        num_heads: of the q's columns.
        step: where c starts. 0.005 in the paper, about the mean probability among 196 patches; 1 / n for n tokens.
    """

    def __init__(
        self, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, num_heads: int, step: float = 0.005
    ) -> None:
        super().__init__()
        dim = q.out_features
        if dim % num_heads:
            raise ValueError(f"BinaryViTAttention: the width {dim} must be a multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (ShortcutLinear(linear) for linear in (q, k, v, out))
        self.shift = nn.Parameter(torch.zeros(3, dim))
        self.step = nn.Parameter(torch.tensor(step))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        values = [layer(x) for layer in (self.q, self.k, self.v)]
        with without_autocast(x):
            q, k, v = (
                sign(t.float() + shift, "polynomial").unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for t, shift in zip(values, self.shift, strict=True)
            )
            probability = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
            chosen = elastic(probability, self.step, 1, signed=False, normalised=False)
            context = (chosen @ v).transpose(1, 2).flatten(2)
        return self.out(self.norm(context.to(x.dtype)) + torch.stack(values).sum(0))


class BinaryViTMixer(nn.Module):
    """scale * attention(x) + pool branches(x), in the place of a transformers attention layer; returns (y, None)."""

    def __init__(self, attention: BinaryViTAttention, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.attention, self.pools = attention, PoolBranches(channels, grid)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.scale * self.attention(hidden_states) + self.pools(hidden_states), None


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
        replacements[host] = BinaryViTMixer(attention, config.hidden_size, (side, side))
    for mlp in mlps:
        replacements |= {mlp.fc1: ShortcutLinear(mlp.fc1), mlp.fc2: ShortcutLinear(mlp.fc2)}
        replacements[mlp.activation_fn] = nn.Identity()
    replace_modules(model, replacements)
    return names
