# SPDX-License-Identifier: Apache-2.0
"""Attention with a cache, of one token and of a prompt: equal to torch, the same on every kernel; errors, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from binary_inputs import on_meta
from bitmill import ops
from bitmill.ops.decode_attention import _decode_attention_reference, _prompt_attention_reference
from problems import assert_same_bits, on_every_machine

CACHE = (3, 4)  # places of the arguments that are written


class Op(NamedTuple):
    """An op in its three forms; one of a token takes its angles as a vector."""

    public: Callable[..., Tensor]
    registered: Any
    reference: Callable[..., Tensor]


DECODE = Op(ops.decode_attention, torch.ops.bitmill.decode_attention.default, _decode_attention_reference)
PROMPT = Op(ops.prompt_attention, torch.ops.bitmill.prompt_attention.default, _prompt_attention_reference)
BOTH = pytest.mark.parametrize("op", [DECODE, PROMPT], ids=["decode", "prompt"])


def arguments(
    op: Op, m: int = 3, heads: int = 6, key_heads: int = 2, d: int = 16, position: int = 4, capacity: int = 9
) -> tuple[Any, ...]:
    m = m if op is PROMPT else 1
    angle = torch.randn(m, d // 2).repeat(1, 2)
    angle = angle if op is PROMPT else angle[0]
    return (
        torch.randn(m, (heads + 2 * key_heads) * d),
        angle.cos(),
        angle.sin(),
        torch.randn(key_heads, capacity, d),
        torch.randn(key_heads, capacity, d),
        position,
        d**-0.5,
    )


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in inputs)


@pytest.mark.parametrize("d", [2, 30, 64, 128])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        (DECODE, ((1, 0, 1), (1, 0, 5), (1, 6, 7), (1, 300, 400))),
        (PROMPT, ((0, 2, 5), (1, 0, 1), (5, 0, 5), (37, 6, 50), (128, 0, 144))),
    ],
    ids=["decode", "prompt"],
)
def test_equals_torch_on_every_machine(
    op: Op, sizes: tuple[tuple[int, int, int], ...], heads: int, key_heads: int, d: int
) -> None:
    for m, position, capacity in sizes:
        given = arguments(op, m, heads, key_heads, d, position, capacity)
        want = copied(given)
        context = op.reference(*want)
        first = None

        def run(given: tuple[Any, ...] = given) -> tuple[tuple[Any, ...], Tensor]:
            inputs = copied(given)
            return inputs, op.registered(*inputs)

        for machine, (inputs, out) in on_every_machine(run):
            torch.testing.assert_close(out, context, rtol=1e-5, atol=4e-6, msg=machine)
            for place in CACHE:
                assert_same_bits(inputs[place], want[place], machine)
            first = out if first is None else first
            assert_same_bits(out, first, machine)


@BOTH
def test_large_scores_do_not_overflow(op: Op) -> None:
    rows, cos, sin, keys, values, position, scaling = arguments(op)
    inputs = (1e4 * rows, cos, sin, 1e4 * keys, values, position, scaling)
    torch.testing.assert_close(op.registered(*copied(inputs)), op.reference(*copied(inputs)))


def test_single_tokens_go_on_where_a_prompt_ends() -> None:
    rows, cos, sin, keys, values, _, scaling = arguments(PROMPT, 9, position=0)
    together = ops.prompt_attention(rows, cos, sin, keys, values, 0, scaling)
    again = [torch.zeros_like(keys), torch.zeros_like(values)]
    first = ops.prompt_attention(rows[:5], cos[:5], sin[:5], *again, 0, scaling)
    steps = [ops.decode_attention(rows[i : i + 1], cos[i], sin[i], *again, i, scaling) for i in range(5, 9)]
    torch.testing.assert_close(torch.cat([first, *steps]), together)
    assert_same_bits(torch.stack(again), torch.stack((keys, values)))


def test_a_prompt_equals_scaled_dot_product_attention() -> None:
    rows, _, _, keys, values, _, scaling = arguments(PROMPT, 9, position=0)
    context = ops.prompt_attention(rows, torch.ones(9, 16), torch.zeros(9, 16), keys, values, 0, scaling)
    q = rows.view(9, 10, 16)[:, :6].transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[None], keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=True
    )
    torch.testing.assert_close(context, want[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("op", "place", "value", "message"),
    [
        *(
            (op, *case)
            for op in (DECODE, PROMPT)
            for case in (
                (3, torch.rand(2, 9), r"keys must have shape \[key heads, capacity, d\], got \[2, 9\]"),
                (3, torch.rand(2, 9, 15), r"keys must have heads of an even size, got \[2, 9, 15\]"),
                (3, torch.rand(2, 16, 9).mT, "keys must be contiguous, since it is written in place"),
                (4, torch.rand(2, 8, 16), r"values must have shape \[2, 9, 16\], got \[2, 8, 16\]"),
                (4, torch.rand(2, 9, 16).half(), "values must be float32, got float16"),
                (5, -1, "position must be between 0 and .*, got -1"),
            )
        ),
        *(
            (DECODE, 0, torch.rand(1, n), f"rows must hold .* queries, 2 keys and 2 values of 16 columns, got {n}")
            for n in (150, 64, 112)
        ),
        (DECODE, 0, torch.rand(2, 160), r"rows must have shape \[1, 160\], got \[2, 160\]"),
        (DECODE, 0, torch.rand(1, 160).bfloat16(), "rows must be float32, got bfloat16"),
        (DECODE, 1, torch.rand(8), r"cos must have shape \[16\], got \[8\]"),
        (DECODE, 2, torch.rand(16).double(), "sin must be float32, got float64"),
        (DECODE, 5, 9, "position must be between 0 and 8, got 9"),
        (PROMPT, 0, torch.rand(3, 150), "rows must hold a multiple of 2 queries, 2 keys and 2 values of 16 columns"),
        (PROMPT, 0, torch.rand(2, 3, 160), r"rows must have shape \[2, 160\], got \[2, 3, 160\]"),
        (PROMPT, 0, torch.rand(3, 160).bfloat16(), "rows must be float32, got bfloat16"),
        (PROMPT, 0, torch.rand(6, 160), r"cos must have shape \[6, 16\], got \[3, 16\]"),
        (PROMPT, 1, torch.rand(16), r"cos must have shape \[3, 16\], got \[16\]"),
        (PROMPT, 2, torch.rand(3, 16).double(), "sin must be float32, got float64"),
        (PROMPT, 5, 7, "position must be between 0 and 6, got 7"),
    ],
)
def test_errors(op: Op, place: int, value: Any, message: str) -> None:
    inputs = arguments(op)
    inputs = (*inputs[:place], value, *inputs[place + 1 :])
    before = copied(inputs)
    for kernel, given in ((op.registered, inputs), (op.reference, inputs), (op.registered, on_meta(inputs))):
        with pytest.raises(ValueError, match=f"{op.public.__name__}: {message}"):
            kernel(*given)
    for place in CACHE:
        assert_same_bits(inputs[place], before[place])


@BOTH
def test_opcheck_compile_and_the_public_function(op: Op) -> None:
    torch.library.opcheck(op.registered, arguments(op))
    given = arguments(op)
    outs = []
    for function in (torch.compile(op.public, fullgraph=True), op.public, op.registered):
        inputs = copied(given)
        outs.append((function(*inputs), *(inputs[place] for place in CACHE)))
    for got in outs[1:]:
        for a, b in zip(got, outs[0], strict=True):
            assert_same_bits(a, b)
