# SPDX-License-Identifier: Apache-2.0
"""Attention of the new tokens of a text, with the cache of keys and values, for inference.

With q, k, v the heads of the token at a position and R the rotation of its place (RoFormer, Su et al., 2021, in halves
as Llama's):

    keys[:, position] = R k,  values[:, position] = v
    out = softmax(scaling (R q) keys[:, :position + 1]^T) values[:, :position + 1]

where each key head serves as many query heads. One op each for a token, which is too little work for a dozen, and for a
prompt, whose scores past a token's own position are not computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import check_tensor, require

_SCHEMA = (
    "(Tensor rows, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int position, float scaling) -> Tensor"
)
library.define("decode_attention", _SCHEMA)
library.define("prompt_attention", _SCHEMA)


@library.default("decode_attention")
def _decode_attention_reference(
    rows: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int, scaling: float
) -> Tensor:
    heads = _check("decode_attention", rows, cos, sin, keys, values, position)
    return _attend(rows, heads, cos.unsqueeze(0), sin.unsqueeze(0), keys, values, position, scaling)


@library.default("prompt_attention")
def _prompt_attention_reference(
    rows: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int, scaling: float
) -> Tensor:
    heads = _check("prompt_attention", rows, cos, sin, keys, values, position)
    return _attend(rows, heads, cos, sin, keys, values, position, scaling)


def _attend(
    rows: Tensor, heads: int, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int, scaling: float
) -> Tensor:
    (key_heads, _, d), m, end = keys.shape, len(rows), position + len(rows)
    turned, new_values = rows.unflatten(1, (-1, d)).split((heads + key_heads, key_heads), 1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    keys[:, position:end], values[:, position:end] = turned[:, heads:].transpose(0, 1), new_values.transpose(0, 1)
    queries = turned[:, :heads].unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3)  # [key heads, shared, m, d]
    scores = queries @ keys[:, None, :end].mT * scaling
    later = torch.ones(m, end, dtype=torch.bool, device=rows.device).triu(position + 1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ values[:, None, :end]).permute(2, 0, 1, 3).reshape(m, heads * d)


def _check(op: str, rows: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int) -> int:
    """Answers how many query heads there are."""
    require(keys.dim() == 3, f"{op}: keys must have shape [key heads, capacity, d], got {list(keys.shape)}")
    key_heads, capacity, d = keys.shape
    require(
        key_heads > 0 and d > 0 and d % 2 == 0, f"{op}: keys must have heads of an even size, got {list(keys.shape)}"
    )
    width = rows.shape[-1] if rows.dim() else 0
    heads = width // d - 2 * key_heads
    require(
        width % d == 0 and heads > 0 and heads % key_heads == 0,
        f"{op}: rows must hold a multiple of {key_heads} queries, {key_heads} keys and {key_heads} values of {d}"
        f" columns, got {width} columns",
    )
    single = op == "decode_attention"
    m = 1 if single else rows.shape[0]
    check_tensor(op, "rows", rows, torch.float32, [m, width], keys)
    check_tensor(op, "cos", cos, torch.float32, [d] if single else [m, d], keys)
    check_tensor(op, "sin", sin, torch.float32, [d] if single else [m, d], keys)
    check_tensor(op, "keys", keys, torch.float32, keys.shape, keys)
    check_tensor(op, "values", values, torch.float32, keys.shape, keys)
    for name, cache in (("keys", keys), ("values", values)):
        require(cache.is_contiguous(), f"{op}: {name} must be contiguous, since it is written in place")
    require(0 <= position <= capacity - m, f"{op}: position must be between 0 and {capacity - m}, got {position}")
    return heads


@torch.library.register_fake("bitmill::decode_attention")
def _(rows, cos, sin, keys, values, position, scaling):
    heads = _check("decode_attention", rows, cos, sin, keys, values, position)
    return rows.new_empty(1, heads * keys.shape[-1])


@torch.library.register_fake("bitmill::prompt_attention")
def _(rows, cos, sin, keys, values, position, scaling):
    heads = _check("prompt_attention", rows, cos, sin, keys, values, position)
    return rows.new_empty(rows.shape[0], heads * keys.shape[-1])


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


def prompt_attention(
    rows: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int, scaling: float
) -> Tensor:
    """The contexts of new tokens, each of which sees those before it; their keys and values are written into the cache.

    Args:
        rows: float32 [m, (heads + 2 key heads) d], each token's queries, keys and values, one head after another.
        cos, sin: float32 [m, d], of the tokens' places.
        keys, values: float32 [key heads, capacity, d], contiguous, of the tokens before; changed in place.
        position: of the first new token.
        scaling: of the scores.
    Returns:
        float32 [m, heads d].
    Raises:
        ValueError: for wrong shapes or dtypes, or positions outside of the cache.
    """
    return torch.ops.bitmill.prompt_attention.default(rows, cos, sin, keys, values, position, scaling)
