# SPDX-License-Identifier: Apache-2.0
"""Text from a causal language model of transformers, token by token, with a key-value cache.

A packed layer takes microseconds where the Python around it takes as long, so the step can be compiled: one graph of
the whole model on a cache of fixed size, in which only the layers' own time remains.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache


class Decoder:
    """A model in the middle of a text.

    Args:
        model: in eval mode.
        capacity: the most tokens that the text will have.
        compiled: compile the step (once, when the first one is made: about a minute and a C++ compiler).
    Raises:
        ValueError: for a capacity that the model does not have.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, compiled: bool = False) -> None:
        most = getattr(model.config, "max_position_embeddings", capacity)
        if not 1 <= capacity <= most:
            raise ValueError(f"Decoder: the text must have from 1 to {most} tokens, got {capacity}; take a shorter one")
        self.model = model
        self.static = StaticCache(config=model.config, max_cache_len=capacity) if compiled else None
        self._named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._step = torch.compile(self._logits, fullgraph=True, dynamic=False) if compiled else self._logits
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        if self.static is not None:
            with torch.inference_mode():  # its tensors were made in it
                self.static.reset()
        self.cache: Any = self.static or DynamicCache(config=self.model.config)

    def _logits(self, ids: Tensor) -> Tensor:
        options = {self._named: self.cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(input_ids=ids, **options).logits[:, -1]

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Read a prompt, int64 [1, tokens]; answers the logits of the token after it, [1, vocabulary]."""
        return self._logits(ids)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Read one more token, int64 [1, 1]; answers the logits of the next, [1, vocabulary]."""
        return self._step(ids)


def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    compiled: bool = False,
) -> Iterator[int]:
    """Continue a prompt, int64 [1, length], by up to `tokens` tokens; it ends before an end-of-text token.

    Args:
        temperature: 0 takes the likeliest token, more draws from softmax(logits / temperature).
        seed: of the draws.
        compiled: of `Decoder`.
    Raises:
        ValueError: for an empty prompt, a temperature < 0, or a text that is too long for the model.
    """
    if prompt.dim() != 2 or prompt.shape[0] != 1 or not prompt.numel():
        raise ValueError(f"generate: prompt must have shape [1, length], length > 0, got {list(prompt.shape)}")
    if not temperature >= 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    decoder = Decoder(model, prompt.shape[1] + tokens, compiled)
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
