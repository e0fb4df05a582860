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
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertSelfAttention,
)

from ..chain import AttentionChain, MlpChain, NotChained
from ..chained import Chained, register_chain
from ..encoder_chain import EncoderChain, Parts, layer_norm_of
from ..nn import PackedBinaryEmbedding, PackedFP4Embedding, PackedInt8Embedding
from ..ops import binary_embedding_norm
from ..unchanged import has_hooks
from ._transformers_chain import ChainedAttention, Sequences, as_bool, attention_of

TABLES = (PackedBinaryEmbedding, PackedFP4Embedding, PackedInt8Embedding)


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
        if self.is_decoder or self.chunk_size_feed_forward or kwargs.get("cache") is not None:
            return self.plain.forward(self, hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)
        attention: Any = self.attention
        chained = not has_hooks(attention) and isinstance(attention, ChainedAttention)
        if chained and self.runs(hidden_states):
            masks = attention.masks(hidden_states, attention_mask)
            if masks is not None:
                layer: Any = self
                ready = EncoderChain((layer,), parts_of).prepare(hidden_states.shape[-1])
                if ready is not None:
                    return ready(hidden_states, *masks)
        return self.feed_forward_chunk(attention(hidden_states, attention_mask, **kwargs)[0])

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if not self.runs(attention_output):
            return self.plain.feed_forward_chunk(self, attention_output)
        return self.output.LayerNorm(self.chain(attention_output, attention_output))


def parts_of(layer: Any) -> Parts:
    return Parts(layer.attention, layer.attention.output.LayerNorm, layer, layer.output.LayerNorm)


def fits(layer: Any, config: Any) -> bool:
    """Whether nothing but chains and normalisations would be called in a layer."""
    attention: Any = layer.attention
    chained = isinstance(layer, Chained) and isinstance(attention, Chained)
    plain = not layer.is_decoder and not layer.chunk_size_feed_forward
    return chained and plain and attention.self.config is config


class BertEncoderMixin(Chained):
    """The encoder of BERT and its relatives: without padding inside, and in one op if all of it is chained."""

    layer: Any
    config: Any

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        if not all(isinstance(layer.attention, Chained) for layer in module.layer):
            raise NotChained("not all of its attention layers are chained")
        if not all(fits(layer, module.config) for layer in module.layer):
            return nn.Identity()
        chain = EncoderChain(module.layer, parts_of, called=module.layer)
        chain.implementation = module.config._attn_implementation
        return chain

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
        chain: Any = self.chain
        whole = isinstance(chain, EncoderChain) and chain.implementation == self.config._attn_implementation
        ready = chain.ready(x) if whole else None
        kept, left = self._kept(x, mask, ready is not None)
        if kept is None:
            if ready is None:
                return self.plain.forward(self, x, mask, *others, **kwargs)
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=ready(x, as_bool(left)))
        lengths = kept.sum(-1)
        rows = kept.flatten().nonzero().squeeze(-1)
        tokens = x.flatten(0, 1)[rows]
        if ready is None:
            output = self.plain.forward(self, tokens, Sequences(lengths, int(lengths.max())), *others, **kwargs)
        else:
            last = ready(tokens, None, lengths)
            output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)
        padded = torch.zeros_like(x)
        padded.flatten(0, 1)[rows] = output.last_hidden_state
        output.last_hidden_state = padded
        return output

    def _takes_rows(self, layer: Any, x: Tensor) -> bool:
        """Whether a layer computes rows without padding, and nobody sees that it does."""
        seen = layer.chunk_size_feed_forward or any(map(has_hooks, layer.modules()))
        return not seen and layer.attention.masks(x, None) is not None

    def _kept(self, x: Tensor, mask: Tensor | None, whole: bool) -> tuple[Tensor | None, Tensor | None]:
        """The tokens, bool [batch, n], that a padding mask keeps, or None to compute all, and the mask they need."""
        if mask is None or mask.dtype != torch.bool:
            return None, mask
        if not whole and not all(self._takes_rows(layer, x) for layer in self.layer):
            return None, mask
        kept = mask[:, 0, 0]
        if kept.shape != x.shape[:2] or not bool((mask == kept[:, None, None]).all()):
            return None, mask
        if bool(kept.all()):
            return None, None
        return (kept, None) if bool(kept.any(-1).all()) else (None, mask)


class BertEmbeddingsMixin(Chained):
    """The embeddings of BERT and its relatives, whose words are rows of a packed table: one op if they are bits, and
    otherwise the rows of the two other tables are added where those lie, and not to copies of them."""

    word_embeddings: Any
    token_type_embeddings: Any
    position_embeddings: Any
    LayerNorm: Any

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return isinstance(module.word_embeddings, TABLES)

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        for name in ("token_type_embeddings", "position_embeddings"):
            table = getattr(module, name)
            if type(table) is not nn.Embedding or table.max_norm is not None or table.weight.dtype != torch.float32:
                raise NotChained(f"its {name} are not rows of a plain float32 nn.Embedding")
        if bool(module.token_type_ids.any()):
            raise NotChained("its token types are not 0 where none are given")
        return nn.Identity()

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        tables = module.word_embeddings, module.token_type_embeddings, module.position_embeddings
        return *tables, module.dropout

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        types, positions = self.token_type_embeddings.weight, self.position_embeddings.weight
        if input_ids is not None and position_ids is None and self.runs(types, positions):
            whole = self._whole(input_ids, token_type_ids, types, positions, cache_length)
            if whole is not None:
                return whole
            own = positions[cache_length : cache_length + input_ids.shape[1]]
            words = self.word_embeddings(input_ids)
            if own.shape == words.shape[1:] and words.dtype == torch.float32:
                words += types[0] if token_type_ids is None else nn.functional.embedding(token_type_ids, types)
                return self.LayerNorm(words.add_(own))
        return self.plain.forward(self, input_ids, token_type_ids, position_ids, inputs_embeds, cache_length)

    def _whole(
        self, ids: Tensor, type_ids: Tensor | None, types: Tensor, positions: Tensor, first: int
    ) -> Tensor | None:
        """All in one op, or None where that does not fit."""
        words = self.word_embeddings
        norm = layer_norm_of(self.LayerNorm, types.shape[-1], (nn.LayerNorm,))
        if norm is None or not isinstance(words, PackedBinaryEmbedding) or words.scale.dtype != torch.float32:
            return None
        typed = type_ids is None or (type_ids.dtype == torch.int64 and type_ids.shape == ids.shape)
        if ids.dtype != torch.int64 or not typed or first + ids.shape[-1] > positions.shape[0]:
            return None
        return binary_embedding_norm(ids, *words.table(), types, type_ids, positions, first, norm)


@register_chain
class ChainedBertEmbeddings(BertEmbeddingsMixin, BertEmbeddings):
    plain = BertEmbeddings


@register_chain
class ChainedBertAttention(BertAttentionMixin, BertAttention):
    plain, self_attention = BertAttention, BertSelfAttention


@register_chain
class ChainedBertLayer(BertLayerMixin, BertLayer):
    plain = BertLayer


@register_chain
class ChainedBertEncoder(BertEncoderMixin, BertEncoder):
    plain = BertEncoder
