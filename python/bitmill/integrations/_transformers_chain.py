# SPDX-License-Identifier: Apache-2.0
"""Chains (`bitmill.chain`) in transformers' BERT and ViT: attention with its projections, and the MLP.

Relatives whose code is the same are in `_transformers_chain_relatives`.

A BERT encoder whose layers are all chained computes no padding: its sequences lie one after another inside. Positions
that the mask drops come out as 0.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention, BertEncoder, BertLayer, BertSelfAttention
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from ..chain import Attention, AttentionChain, Chained, MlpChain, NotChained, has_hooks, register_chain
from ..nn import BinaryAttention


class Sequences(NamedTuple):
    """Instead of a mask: rows of a batch without its padding."""

    lengths: Tensor  # int64 [sequences]
    longest: int


def attention_of(module: Any, head_dim: int) -> Attention:
    """The rule of a host's attention layer.

    Raises:
        NotChained: if it is not one of bits.
    """
    from .transformers import CHILD, PREFIX, chained_kind  # which imports this module

    name = module.config._attn_implementation
    if not name.startswith(PREFIX):
        raise NotChained(f"its attention is {name!r}, not one of bits")
    scaling = None if math.isclose(module.scaling, head_dim**-0.5) else module.scaling
    child = getattr(module, CHILD, None)
    if isinstance(child, BinaryAttention):
        return Attention.of(child, module.num_attention_heads, scaling)
    kind = chained_kind(name.removeprefix(PREFIX))
    if child is not None or kind is None:
        raise NotChained(f"its attention, {type(child).__name__ if child else name}, has no form on bits")
    return Attention(module.num_attention_heads, kind, scaling=scaling)


class ChainedAttention(Chained):
    """What BERT's and ViT's attention share: when the chain runs, and on what."""

    implementation: str

    def layer(self) -> Any:
        """The module that has the config."""
        return self

    def attend(self, x: Tensor, mask: Any, residual: Tensor | None = None) -> Tensor | None:
        """The result of the output projection, a residual added, or None if the layers are to compute one by one."""
        sequences = mask if isinstance(mask, Sequences) else None
        most = x.shape[-2] if sequences is None else sequences.longest
        same = self.layer().config._attn_implementation == self.chain.implementation
        if not same or most > self.chain.most_keys or not self.runs(x):
            return None
        if sequences is not None:
            return self.chain(x, None, sequences.lengths, residual)
        return self.chain(x, mask if mask is None or mask.is_floating_point() else mask.bool(), None, residual)


class BertAttentionMixin(ChainedAttention):
    """The self-attention of BERT and its relatives, its output projection and normalisation."""

    self_attention: ClassVar[Any]
    output: Any
    self: Any

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        if module.is_cross_attention:
            raise NotChained("it attends to another sequence")
        inner: Any = module.self
        if type(inner) is not cls.self_attention:
            raise NotChained(f"its self-attention is a {type(inner).__name__}")
        attention = attention_of(inner, inner.attention_head_size)
        most = getattr(inner.config, "max_position_embeddings", None)
        chain = AttentionChain((inner.query, inner.key, inner.value), module.output.dense, attention, most)
        chain.implementation = inner.config._attn_implementation
        return chain

    def layer(self) -> Any:
        return self.self

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        inner, output = module.self, module.output
        return inner, *inner.children(), output, output.dense, output.dropout

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        attended = self.attend(hidden_states, attention_mask, hidden_states) if cache is None else None
        if attended is None:
            return self.plain.forward(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
        return self.output.LayerNorm(attended), None


class BertLayerMixin(Chained):
    """A layer of BERT and its relatives: the chain is its MLP."""

    is_decoder: bool
    chunk_size_feed_forward: int
    attention: Any
    output: Any

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        inner = module.intermediate
        return MlpChain(inner.dense, module.output.dense, inner.intermediate_act_fn)

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        inner, output = module.intermediate, module.output
        return inner, *inner.children(), output, output.dense, output.dropout

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.is_decoder or self.chunk_size_feed_forward:
            return self.plain.forward(self, hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)
        return self.feed_forward_chunk(self.attention(hidden_states, attention_mask, **kwargs)[0])

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if not self.runs(attention_output):
            return self.plain.feed_forward_chunk(self, attention_output)
        return self.output.LayerNorm(self.chain(attention_output, attention_output))


class BertEncoderMixin(Chained):
    """The encoder of BERT and its relatives: without padding inside."""

    layer: Any

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        if not all(isinstance(layer.attention, Chained) for layer in module.layer):
            raise NotChained("not all of its attention layers are chained")
        return nn.Identity()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        kept = self._kept(hidden_states, attention_mask, args, kwargs)
        if kept is None:
            return self.plain.forward(self, hidden_states, attention_mask, *args, **kwargs)
        lengths = kept.sum(-1)
        rows = kept.flatten().nonzero().squeeze(-1)
        sequences = Sequences(lengths, int(lengths.max()))
        output = self.plain.forward(self, hidden_states.flatten(0, 1)[rows], sequences, *args, **kwargs)
        padded = torch.zeros_like(hidden_states)
        padded.flatten(0, 1)[rows] = output.last_hidden_state
        output.last_hidden_state = padded
        return output

    def _kept(self, x: Tensor, mask: Tensor | None, args: Any, kwargs: Any) -> Tensor | None:
        """The tokens, bool [batch, n], that a padding mask keeps; None to compute as the host does."""
        others = any(a is not None for a in args) or kwargs.get("cache") is not None
        if mask is None or mask.dtype != torch.bool or others or torch.compiler.is_compiling() or not self.runs(x):
            return None
        layers = list(self.layer)
        if any(has_hooks(layer) or not layer.attention.runs(x) for layer in layers):
            return None
        kept = mask[:, 0, 0]
        same = kept.shape == x.shape[:2] and bool((mask == kept[:, None, None]).all())
        return kept if same and not bool(kept.all()) and bool(kept.any(-1).all()) else None


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


@register_chain
class ChainedBertAttention(BertAttentionMixin, BertAttention):
    plain, self_attention = BertAttention, BertSelfAttention


@register_chain
class ChainedBertLayer(BertLayerMixin, BertLayer):
    plain = BertLayer


@register_chain
class ChainedBertEncoder(BertEncoderMixin, BertEncoder):
    plain = BertEncoder


@register_chain
class ChainedViTAttention(ViTAttentionMixin, ViTAttention):
    plain = ViTAttention


@register_chain
class ChainedViTMLP(ViTMLPMixin, ViTMLP):
    plain = ViTMLP
