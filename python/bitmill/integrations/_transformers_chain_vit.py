# SPDX-License-Identifier: Apache-2.0
"""Chains in transformers' ViT: attention with its projections, the MLP, and layers of both."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP

from ..chain import AttentionChain, MlpChain, NotChained
from ..chained import Chained, register_chain
from ..encoder_chain import EncoderChain, Parts
from ._transformers_chain import ChainedAttention, as_bool, attention_of


class ViTAttentionMixin(ChainedAttention):
    """The self-attention of ViT and its relatives, and its output projection."""

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        chain = AttentionChain(projections, module.o_proj, attention_of(module, module.head_dim))
        chain.implementation = module.config._attn_implementation
        return chain

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        projected = self.attend(hidden_states, attention_mask)
        return (
            self.plain.forward(self, hidden_states, attention_mask, **kwargs)
            if projected is None
            else (projected, None)
        )


class ViTMLPMixin(Chained):
    """The MLP of ViT and its relatives."""

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        return MlpChain(module.fc1, module.fc2, module.activation_fn)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.chain(hidden_states) if self.runs(hidden_states) else self.plain.forward(self, hidden_states)


def parts_of(layer: Any) -> Parts:
    return Parts(layer.attention, layer.layernorm_before, layer.mlp, layer.layernorm_after)


class ViTLayerMixin(Chained):
    """A layer of ViT and its relatives, whose attention and MLP are chained."""

    attention: Any

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        for name in ("attention", "mlp"):
            if not isinstance(getattr(module, name), Chained):
                raise NotChained(f"its {name} is not chained")
        return EncoderChain((module,), parts_of, norm_first=True)

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        return module.attention, module.mlp, module.dropout

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        attention = self.attention
        if isinstance(attention, ChainedAttention) and attention.implemented() and self.takes(hidden_states):
            ready = self.chain.ready(hidden_states)
            if ready is not None:
                return ready(hidden_states, as_bool(attention_mask))
        return self.plain.forward(self, hidden_states, attention_mask, **kwargs)


@register_chain
class ChainedViTAttention(ViTAttentionMixin, ViTAttention):
    plain = ViTAttention


@register_chain
class ChainedViTMLP(ViTMLPMixin, ViTMLP):
    plain = ViTMLP


@register_chain
class ChainedViTLayer(ViTLayerMixin, ViTLayer):
    plain = ViTLayer
