# SPDX-License-Identifier: Apache-2.0
"""Text from a causal language model of transformers, token by token, with a key-value cache.

A packed layer answers one token in microseconds, and the Python around it takes several times as long. So the blocks of
Llama and its like are walked here with a third of the calls: the same modules, and a cache that is written in place.
Other models run as transformers has them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel

LEAN = ("llama", "mistral", "qwen2")  # model types whose blocks are all like Llama's


class _Block(NamedTuple):
    """The modules of a decoder block, and its part of the cache: keys and values [key heads, capacity, head_dim]."""

    norm: Any
    query: Any
    key: Any
    value: Any
    output: Any
    mlp_norm: Any
    gate: Any
    up: Any
    down: Any
    activation: Any
    keys: Tensor
    values: Tensor


class _Walk:
    """A model of `LEAN` and the cache of one text: a prompt first, then token after token."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.model, self.body, config = model, model.model, model.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        attention = self.body.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        shape = (len(self.body.layers), 2, self.key_heads, capacity, self.head_dim)
        cache = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.blocks = [
            _Block(
                norm=block.input_layernorm,
                query=block.self_attn.q_proj,
                key=block.self_attn.k_proj,
                value=block.self_attn.v_proj,
                output=block.self_attn.o_proj,
                mlp_norm=block.post_attention_layernorm,
                gate=block.mlp.gate_proj,
                up=block.mlp.up_proj,
                down=block.mlp.down_proj,
                activation=block.mlp.act_fn,
                keys=keys,
                values=values,
            )
            for block, (keys, values) in zip(self.body.layers, cache, strict=True)
        ]
        self.length = 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [1, vocabulary] after ids int64 [1, m]: a prompt where the cache is empty, otherwise one token."""
        start, self.length = self.length, self.length + ids.shape[1]
        hidden = self.body.embed_tokens(ids)[0]
        places = torch.arange(start, self.length, device=ids.device).unsqueeze(0)
        cos, sin = (table[0].unsqueeze(1) for table in self.body.rotary_emb(hidden, places))  # [m, 1, head_dim]
        half = self.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # for halves that have changed places
        for block in self.blocks:
            x = _normalised(block.norm, hidden)
            joined = torch.cat((block.query(x), block.key(x)), 1).unflatten(1, (-1, self.head_dim))
            turned = torch.addcmul(joined * cos, joined.roll(half, 2), sin)
            block.keys[:, start : self.length] = turned[:, self.heads :].transpose(0, 1)
            block.values[:, start : self.length] = block.value(x).unflatten(1, (-1, self.head_dim)).transpose(0, 1)
            hidden = hidden + block.output(self._attend(turned[:, : self.heads], block))
            x = _normalised(block.mlp_norm, hidden)
            hidden = hidden + block.down(block.activation(block.gate(x)) * block.up(x))
        return self.model.lm_head(_normalised(self.body.norm, hidden[-1:]))

    def _attend(self, queries: Tensor, block: _Block) -> Tensor:
        """Context [m, heads head_dim] of queries [m, heads, head_dim]."""
        keys, values = block.keys[:, : self.length], block.values[:, : self.length]
        if len(queries) == 1:  # the queries that share a key head are rows of one product
            rows = queries.view(self.key_heads, -1, self.head_dim) * self.scaling
            return ((rows @ keys.transpose(1, 2)).softmax(-1) @ values).view(1, -1)
        context = scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            is_causal=True,
            scale=self.scaling,
            enable_gqa=True,
        )
        return context[0].transpose(0, 1).flatten(1)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm as Llama's module has it, in fewer calls."""
    values = x.float()
    scale = values.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return norm.weight * (values * scale).to(x.dtype)


class Decoder:
    """A model in the middle of a text.

    Args:
        model: in eval mode.
        capacity: the most tokens that the text will have.
        lean: walk the blocks here, without hooks; None where that is possible.
    Raises:
        ValueError: for a capacity that the model does not have, or one that is not of `LEAN` with lean=True.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, lean: bool | None = None) -> None:
        most = getattr(model.config, "max_position_embeddings", capacity)
        if not 1 <= capacity <= most:
            raise ValueError(f"Decoder: the text must have from 1 to {most} tokens, got {capacity}; take a shorter one")
        self.model = model
        possible = model.config.model_type in LEAN and getattr(model.config, "sliding_window", None) is None
        if lean and not possible:
            raise ValueError(
                f"Decoder: lean must be None or False for a model of type {model.config.model_type}, or with a sliding"
                f" window, got True; it is for {', '.join(LEAN)}"
            )
        self._walk = _Walk(model, capacity) if possible and lean is not False else None
        self._named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def _logits(self, ids: Tensor) -> Tensor:
        if self._walk is not None:
            return self._walk(ids)
        options = {self._named: self._cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(input_ids=ids, **options).logits[:, -1]

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Begin with a prompt, int64 [1, tokens]; answers the logits of the token after it, [1, vocabulary]."""
        if self._walk is not None:
            self._walk.length = 0
        else:
            self._cache: Any = DynamicCache(config=self.model.config)
        return self._logits(ids)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Read one more token, int64 [1, 1]; answers the logits of the next, [1, vocabulary]."""
        return self._logits(ids)


def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    lean: bool | None = None,
) -> Iterator[int]:
    """Continue a prompt, int64 [1, length], by up to `tokens` tokens; it ends before an end-of-text token.

    Args:
        temperature: 0 takes the likeliest token, more draws from softmax(logits / temperature).
        seed: of the draws.
        lean: of `Decoder`.
    Raises:
        ValueError: for an empty prompt, a temperature < 0, or a text that is too long for the model.
    """
    if prompt.dim() != 2 or prompt.shape[0] != 1 or not prompt.numel():
        raise ValueError(f"generate: prompt must have shape [1, length], length > 0, got {list(prompt.shape)}")
    if not temperature >= 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    decoder = Decoder(model, prompt.shape[1] + tokens, lean)
    logits = decoder.prefill(prompt)
    for count in range(tokens):
        if temperature:
            token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        if token.item() in _ends(model):
            return
        yield int(token)
        if count + 1 < tokens:
            logits = decoder.step(token)


def _ends(model: PreTrainedModel) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
