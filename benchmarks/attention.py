# SPDX-License-Identifier: Apache-2.0
"""Variants of attention: an attention problem is m tokens, n = 2 x heads x tokens, k columns a head.

So m n k is what queries times keys and the map times values multiply together. q, k and v lie as a projection leaves
them, [batch, tokens, heads x k], and are seen as [batch, heads, tokens, k]; heads in excess of 12 are a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitmill.ops.binary_attention import _binary_attention_reference

from .runner import Case, Prepared, Unfit, Variant


def heads_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, before their signs."""
    heads, rest = divmod(case.n, 2 * case.m)
    if rest or heads == 0:
        raise Unfit("n must be 2 x heads x m")
    generator = torch.Generator().manual_seed(0)
    together = math.gcd(heads, 12)
    shape = (heads // together, case.m, together, case.k)
    flat = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return [t.transpose(1, 2) for t in flat]


def binary(
    name: str, rule: str, zero: str = "torch", dtype: torch.dtype = torch.float32, padded: bool = False
) -> Variant:
    """The op, against its default kernel; `padded` drops the last quarter of the keys."""

    def build(case: Case) -> Prepared:
        q, k, v = heads_of(case, dtype)
        keep = torch.arange(case.m) < case.m - case.m // 4
        mask = keep.expand(1, 1, case.m, case.m) if padded else None
        alphas = (torch.tensor(a) for a in (0.9, 1.1, 0.7, 4 / case.m))
        steps = tuple(alphas) if rule == "elastic" else (None,) * 4
        arguments = (q, k, v, mask, rule, None, 0.25, zero, *steps)
        expected = _binary_attention_reference(*arguments)
        call = torch.ops.bitmill.binary_attention.default
        return Prepared(lambda: call(*arguments), expected, 0.0, 3 * q.nbytes, 0, None, "popcount")

    return Variant(name, build)


def torch_attention(dtype: torch.dtype, baseline: str) -> Variant:
    def build(case: Case) -> Prepared:
        q, k, v = heads_of(case, dtype)
        scores = q.double() @ k.double().mT / case.k**0.5
        expected = torch.softmax(scores, -1) @ v.double()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        call = scaled_dot_product_attention
        return Prepared(lambda: call(q, k, v), expected, tolerance, 3 * q.nbytes, 0, None, baseline)

    return Variant(f"torch {baseline}", build, "torch", baseline)


ATTENTION = (
    binary("bool", "bool"),
    binary("bool, zero=plus", "bool", "plus"),
    binary("bool, bfloat16", "bool", dtype=torch.bfloat16),
    binary("bool, a quarter padded", "bool", padded=True),
    binary("softmax_aware", "softmax_aware"),
    binary("elastic", "elastic"),
    torch_attention(torch.float32, "fp32"),
    torch_attention(torch.bfloat16, "bf16"),
)
