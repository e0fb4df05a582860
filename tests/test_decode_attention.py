# SPDX-License-Identifier: Apache-2.0
"""One token's attention with a cache: equal to torch, the same on every kernel; errors, opcheck, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import on_meta
from bitmill import ops
from bitmill.ops.decode_attention import _decode_attention_reference
from problems import assert_same_bits, on_every_machine

OP = torch.ops.bitmill.decode_attention.default


def arguments(heads: int = 6, key_heads: int = 2, d: int = 16, position: int = 4, capacity: int = 9) -> tuple[Any, ...]:
    return (
        torch.randn(1, (heads + 2 * key_heads) * d),
        torch.randn(d),
        torch.randn(d),
        torch.randn(key_heads, capacity, d),
        torch.randn(key_heads, capacity, d),
        position,
        d**-0.5,
    )


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in inputs)


@pytest.mark.parametrize("d", [2, 30, 64, 128])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (9, 3), (4, 4), (8, 1)])
def test_equals_torch_on_every_machine(heads: int, key_heads: int, d: int) -> None:
    for position, capacity in ((0, 1), (0, 5), (6, 7), (300, 400)):
        given = arguments(heads, key_heads, d, position, capacity)
        want = copied(given)
        context = _decode_attention_reference(*want)
        first = None

        def run(given: tuple[Any, ...] = given) -> tuple[tuple[Any, ...], Tensor]:
            inputs = copied(given)
            return inputs, OP(*inputs)

        for machine, (inputs, out) in on_every_machine(run):
            torch.testing.assert_close(out, context, rtol=1e-5, atol=1e-6, msg=machine)
            for place in (3, 4):
                assert_same_bits(inputs[place], want[place], machine)
            first = out if first is None else first
            assert_same_bits(out, first, machine)


def test_large_scores_do_not_overflow() -> None:
    rows, cos, sin, keys, values, position, scaling = arguments()
    inputs = (1e4 * rows, cos, sin, 1e4 * keys, values, position, scaling)
    torch.testing.assert_close(OP(*copied(inputs)), _decode_attention_reference(*copied(inputs)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.rand(1, 150), "rows must hold a multiple of 2 queries, 2 keys and 2 values of 16 columns, got 150"),
        (0, torch.rand(1, 64), "rows must hold a multiple of 2 queries, 2 keys and 2 values of 16 columns, got 64"),
        (0, torch.rand(1, 112), "rows must hold a multiple of 2 queries, 2 keys and 2 values of 16 columns, got 112"),
        (0, torch.rand(2, 160), r"rows must have shape \[1, 160\], got \[2, 160\]"),
        (0, torch.rand(1, 160).bfloat16(), "rows must be float32, got bfloat16"),
        (1, torch.rand(8), r"cos must have shape \[16\], got \[8\]"),
        (2, torch.rand(16).double(), "sin must be float32, got float64"),
        (3, torch.rand(2, 9), r"keys must have shape \[key heads, capacity, d\], got \[2, 9\]"),
        (3, torch.rand(2, 9, 15), r"keys must have heads of an even size, got \[2, 9, 15\]"),
        (3, torch.rand(2, 16, 9).mT, "keys must be contiguous, since it is written in place"),
        (4, torch.rand(2, 8, 16), r"values must have shape \[2, 9, 16\], got \[2, 8, 16\]"),
        (4, torch.rand(2, 9, 16).half(), "values must be float32, got float16"),
        (5, 9, "position must be between 0 and 8, got 9"),
        (5, -1, "position must be between 0 and 8, got -1"),
    ],
)
def test_errors(place: int, value: Any, message: str) -> None:
    inputs = arguments()
    inputs = (*inputs[:place], value, *inputs[place + 1 :])
    before = copied(inputs)
    for kernel, given in ((OP, inputs), (_decode_attention_reference, inputs), (OP, on_meta(inputs))):
        with pytest.raises(ValueError, match=f"decode_attention: {message}"):
            kernel(*given)
    for place in (3, 4):
        assert_same_bits(inputs[place], before[place])


def test_opcheck_compile_and_the_public_function() -> None:
    torch.library.opcheck(OP, arguments())
    given = arguments()
    outs = []
    for function in (torch.compile(ops.decode_attention, fullgraph=True), ops.decode_attention, OP):
        inputs = copied(given)
        outs.append((function(*inputs), inputs[3], inputs[4]))
    for got in outs[1:]:
        for a, b in zip(got, outs[0], strict=True):
            assert_same_bits(a, b)
