# SPDX-License-Identifier: Apache-2.0
"""A prompt's attention with a cache: equal to torch, the same on every kernel, and followed by single tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import on_meta
from bitmill import ops
from bitmill.ops.decode_attention import _prompt_attention_reference
from problems import assert_same_bits, on_every_machine

OP = torch.ops.bitmill.prompt_attention.default


def arguments(
    m: int = 3, heads: int = 6, key_heads: int = 2, d: int = 16, position: int = 4, capacity: int = 9
) -> tuple[Any, ...]:
    angle = torch.randn(m, d // 2).repeat(1, 2)
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
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (9, 3), (8, 1)])
def test_equals_torch_on_every_machine(heads: int, key_heads: int, d: int) -> None:
    for m, position, capacity in ((0, 2, 5), (1, 0, 1), (5, 0, 5), (37, 6, 50), (128, 0, 144)):
        given = arguments(m, heads, key_heads, d, position, capacity)
        want = copied(given)
        context = _prompt_attention_reference(*want)
        first = None

        def run(given: tuple[Any, ...] = given) -> tuple[tuple[Any, ...], Tensor]:
            inputs = copied(given)
            return inputs, OP(*inputs)

        for machine, (inputs, out) in on_every_machine(run):
            torch.testing.assert_close(out, context, rtol=1e-5, atol=4e-6, msg=machine)
            for place in (3, 4):
                assert_same_bits(inputs[place], want[place], machine)
            first = out if first is None else first
            assert_same_bits(out, first, machine)


def test_single_tokens_go_on_where_it_ends() -> None:
    rows, cos, sin, keys, values, _, scaling = arguments(9, position=0)
    together = OP(rows, cos, sin, keys, values, 0, scaling)
    again = [torch.zeros_like(keys), torch.zeros_like(values)]
    first = OP(rows[:5], cos[:5], sin[:5], *again, 0, scaling)
    steps = [ops.decode_attention(rows[i : i + 1], cos[i], sin[i], *again, i, scaling) for i in range(5, 9)]
    torch.testing.assert_close(torch.cat([first, *steps]), together)
    assert_same_bits(torch.stack(again), torch.stack((keys, values)))


def test_equals_scaled_dot_product_attention() -> None:
    rows, _, _, keys, values, _, scaling = arguments(9, position=0)
    context = OP(rows, torch.ones(9, 16), torch.zeros(9, 16), keys, values, 0, scaling)
    q = rows.view(9, 10, 16)[:, :6].transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[None], keys[None], values[None], is_causal=True, scale=scaling, enable_gqa=True
    )
    torch.testing.assert_close(context, want[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.rand(3, 150), "rows must hold a multiple of 2 queries, 2 keys and 2 values of 16 columns, got 150"),
        (0, torch.rand(2, 3, 160), r"rows must have shape \[2, 160\], got \[2, 3, 160\]"),
        (0, torch.rand(3, 160).bfloat16(), "rows must be float32, got bfloat16"),
        (0, torch.rand(6, 160), r"cos must have shape \[6, 16\], got \[3, 16\]"),
        (1, torch.rand(16), r"cos must have shape \[3, 16\], got \[16\]"),
        (2, torch.rand(3, 16).double(), "sin must be float32, got float64"),
        (3, torch.rand(2, 9), r"keys must have shape \[key heads, capacity, d\], got \[2, 9\]"),
        (3, torch.rand(2, 9, 15), r"keys must have heads of an even size, got \[2, 9, 15\]"),
        (3, torch.rand(2, 16, 9).mT, "keys must be contiguous, since it is written in place"),
        (4, torch.rand(2, 8, 16), r"values must have shape \[2, 9, 16\], got \[2, 8, 16\]"),
        (5, 7, "position must be between 0 and 6, got 7"),
        (5, -1, "position must be between 0 and 6, got -1"),
    ],
)
def test_errors(place: int, value: Any, message: str) -> None:
    inputs = arguments()
    inputs = (*inputs[:place], value, *inputs[place + 1 :])
    before = copied(inputs)
    for kernel, given in ((OP, inputs), (_prompt_attention_reference, inputs), (OP, on_meta(inputs))):
        with pytest.raises(ValueError, match=f"prompt_attention: {message}"):
            kernel(*given)
    for place in (3, 4):
        assert_same_bits(inputs[place], before[place])


def test_opcheck_compile_and_the_public_function() -> None:
    torch.library.opcheck(OP, arguments())
    given = arguments()
    outs = []
    for function in (torch.compile(ops.prompt_attention, fullgraph=True), ops.prompt_attention, OP):
        inputs = copied(given)
        outs.append((function(*inputs), inputs[3], inputs[4]))
    for got in outs[1:]:
        for a, b in zip(got, outs[0], strict=True):
            assert_same_bits(a, b)
