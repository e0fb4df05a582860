# SPDX-License-Identifier: Apache-2.0
"""timm's ViT (DeiT included) and Swin: binary attention by replacing modules. timm itself is not imported.

Tested with timm 1.0.22: `timm.layers.attention.Attention` and `timm.models.swin_transformer.WindowAttention`. A class
is recognised by what it holds, so a version that adds something is refused instead of being computed differently. Names
of parameters stay as they were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..convert import replace_modules
from ..nn import BinaryAttention


class BinarySelfAttention(nn.Module):
    """timm's Attention with binary queries, keys, values and map; x [batch, n, dim] to the same shape.

    The children are the host's own.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, host: Any, kind: str, **options: Any) -> None:
        super().__init__()
        self.num_heads: int = host.num_heads
        for name, child in host.named_children():
            if name != "attn_drop":
                self.add_module(name, child)
        self.attention = BinaryAttention(kind, dropout=host.attn_drop.p, **options)
        self.train(host.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        context = self.attention(self.q_norm(q), self.k_norm(k), v, attn_mask).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(self.norm(context)))


class BinaryWindowAttention(nn.Module):
    """Swin's WindowAttention with binary queries, keys, values and map; x [windows, n, dim] to the same shape.

    The relative position bias is added to the scores, so the map is decided in floating point. The window keeps the
    size that it has now.
    """

    relative_position_index: Tensor

    def __init__(self, host: Any, kind: str, **options: Any) -> None:
        super().__init__()
        self.num_heads: int = host.num_heads
        self.qkv, self.proj, self.proj_drop = host.qkv, host.proj, host.proj_drop
        self.relative_position_bias_table = host.relative_position_bias_table
        self.register_buffer("relative_position_index", host.relative_position_index, persistent=False)
        self.attention = BinaryAttention(kind, dropout=host.attn_drop.p, **options)
        self.train(host.training)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        context = self.attention(q, k, v, self.bias(len(x), mask)).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(context))

    def bias(self, windows: int, mask: Tensor | None) -> Tensor:
        """Of the scores, [heads, n, n], or [windows, heads, n, n] with a mask [windows of an image, n, n]."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()
        return bias if mask is None else (bias + mask.unsqueeze(1)).repeat(windows // len(mask), 1, 1, 1)


class _Host(NamedTuple):
    replacement: type[BinarySelfAttention] | type[BinaryWindowAttention]
    parts: set[str]  # the children, parameters and buffers that it must hold, and no others


_PARTS = {"qkv", "attn_drop", "proj", "proj_drop"}
_HOSTS = {
    "Attention": _Host(BinarySelfAttention, _PARTS | {"q_norm", "k_norm", "norm"}),
    "WindowAttention": _Host(
        BinaryWindowAttention, _PARTS | {"relative_position_bias_table", "relative_position_index"}
    ),
}


def binarize_attention_(model: nn.Module, kind: str = "softmax_aware", **options: Any) -> list[str]:
    """Replace the attention of a timm ViT, DeiT or Swin by binary attention, in place.

    Projections stay as they are (`quantize_` binarises them) and keep their names. Change a Swin's image or window size
    before, not after.

    Args:
        kind: "bool", "softmax_aware" or "elastic".
        options: of `bitmill.nn.BinaryAttention`: beta, zero, row_scale.
    Returns:
        The names that were replaced; empty if all had been replaced before.
    Raises:
        ValueError: if a module is an attention of timm that does not fit (nothing is changed), or there is none.
    """
    modules = dict(model.named_modules())
    hosts = {name: module for name, module in modules.items() if _is_attention(module)}
    for name, module in hosts.items():
        reason = _misfit(module)
        if reason:
            raise ValueError(
                f"binarize_attention_: {name}: {type(module).__module__}.{type(module).__name__} does not fit"
                f" ({reason}); put a bitmill.nn.BinaryAttention between its projections yourself"
            )
    if not hosts and not any(isinstance(m, (BinarySelfAttention, BinaryWindowAttention)) for m in modules.values()):
        classes = ", ".join(sorted({type(module).__name__ for module in modules.values()}))
        raise ValueError(f"binarize_attention_: expected a model with timm's Attention, got only {classes}")
    replacements: dict[nn.Module, nn.Module] = {
        m: _HOSTS[type(m).__name__].replacement(m, kind, **options) for m in hosts.values()
    }
    replace_modules(model, replacements)
    return list(hosts)


def _is_attention(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__module__.startswith("timm.") and "Attention" in cls.__name__ and "Pool" not in cls.__name__


def _misfit(module: nn.Module) -> str | None:
    """Why a module cannot be replaced, or None."""
    host = _HOSTS.get(type(module).__name__)
    if host is None:
        return "its class is unknown"
    held = {*module._modules, *module._parameters, *module._buffers} - {"softmax"}
    if held != host.parts:
        return f"it differs in {', '.join(sorted(held ^ host.parts))}"
    if any(value for key, value in vars(module).items() if key.endswith("_hooks")) or "forward" in vars(module):
        return "it has hooks or a forward of its own"
    return None
