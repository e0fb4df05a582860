# SPDX-License-Identifier: Apache-2.0
"""Binary attention in a chain: packed rows of q, k and v in, the packed rows of the output projection out.

The integers are those of `binary_attention`; what each channel of the context becomes in the next layer is a range of
integers (`bit_ranges`), so the context is never a float. Sequences of different lengths lie one after another, without
padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library as library
from ._checks import MAX_COLUMNS, check_tensor, require
from .binary_attention import check_mask, check_rule, chosen_keys, whole_context
from .binary_bits import bits_in_ranges
from .bitpack import _unpack_bits

library.define(
    "binary_attention_bits",
    "(Tensor q, Tensor k, Tensor v, Tensor? q_nonzero, Tensor? k_nonzero, Tensor? v_nonzero, Tensor? mask,"
    " Tensor? lengths, int heads, Tensor positive, Tensor? negative, str rule, float? scaling, float beta,"
    " Tensor? alpha_q, Tensor? alpha_k, Tensor? alpha_a) -> (Tensor sign, Tensor nonzero)",
)


def _heads(sign: Tensor, nonzero: Tensor | None, heads: int) -> Tensor:
    """Levels -1, 0, +1, float32 [sequences, heads, n, d], of packed rows [sequences, n, words]."""
    columns = 32 * sign.shape[-1]
    levels = 2 * _unpack_bits(sign, columns).float() - 1
    levels = levels if nonzero is None else levels * _unpack_bits(nonzero, columns)
    return levels.unflatten(-1, (heads, columns // heads)).transpose(1, 2)


@library.default("binary_attention_bits")
def _binary_attention_bits_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_nonzero: Tensor | None,
    k_nonzero: Tensor | None,
    v_nonzero: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    heads: int,
    positive: Tensor,
    negative: Tensor | None,
    rule: str,
    scaling: float | None,
    beta: float,
    alpha_q: Tensor | None,
    alpha_k: Tensor | None,
    alpha_a: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check(
        q, k, v, q_nonzero, k_nonzero, v_nonzero, mask, lengths, heads, positive, negative, rule, scaling, beta,
        alpha_q, alpha_k, alpha_a,
    )  # fmt: skip
    query, key, value = (
        _heads(sign if lengths is None else sign.unsqueeze(0), nonzero, heads)
        for sign, nonzero in ((q, q_nonzero), (k, k_nonzero), (v, v_nonzero))
    )
    counts = [q.shape[-2]] if lengths is None else _counts(lengths, q.shape[0])
    pieces = [(query, key, value)]
    if lengths is not None:
        pieces = list(zip(*(t.split(counts, dim=2) for t in (query, key, value)), strict=True))
    contexts = [
        whole_context(chosen_keys(query, key, mask, rule, scaling, beta, alpha_q, alpha_k, alpha_a), value)
        for query, key, value in pieces
    ]
    whole = [context.transpose(1, 2).flatten(2).to(torch.int32) for context in contexts]
    rows = whole[0] if lengths is None else torch.cat([w[0] for w in whole] or [positive.new_empty(0, v.shape[1] * 32)])
    return bits_in_ranges(rows, positive, negative)


def _counts(lengths: Tensor, rows: int) -> list[int]:
    counts = lengths.tolist()
    require(
        all(count >= 0 for count in counts) and sum(counts) == rows,
        f"binary_attention_bits: lengths must be at least 0 and add up to the {rows} rows of q, got {counts}",
    )
    return counts


def _check(
    q, k, v, q_nonzero, k_nonzero, v_nonzero, mask, lengths, heads, positive, negative, rule, scaling, beta,
    alpha_q, alpha_k, alpha_a,
) -> None:  # fmt: skip
    op = "binary_attention_bits"
    require(heads >= 1, f"{op}: heads must be at least 1, got {heads}")
    require(lengths is None or mask is None, f"{op}: mask and lengths exclude each other, got both")
    dims, shape = (3, "[sequences, n, words]") if lengths is None else (2, "[rows, words] with lengths")
    require(q.dim() == dims, f"{op}: q must have shape {shape}, got {list(q.shape)}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        require(t.dim() == dims, f"{op}: {name} must have {dims} dimensions like q, got shape {list(t.shape)}")
        words = t.shape[-1]
        require(
            words > 0 and words % heads == 0,
            f"{op}: {name} must have a positive multiple of heads = {heads} words a row, got {words}",
        )
    rows = list(k.shape[:-1]) if lengths is None else [q.shape[0]]
    rows[0] = q.shape[0]
    check_tensor(op, "q", q, torch.int32, q.shape, q)
    check_tensor(op, "k", k, torch.int32, [*rows, q.shape[-1]], q)
    check_tensor(op, "v", v, torch.int32, [*rows, v.shape[-1]], q)
    for name, t, like in (("q_nonzero", q_nonzero, q), ("k_nonzero", k_nonzero, k), ("v_nonzero", v_nonzero, v)):
        check_tensor(op, name, t, torch.int32, like.shape, q)
    if lengths is not None:
        require(lengths.dim() == 1, f"{op}: lengths must have shape [sequences], got {list(lengths.shape)}")
        check_tensor(op, "lengths", lengths, torch.int64, lengths.shape, q)
    d, m = 32 * q.shape[-1] // heads, k.shape[-2]
    require(max(d, m) <= MAX_COLUMNS, f"{op}: d and m must be at most {MAX_COLUMNS}, got {d} and {m}")
    check_rule(op, q, rule, scaling, beta, alpha_q=alpha_q, alpha_k=alpha_k, alpha_a=alpha_a)
    for name, t in (("positive", positive), ("negative", negative)):
        check_tensor(op, name, t, torch.int32, [2, 32 * v.shape[-1]], q)
    if mask is not None:
        check_mask(op, q, mask, [q.shape[0], heads, q.shape[1], m])


@torch.library.register_fake("bitmill::binary_attention_bits")
def _(
    q, k, v, q_nonzero, k_nonzero, v_nonzero, mask, lengths, heads, positive, negative, rule, scaling, beta,
    alpha_q, alpha_k, alpha_a,
):  # fmt: skip
    _check(
        q, k, v, q_nonzero, k_nonzero, v_nonzero, mask, lengths, heads, positive, negative, rule, scaling, beta,
        alpha_q, alpha_k, alpha_a,
    )  # fmt: skip
    sign = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return sign, q.new_empty(0) if negative is None else torch.empty_like(sign)


def binary_attention_bits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    heads: int,
    q_nonzero: Tensor | None = None,
    k_nonzero: Tensor | None = None,
    v_nonzero: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    rule: str = "bool",
    scaling: float | None = None,
    beta: float = 0.25,
    alpha_q: Tensor | None = None,
    alpha_k: Tensor | None = None,
    alpha_a: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary attention from packed rows to packed rows, for inference.

    Args:
        q, k, v: signs, int32 [sequences, n, heads * d / 32], [sequences, m, heads * d / 32] and [sequences, m,
            heads * e / 32], the heads side by side; d and e are multiples of 32. With `lengths` [rows, words], the
            sequences one after another.
        positive, negative: int32 [2, heads * e], as in `binary_matmul_bits`, of the whole numbers A sgn(v).
        heads: how many.
        q_nonzero, k_nonzero, v_nonzero: like q, k and v; None where nothing is 0.
        mask: bool or float, broadcastable to [sequences, heads, n, m], or None.
        lengths: int64 [sequences], rows of each sequence, or None; not with a mask.
        rule, scaling, beta, alpha_q, alpha_k, alpha_a: those of `binary_attention`.
    Returns:
        sign int32 [sequences, n, heads * e / 32] (or [rows, ...]), and nonzero likewise, or empty without `negative`.
    Raises:
        ValueError: for wrong shapes, dtypes, devices or names.
    """
    return torch.ops.bitmill.binary_attention_bits.default(
        q, k, v, q_nonzero, k_nonzero, v_nonzero, mask, lengths, heads, positive, negative, rule, scaling, beta,
        alpha_q, alpha_k, alpha_a,
    )  # fmt: skip
