# SPDX-License-Identifier: Apache-2.0
"""Text from a causal language model of transformers, token by token, with a key-value cache.

A packed layer answers one token in microseconds, and the Python around it takes several times as long. So the blocks of
Llama and its like are walked here with a third of the calls: the same modules, and a cache that is written in place.
Other models run as transformers has them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..nn import PackedSalientLinear
from ..ops import decode_attention, prompt_attention
from .transformers import PreTrainedModel, transformers

LEAN = ("llama", "mistral", "qwen2")  # model types whose blocks are all like Llama's


class _Norm:
    """RMSNorm of Llama's kind in few calls: x rsqrt(sum x^2 + n eps), times sqrt(n) weight."""

    def __init__(self, norm: Any) -> None:
        n = norm.weight.numel()
        self.eps, self.weight = n * norm.variance_epsilon, norm.weight.detach().float() * n**0.5

    def __call__(self, x: Tensor) -> Tensor:
        values = x if x.dtype == torch.float32 else x.float()
        scale = (values * values).sum(-1, keepdim=True).add_(self.eps).rsqrt_()
        normalised = (values * scale).mul_(self.weight)
        return normalised if x.dtype == torch.float32 else normalised.to(x.dtype)


Rows = Callable[[Tensor], Tensor]


def _side_by_side(layers: list[Any]) -> Rows:
    """Rows of x to the outputs of all layers, one after another; in one product where they can be joined."""
    if all(isinstance(layer, PackedSalientLinear) for layer in layers):
        whole = PackedSalientLinear.joined(layers) if len(layers) > 1 else layers[0]
        if whole is not None:
            return whole.bound()
    return layers[0] if len(layers) == 1 else lambda x: torch.cat([layer(x) for layer in layers], 1)


class _Block(NamedTuple):
    """A decoder block in pieces, and its part of the cache: keys and values [key heads, capacity, head_dim]."""

    norm: Rows
    projections: Rows  # queries, keys, values
    output: Rows
    mlp_norm: Rows
    widen: Rows  # gate, up
    activation: Rows
    down: Rows
    keys: Tensor
    values: Tensor


class _Walk:
    """A model of `LEAN` and the cache of one text: a prompt first, then token after token."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.body, self.head, config = model.model, model.lm_head, model.config
        self.norm = _Norm(self.body.norm)
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        attention = self.body.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        shape = (len(self.body.layers), 2, self.key_heads, capacity, self.head_dim)
        cache = torch.zeros(shape, dtype=self.body.norm.weight.dtype, device=model.device)
        self.blocks = [
            _Block(
                norm=_Norm(block.input_layernorm),
                projections=_side_by_side([getattr(block.self_attn, f"{name}_proj") for name in "qkv"]),
                output=_side_by_side([block.self_attn.o_proj]),
                mlp_norm=_Norm(block.post_attention_layernorm),
                widen=_side_by_side([block.mlp.gate_proj, block.mlp.up_proj]),
                activation=block.mlp.act_fn,
                down=_side_by_side([block.mlp.down_proj]),
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
        attend = self._attention(start, *(table[0] for table in self.body.rotary_emb(hidden, places)))
        for block in self.blocks:
            hidden = hidden + block.output(attend(block.projections(block.norm(hidden)), block))
            gate, up = block.widen(block.mlp_norm(hidden)).chunk(2, 1)
            hidden = hidden + block.down(block.activation(gate) * up)
        return self.head(self.norm(hidden[-1:]))

    def _attention(self, start: int, cos: Tensor, sin: Tensor) -> Callable[[Tensor, _Block], Tensor]:
        """From a block's queries, keys and values [m, width] at places from `start` on to the context [m, width].

        cos, sin [m, head_dim]: of the places.
        """
        if len(cos) == 1 and cos.dtype == torch.float32:
            turn = cos[0], sin[0]
            return lambda rows, block: decode_attention(rows, *turn, block.keys, block.values, start, self.scaling)
        if cos.dtype == torch.float32 and cos.device.type == "cpu":
            return lambda rows, block: prompt_attention(
                rows.contiguous(), cos, sin, block.keys, block.values, start, self.scaling
            )
        cos, half, turning = cos.unsqueeze(1), self.head_dim // 2, self.heads + self.key_heads
        sin = torch.cat((-sin[:, :half], sin[:, half:]), 1).unsqueeze(1)  # for halves that have changed places

        def attend(rows: Tensor, block: _Block) -> Tensor:
            heads = rows.unflatten(1, (-1, self.head_dim))
            turned = torch.addcmul(heads[:, :turning] * cos, heads[:, :turning].roll(half, 2), sin)
            block.keys[:, start : self.length] = turned[:, self.heads :].transpose(0, 1)
            block.values[:, start : self.length] = heads[:, turning:].transpose(0, 1)
            context = scaled_dot_product_attention(
                turned[:, : self.heads].transpose(0, 1).unsqueeze(0),
                block.keys[:, : self.length].unsqueeze(0),
                block.values[:, : self.length].unsqueeze(0),
                is_causal=len(rows) > 1,
                scale=self.scaling,
                enable_gqa=True,
            )
            return context[0].transpose(0, 1).flatten(1)

        return attend


class Decoder:
    """A model in the middle of a text.

    Args:
        model: in eval mode.
        capacity: the most tokens that the text will have.
        lean: walk the blocks here, without hooks, and with packed layers joined that share their input; None where that
            is possible.
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
            self._cache: Any = transformers.DynamicCache(config=self.model.config)
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
        ValueError: for an empty prompt, fewer than no tokens, a temperature below 1e-4 that is not 0, or a text that is
            too long for the model.
    """
    if prompt.dim() != 2 or prompt.shape[0] != 1 or not prompt.numel():
        raise ValueError(f"generate: prompt must have shape [1, length], length > 0, got {list(prompt.shape)}")
    if tokens < 0:
        raise ValueError(f"generate: tokens must be at least 0, got {tokens}")
    if temperature != 0 and not temperature >= 1e-4:  # below, quotients may be infinite
        raise ValueError(f"generate: temperature must be 0 or at least 0.0001, got {temperature}")
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
