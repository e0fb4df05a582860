# SPDX-License-Identifier: Apache-2.0
"""What the chains (`bitmill.chain`) of transformers' models share: when one runs, and on what."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..chain import Attention, NotChained
from ..chained import Chained
from ..nn import BinaryAttention
from .transformers import CHILD, PREFIX, chained_kind


class Sequences(NamedTuple):
    """Instead of a mask: rows of a batch without its padding."""

    lengths: Tensor  # int64 [sequences]
    longest: int


def attention_of(module: Any, head_dim: int) -> Attention:
    """The rule of a host's attention layer.

    Raises:
        NotChained: if it is not one of bits.
    """
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


def as_bool(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.is_floating_point() else mask.bool()


class ChainedAttention(Chained):
    """What BERT's and ViT's attention share: when the chain runs, and on what."""

    implementation: str

    def layer(self) -> Any:
        """The module that has the config."""
        return self

    def implemented(self) -> bool:
        """Whether the host's attention is still the one that the chain was planned for."""
        return self.layer().config._attn_implementation == self.chain.implementation

    def masks(self, x: Tensor, mask: Any) -> tuple[Tensor | None, Tensor | None] | None:
        """The mask and the lengths that the chain takes, or None if the layers are to compute one by one."""
        sequences = mask if isinstance(mask, Sequences) else None
        most = x.shape[-2] if sequences is None else sequences.longest
        if not self.implemented() or most > self.chain.most_keys or not self.runs(x):
            return None
        return (as_bool(mask), None) if sequences is None else (None, sequences.lengths)

    def attend(self, x: Tensor, mask: Any, residual: Tensor | None = None) -> Tensor | None:
        """The result of the output projection, a residual added, or None if the layers are to compute one by one."""
        masks = self.masks(x, mask)
        return None if masks is None else self.chain(x, *masks, residual)
