# SPDX-License-Identifier: Apache-2.0
"""Chains (`bitmill.chain`) in timm's ViT, DeiT and Swin: attention with its projections, the MLP, and blocks of ViT.

Imported when `pack_` meets one of these classes, so timm is there.
"""

from __future__ import annotations

from typing import Any

from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..chain import Attention, AttentionChain, MlpChain, NotChained
from ..chained import Chained, register_chain
from ..encoder_chain import EncoderChain, Parts
from .timm import BinarySelfAttention, BinaryWindowAttention


def require_nothing_between(module: nn.Module, *names: str) -> None:
    """Raise NotChained if one of these children computes something in eval mode."""
    for name in names:
        child = getattr(module, name)
        if not isinstance(child, (nn.Identity, nn.Dropout, DropPath)):
            raise NotChained(f"its {name} is a {type(child).__name__}, not an Identity")


@register_chain
class ChainedSelfAttention(Chained, BinarySelfAttention):
    """The self-attention of ViT and DeiT and its output projection."""

    plain = BinarySelfAttention

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        require_nothing_between(module, "q_norm", "k_norm", "norm")
        return AttentionChain((module.qkv,), module.proj, Attention.of(module.attention, module.num_heads))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if x.shape[-2] > self.chain.most_keys or not self.runs(x):
            return self.plain.forward(self, x, attn_mask)
        return self.proj_drop(self.chain(x, attn_mask))


@register_chain
class ChainedWindowAttention(Chained, BinaryWindowAttention):
    """Swin's attention in windows and its output projection."""

    plain = BinaryWindowAttention

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        attention, keys = Attention.of(module.attention, module.num_heads), len(module.relative_position_index)
        return AttentionChain((module.qkv,), module.proj, attention, keys)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.runs(x, self.relative_position_bias_table):
            return self.plain.forward(self, x, mask)
        return self.proj_drop(self.chain(x, self.bias(len(x), mask)))


@register_chain
class ChainedMlp(Chained, Mlp):
    """timm's MLP."""

    plain = Mlp

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        require_nothing_between(module, "drop1", "norm")
        return MlpChain(module.fc1, module.fc2, module.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.chain(x)) if self.runs(x) else self.plain.forward(self, x)


def parts_of(block: Any) -> Parts:
    return Parts(block.attn, block.norm1, block.mlp, block.norm2)


@register_chain
class ChainedBlock(Chained, Block):
    """A block of ViT and DeiT, whose attention and MLP are chained."""

    plain = Block

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        for name in ("attn", "mlp"):
            if not isinstance(getattr(module, name), Chained):
                raise NotChained(f"its {name} is not chained")
        require_nothing_between(module, "ls1", "drop_path1", "ls2", "drop_path2")
        return EncoderChain((module,), parts_of, norm_first=True, plain=(nn.LayerNorm, LayerNorm))

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        return module.attn, module.mlp, module.ls1, module.drop_path1, module.ls2, module.drop_path2

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        fast = any(getattr(norm, "_fast_norm", False) for norm in (self.norm1, self.norm2))
        if x.dim() == 3 and not fast and self.takes(x):
            ready = self.chain.ready(x)
            if ready is not None:
                return ready(x, attn_mask)
        return self.plain.forward(self, x, attn_mask)
