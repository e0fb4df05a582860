# SPDX-License-Identifier: Apache-2.0
"""stories260K: a LLaMA-architecture language model in plain torch, and the loader of its llama2.c file.

The seven matrices of each layer are ordinary `nn.Linear`s without bias, so `bitmill.quantize_` finds them as it
would in any model. The output head is tied to the embedding and is computed with `F.linear` on the embedding's
own weight: there is no eighth linear layer that could be quantised apart from the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitmill.demo import DATA

BOS = 1
_HEADER_INTS = 7


@dataclass(frozen=True)
class StoriesConfig:
    """Sizes in the order of the llama2.c header; the defaults are those of stories260K."""

    dim: int = 64
    hidden: int = 172
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 512
    context: int = 512

    def __post_init__(self) -> None:
        sizes = (self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.context)
        if min(sizes) < 1 or self.dim % self.heads or self.heads % self.kv_heads or (self.dim // self.heads) % 2:
            raise ValueError(
                "StoriesConfig: expected positive sizes, dim divisible by heads into an even head size, and heads "
                f"divisible by kv_heads, got dim={self.dim}, hidden={self.hidden}, layers={self.layers}, "
                f"heads={self.heads}, kv_heads={self.kv_heads}, vocab={self.vocab}, context={self.context}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class KVCache:
    """Keys and values [b, kv_heads, seen, head_dim] per layer. Keys are stored after RoPE, so they never change."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self._layers[0][0].shape[2] if self._layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self._layers[layer] = (k, v)
        return k, v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [b, heads, t, head_dim] with cos, sin [t, head_dim/2].

    llama2.c rotates the neighbours (2i, 2i+1); Hugging Face checkpoints rotate (i, i + head_dim/2) instead.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    """One transformer layer: pre-norm grouped-query attention, then a pre-norm SwiGLU feed-forward."""

    def __init__(self, config: StoriesConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        dim, kv_dim = config.dim, config.kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_dim, bias=False)
        self.wv = nn.Linear(dim, kv_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.w1 = nn.Linear(dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        c = self.config
        b, t, _ = x.shape
        h = self.attention_norm(x)
        q = self.wq(h).view(b, t, c.heads, c.head_dim).transpose(1, 2)
        k = self.wk(h).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.wv(h).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        seen = k.shape[2]
        k = k.repeat_interleave(c.heads // c.kv_heads, dim=1)
        v = v.repeat_interleave(c.heads // c.kv_heads, dim=1)
        if seen == t:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            # is_causal aligns its triangle with the first key, but the new queries are the last positions.
            mask = torch.ones(t, seen, dtype=torch.bool, device=x.device).tril(seen - t)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.wo(a.transpose(1, 2).reshape(b, t, c.dim))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Stories(nn.Module):
    """ids [b, t] -> logits [b, t, vocab]. `Stories()` holds random weights, ready for `bitmill.load`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: StoriesConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or StoriesConfig()
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        rate = 10000.0 ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angle = torch.outer(torch.arange(config.context, dtype=torch.float64), rate)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        start = 0 if cache is None else len(cache)
        end = start + ids.shape[1]
        if end > self.config.context:
            raise ValueError(f"Stories: ids must fit the context of {self.config.context} tokens, got {end}")
        x = self.embedding(ids)
        cos, sin = self.cos[start:end], self.sin[start:end]
        for block in self.layers:
            x = block(x, cos, sin, cache)
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.no_grad()
    def generate(self, ids: list[int], new: int, stop: Callable[[list[int]], bool] | None = None) -> list[int]:
        """Greedy continuation: returns ids plus up to `new` tokens, fewer when `stop` accepts the ids so far."""
        ids, cache, fresh = list(ids), KVCache(), list(ids)
        for _ in range(new):
            logits = self(torch.tensor([fresh], device=self.embedding.weight.device), cache)
            fresh = [int(logits[0, -1].argmax())]
            ids += fresh
            if stop is not None and stop(ids):
                break
        return ids


def _read(path: Path) -> tuple[StoriesConfig, np.ndarray]:
    """Header and float32 body of a llama2.c "version 0" file with a tied head; one ValueError for anything else."""
    size = path.stat().st_size
    if size < 4 * _HEADER_INTS:
        raise ValueError(f"{path}: expected a llama2.c header of {4 * _HEADER_INTS} bytes, got a file of {size}")
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * _HEADER_INTS), dtype="<i4")
        try:
            # A negative vocabulary is llama2.c's mark of an untied head, which this model does not have.
            config = StoriesConfig(*(int(value) for value in header))
        except ValueError as error:
            raise ValueError(f"{path}: not a llama2.c version 0 checkpoint with a tied head: {error}") from None
        # After the weights the file holds llama2.c's own RoPE tables, context * head_dim floats that nobody needs.
        floats = sum(math.prod(shape) for _, shape in _tensors(config)) + config.context * config.head_dim
        expected = 4 * (_HEADER_INTS + floats)
        if size != expected:
            raise ValueError(f"{path}: its header asks for a file of {expected} bytes, got {size}; copy the file again")
        body = np.frombuffer(file.read(), dtype="<f4")
    return config, body


def _tensors(c: StoriesConfig) -> list[tuple[str, tuple[int, ...]]]:
    """(name in each layer or in the model, shape in the file), in the order of the file."""
    kv_dim = c.kv_heads * c.head_dim
    return [
        ("embedding", (c.vocab, c.dim)),
        ("attention_norm", (c.layers, c.dim)),
        ("wq", (c.layers, c.dim, c.dim)),
        ("wk", (c.layers, kv_dim, c.dim)),
        ("wv", (c.layers, kv_dim, c.dim)),
        ("wo", (c.layers, c.dim, c.dim)),
        ("ffn_norm", (c.layers, c.dim)),
        ("w1", (c.layers, c.hidden, c.dim)),
        ("w2", (c.layers, c.dim, c.hidden)),
        ("w3", (c.layers, c.hidden, c.dim)),
        ("norm", (c.dim,)),
    ]


def load_stories(path: str | PathLike[str] | None = None) -> Stories:
    """The pretrained model in eval mode, from `path` or from the package's own stories260K.bin."""
    config, body = _read(Path(path) if path is not None else DATA / "stories260K.bin")
    state, offset = {}, 0
    for name, shape in _tensors(config):
        count = math.prod(shape)
        tensor = torch.from_numpy(body[offset : offset + count].astype(np.float32).reshape(shape))
        offset += count
        if name in ("embedding", "norm"):
            state[f"{name}.weight"] = tensor
        else:
            state.update({f"layers.{i}.{name}.weight": tensor[i] for i in range(config.layers)})
    model = Stories(config)
    model.load_state_dict(state)
    return model.eval()
