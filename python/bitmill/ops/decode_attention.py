# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token of a text, with the cache of keys and values, for inference.

With q, k, v the new token's heads and R the rotation of its place (RoFormer, Su et al., 2021, in halves as Llama's):

    keys[:, position] = R k,  values[:, position] = v
    out = softmax(scaling (R q) keys[:, :position + 1]^T) values[:, :position + 1]

where each key head serves as many query heads. One op, since a token is too little work for a dozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import check_tensor, require

library.define(
    "decode_attention",
    "(Tensor rows, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int position, float scaling) -> Tensor",
)


@library.default("decode_attention")
def _decode_attention_reference(
    rows: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int, scaling: float
) -> Tensor:
    heads = _check(rows, cos, sin, keys, values, position)
    key_heads, _, d = keys.shape
    turned, new_values = rows.view(-1, d).split((heads + key_heads, key_heads))
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    keys[:, position], values[:, position] = turned[heads:], new_values
    queries = turned[:heads].view(key_heads, -1, d)
    scores = queries @ keys[:, : position + 1].transpose(1, 2) * scaling
    return (scores.softmax(-1) @ values[:, : position + 1]).view(1, -1)


def _check(rows: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int) -> int:
    """Answers how many query heads there are."""
    op = "decode_attention"
    require(keys.dim() == 3, f"{op}: keys must have shape [key heads, capacity, d], got {list(keys.shape)}")
    key_heads, capacity, d = keys.shape
    require(
        key_heads > 0 and d > 0 and d % 2 == 0, f"{op}: keys must have heads of an even size, got {list(keys.shape)}"
    )
    width = rows.shape[-1]
    heads = width // d - 2 * key_heads
    require(
        width % d == 0 and heads > 0 and heads % key_heads == 0,
        f"{op}: rows must hold a multiple of {key_heads} queries, {key_heads} keys and {key_heads} values of {d}"
        f" columns, got {width} columns",
    )
    check_tensor(op, "rows", rows, torch.float32, [1, width], keys)
    check_tensor(op, "cos", cos, torch.float32, [d], keys)
    check_tensor(op, "sin", sin, torch.float32, [d], keys)
    check_tensor(op, "keys", keys, torch.float32, keys.shape, keys)
    check_tensor(op, "values", values, torch.float32, keys.shape, keys)
    for name, cache in (("keys", keys), ("values", values)):
        require(cache.is_contiguous(), f"{op}: {name} must be contiguous, since it is written in place")
    require(0 <= position < capacity, f"{op}: position must be between 0 and {capacity - 1}, got {position}")
    return heads


@torch.library.register_fake("bitmill::decode_attention")
def _(rows, cos, sin, keys, values, position, scaling):
    return rows.new_empty(1, _check(rows, cos, sin, keys, values, position) * keys.shape[-1])


def decode_attention(
    rows: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int, scaling: float
) -> Tensor:
    """The context of a new token; its keys and values are written into the cache.

    Args:
        rows: float32 [1, (heads + 2 key heads) d], the token's queries, keys and values, one head after another.
        cos, sin: float32 [d], of the token's place.
        keys, values: float32 [key heads, capacity, d], contiguous, of the tokens before; changed in place.
        position: of the token.
        scaling: of the scores.
    Returns:
        float32 [1, heads d].
    Raises:
        ValueError: for wrong shapes or dtypes, or a position outside of the cache.
    """
    return torch.ops.bitmill.decode_attention.default(rows, cos, sin, keys, values, position, scaling)
