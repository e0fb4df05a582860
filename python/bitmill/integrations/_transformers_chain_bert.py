# SPDX-License-Identifier: Apache-2.0
"""Chains in transformers' BERT: attention with its projections, the MLP, layers of both, and the encoder.

Imported when `pack_` meets one of these classes, as `_transformers_chain_relatives`, with those whose code is the same.

A BERT encoder whose layers are all chained computes no padding: its sequences lie one after another inside. Positions
that the mask drops come out as 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertAttention, BertEncoder, BertLayer, BertSelfAttention

from ..chain import AttentionChain, EncoderLayer, MlpChain, NotChained, encoder, has_hooks, undisturbed
from ..chained import Chained, register_chain
from ._transformers_chain import ChainedAttention, Sequences, as_bool, attention_of


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
        attention: Any = self.attention
        chained = not has_hooks(attention) and isinstance(attention, ChainedAttention)
        if chained and self.runs(hidden_states):
            masks = attention.masks(hidden_states, attention_mask)
            if masks is not None:
                parts = attention.chain, attention.output.LayerNorm, self.chain, self.output.LayerNorm
                whole = encoder(hidden_states, [parts], masks)
                if whole is not None:
                    return whole
        return self.feed_forward_chunk(attention(hidden_states, attention_mask, **kwargs)[0])

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if not self.runs(attention_output):
            return self.plain.feed_forward_chunk(self, attention_output)
        return self.output.LayerNorm(self.chain(attention_output, attention_output))


class EncoderChain(nn.Module):
    """All layers of a BERT encoder in one op, if nothing but their chains and normalisations would be called.

    Args:
        layers: those of the encoder, whose attention and MLP are chained; they stay the host's.
        config: of the encoder, which must be that of the attention.
    """

    def __init__(self, layers: nn.ModuleList, config: Any) -> None:
        super().__init__()
        self.layers: tuple[Any, ...] = tuple(layers)
        self.config = config
        skipped = {
            module
            for layer in self.layers
            for chained in (layer, layer.attention)
            for module in (chained, chained.chain, *chained.chain.passed)
        }
        self.skipped = tuple(sorted(skipped, key=id))  # as they lie in memory: hundreds are looked at in every call

    @staticmethod
    def fits(layer: Any, config: Any) -> bool:
        """Whether nothing but chains and normalisations would be called in a layer."""
        attention: Any = layer.attention
        chained = isinstance(layer, Chained) and isinstance(attention, Chained)
        plain = not layer.is_decoder and not layer.chunk_size_feed_forward
        return chained and plain and attention.self.config is config

    def planned(self, most: int) -> list[EncoderLayer] | None:
        """The layers, or None if one of them is not as it was planned, for sequences of up to `most` tokens."""
        implementation = self.config._attn_implementation
        planned: list[EncoderLayer] = []
        for layer in self.layers:
            parts = layer._modules  # ten times faster than attributes
            inner = parts["attention"]._modules
            attention = inner.get("chain")
            if attention is None or "chain" not in parts:  # loading other weights took it off
                return None
            if attention.implementation != implementation or most > attention.most_keys:
                return None
            norm, last_norm = (block["output"]._modules["LayerNorm"] for block in (inner, parts))
            planned.append((attention, norm, parts["chain"], last_norm))
        return planned if undisturbed(self.skipped) else None


class BertEncoderMixin(Chained):
    """The encoder of BERT and its relatives: without padding inside, and in one op if all of it is chained."""

    layer: Any

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        if not all(isinstance(layer.attention, Chained) for layer in module.layer):
            raise NotChained("not all of its attention layers are chained")
        if all(EncoderChain.fits(layer, module.config) for layer in module.layer):
            return EncoderChain(module.layer, module.config)
        return nn.Identity()

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        return (module.layer,)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        others = (encoder_hidden_states, encoder_attention_mask, cache)
        x, mask = hidden_states, attention_mask
        if any(other is not None for other in others) or torch.compiler.is_compiling() or not self.runs(x):
            return self.plain.forward(self, x, mask, *others, **kwargs)
        layers = self.chain.planned(x.shape[-2]) if isinstance(self.chain, EncoderChain) else None
        kept, left = self._kept(x, mask, layers is not None)
        if kept is None:
            last = None if layers is None else encoder(x, layers, (as_bool(left), None))
            if last is None:
                return self.plain.forward(self, x, mask, *others, **kwargs)
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)
        lengths = kept.sum(-1)
        rows = kept.flatten().nonzero().squeeze(-1)
        tokens = x.flatten(0, 1)[rows]
        last = None if layers is None else encoder(tokens, layers, (None, lengths))
        if last is None:
            output = self.plain.forward(self, tokens, Sequences(lengths, int(lengths.max())), *others, **kwargs)
        else:
            output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)
        padded = torch.zeros_like(x)
        padded.flatten(0, 1)[rows] = output.last_hidden_state
        output.last_hidden_state = padded
        return output

    def _kept(self, x: Tensor, mask: Tensor | None, whole: bool) -> tuple[Tensor | None, Tensor | None]:
        """The tokens, bool [batch, n], that a padding mask keeps, or None to compute all, and the mask they need."""
        if mask is None or mask.dtype != torch.bool:
            return None, mask
        if not whole and any(has_hooks(layer) or not layer.attention.runs(x) for layer in self.layer):
            return None, mask
        kept = mask[:, 0, 0]
        if kept.shape != x.shape[:2] or not bool((mask == kept[:, None, None]).all()):
            return None, mask
        if bool(kept.all()):
            return None, None
        return (kept, None) if bool(kept.any(-1).all()) else (None, mask)


@register_chain
class ChainedBertAttention(BertAttentionMixin, BertAttention):
    plain, self_attention = BertAttention, BertSelfAttention


@register_chain
class ChainedBertLayer(BertLayerMixin, BertLayer):
    plain = BertLayer


@register_chain
class ChainedBertEncoder(BertEncoderMixin, BertEncoder):
    plain = BertEncoder
