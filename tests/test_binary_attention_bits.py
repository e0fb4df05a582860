# SPDX-License-Identifier: Apache-2.0
"""Binary attention from packed rows to packed rows: the integers of the float op, every kernel, lengths, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import on_meta
from bitmill import ops
from bitmill.ops.binary_attention_bits import _binary_attention_bits_reference
from bitmill.ops.binary_bits import NEVER
from problems import assert_same_bits, on_every_machine
from test_binary_attention_op import STEPS, every_rule, masks

pytestmark = pytest.mark.usefixtures("one_thread")


def steps_of(rule: str) -> tuple[Tensor | None, ...]:
    return (STEPS[0], STEPS[1], STEPS[3]) if rule == "elastic" else (None,) * 3


def rows(*shape: int, zeros: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Packed rows, and the values that they stand for."""
    x = torch.randn(shape)
    x = x * (torch.rand(shape) < 0.9) if zeros else x
    sign, nonzero, _, _ = ops.bitpack(x)
    return sign, nonzero if zeros else None, x


def ranges(columns: int, m: int) -> tuple[Tensor, Tensor]:
    edges = torch.randint(-m - 2, m + 3, (2, 2, columns), dtype=torch.int32)
    edges[:, :, ::5] = NEVER
    edges[:, :, 1::5] = edges[:, :, 1::5].sort(dim=1).values
    return edges[0], edges[1]


def problem(
    sequences: int, heads: int, n: int, m: int, d: int, e: int, zeros: str = ""
) -> tuple[list[Tensor | None], list[Tensor]]:
    """q, k, v, q_nonzero, k_nonzero, v_nonzero; and the values [sequences, heads, rows, columns]."""
    signs, nonzeros, floats = [], [], []
    for name, count, columns in (("q", n, d), ("k", m, d), ("v", m, e)):
        sign, nonzero, x = rows(sequences, count, heads * columns, zeros=name in zeros)
        signs.append(sign)
        nonzeros.append(nonzero)
        floats.append(x.unflatten(-1, (heads, columns)).transpose(1, 2))
    return [*signs, *nonzeros], floats


def assert_alike(arguments: tuple[Any, ...], what: object) -> tuple[Tensor, Tensor]:
    want = _binary_attention_bits_reference(*arguments)
    op = torch.ops.bitmill.binary_attention_bits.default
    for machine, got in on_every_machine(lambda: op(*arguments)):
        for name, g, w in zip(("sign", "nonzero"), got, want, strict=True):
            assert_same_bits(g, w, f"{name} on {machine}, {what}")
    return want


SHAPES = (
    (1, 1, 32, 32),
    (5, 33, 64, 64),
    (33, 64, 32, 96),
    (6, 31, 96, 32),
    (70, 197, 64, 64),
    (0, 5, 32, 32),
    (5, 0, 32, 32),
)


@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_equal_default_and_the_floats_of_the_other_op(rule: str, shape: tuple[int, int, int, int]) -> None:
    n, m, d, e = shape
    turns = itertools.cycle(("", "q", "k", "v", "qkv"))
    for (name, mask), heads in itertools.product(masks(2, 3, n=n, m=m).items(), (3,)):
        zeros, scaling = next(turns), None if len(name) % 2 else 0.3
        packed, floats = problem(2, heads, n, m, d, e, zeros)
        positive, negative = ranges(heads * e, m)
        one_plane = name == "causal"
        arguments = (
            *packed, mask, None, heads, positive, None if one_plane else negative, rule, scaling, 0.4, *steps_of(rule),
        )  # fmt: skip
        sign, nonzero = assert_alike(arguments, (shape, name, zeros))
        steps = (STEPS[0], STEPS[1], torch.tensor(1.0), STEPS[3]) if rule == "elastic" else (None,) * 4
        context = ops.binary_attention(*floats, mask, rule, scaling, 0.4, "torch", *steps)
        unit = 1.0 if rule != "elastic" else float(STEPS[3])
        whole = (context / unit).round().transpose(1, 2).flatten(2).long()
        first, last = positive.long()
        above = torch.where(first <= last, (first <= whole) & (whole <= last), (whole >= first) | (whole <= last))
        assert torch.equal(ops.bitunpack(sign, None, heads * e) > 0, above)
        assert nonzero.shape == ((0,) if one_plane else sign.shape)


def test_rows_that_are_parts_of_wider_ones() -> None:
    """As a fused projection answers them; and rows that lie in an order of their own."""
    heads, n, d, lengths = 2, 40, 64, torch.tensor([30, 60, 30])
    positive, negative = ranges(heads * d, 60)
    rest = (heads, positive, negative, "bool", None, 0.4, None, None, None)
    for zeros in ("", "qkv"):
        packed, _ = problem(3, heads, n, n, d, d, zeros)
        signs = list(torch.cat(packed[:3], -1).chunk(3, -1))
        nonzeros = list(torch.cat(packed[3:], -1).chunk(3, -1)) if zeros else packed[3:]
        turned = [None if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) for t in packed]
        for layout in ([*signs, *nonzeros], [*signs, *packed[3:]], turned):
            assert_alike((*layout, None, None, *rest), zeros)
            flat = [None if t is None else t.flatten(0, 1) for t in layout]
            assert_alike((*flat, None, lengths, *rest), zeros)
        assert signs[1].flatten(0, 1).data_ptr() == signs[1].data_ptr()


@every_rule
def test_sequences_of_any_length_are_those_computed_alone(rule: str) -> None:
    heads, d, e = 2, 64, 32
    lengths = [5, 0, 70, 33, 1, 32]
    for zeros in ("", "q", "kv"):
        packed, _ = problem(1, heads, sum(lengths), sum(lengths), d, e, zeros)
        flat = [None if t is None else t[0] for t in packed]
        positive, negative = ranges(heads * e, 70)
        rest = (heads, positive, negative, rule, None, 0.4, *steps_of(rule))
        got = assert_alike((*flat, None, torch.tensor(lengths), *rest), (rule, zeros))
        pieces = [None if t is None else t.split(lengths) for t in flat]
        for i, length in enumerate(lengths):
            alone = [None if piece is None else piece[i].unsqueeze(0) for piece in pieces]
            want = torch.ops.bitmill.binary_attention_bits.default(*alone, None, None, *rest)
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g.split(lengths)[i], w[0]), (i, length)


def arguments_of(rule: str = "bool", flat: bool = False) -> tuple[Any, ...]:
    packed, _ = problem(2, 2, 5, 5, 32, 32, "v")
    lengths = torch.tensor([4, 6]) if flat else None
    packed = [None if t is None else t.flatten(0, 1) for t in packed] if flat else packed
    return (*packed, None, lengths, 2, *ranges(64, 5), rule, None, 0.25, *steps_of(rule))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 5, 3, dtype=torch.int32), "q must have a positive multiple of heads = 2 words a row, got 3"),
        (0, torch.zeros(5, 2, dtype=torch.int32), r"q must have shape \[sequences, n, words\], got \[5, 2\]"),
        (0, torch.zeros(2, 5, 2), "q must be int32, got float32"),
        (1, torch.zeros(3, 5, 2, dtype=torch.int32), r"k must have shape \[2, 5, 2\], got \[3, 5, 2\]"),
        (2, torch.zeros(2, 4, 2, dtype=torch.int32), r"v(_nonzero)? must have shape"),
        (5, torch.zeros(2, 5, 4, dtype=torch.int32), r"v_nonzero must have shape \[2, 5, 2\], got \[2, 5, 4\]"),
        (6, torch.zeros(7, dtype=torch.bool), r"mask must be broadcastable to \[2, 2, 5, 5\], got shape \[7\]"),
        (8, 0, "heads must be at least 1, got 0"),
        (9, torch.zeros(2, 65, dtype=torch.int32), r"positive must have shape \[2, 64\], got \[2, 65\]"),
        (11, "exact", 'rule must be "bool", "softmax_aware" or "elastic", got "exact"'),
        (12, -1.0, "scaling must be a positive, finite float32, got -1"),
        (13, 0.0, r"beta must lie in \(0, 1\], got 0"),
        (14, torch.tensor(1.0), 'alpha_q goes with rule "elastic" only'),
    ],
)
def test_errors(place: int, value: Any, message: str) -> None:
    arguments = arguments_of()
    arguments = (*arguments[:place], value, *arguments[place + 1 :])
    op = torch.ops.bitmill.binary_attention_bits.default
    for kernel, inputs in ((op, arguments), (_binary_attention_bits_reference, arguments), (op, on_meta(arguments))):
        with pytest.raises(ValueError, match=f"binary_attention_bits: {message}"):
            kernel(*inputs)


@pytest.mark.parametrize("lengths", [[4, 5], [4, 7], [-1, 11], [11, -1], [2**62, 2**62]])
def test_lengths_must_add_up(lengths: list[int]) -> None:
    arguments = arguments_of(flat=True)
    arguments = (*arguments[:7], torch.tensor(lengths), *arguments[8:])
    for kernel in (torch.ops.bitmill.binary_attention_bits.default, _binary_attention_bits_reference):
        with pytest.raises(ValueError, match=r"binary_attention_bits: lengths must .*add up to the 10 rows of q"):
            kernel(*arguments)


def test_a_mask_goes_without_lengths() -> None:
    arguments = arguments_of(flat=True)
    arguments = (*arguments[:6], torch.ones(5, dtype=torch.bool), *arguments[7:])
    for kernel in (torch.ops.bitmill.binary_attention_bits.default, _binary_attention_bits_reference):
        with pytest.raises(ValueError, match="binary_attention_bits: mask and lengths exclude each other"):
            kernel(*arguments)


@pytest.mark.parametrize("flat", [False, True])
@every_rule
def test_opcheck_and_compile(rule: str, flat: bool) -> None:
    arguments = arguments_of(rule, flat)
    op = torch.ops.bitmill.binary_attention_bits.default
    torch.library.opcheck(op, arguments)
    for g, w in zip(
        torch.compile(lambda *inputs: op(*inputs), fullgraph=True)(*arguments), op(*arguments), strict=True
    ):
        assert_same_bits(g, w)


@pytest.mark.parametrize("n", [1, 5])
def test_rows_in_any_layout(n: int) -> None:
    """Sequences side by side instead of one after another; of one row each, torch calls that contiguous."""
    q = torch.randint(-(2**31), 2**31 - 1, (n, 5, 2), dtype=torch.int32).transpose(0, 1)
    packed = torch.empty(q.shape, dtype=torch.int32).copy_(q)
    rest = None, None, None, None, None, 2, *ranges(64, n), "bool", None, 0.25, *steps_of("bool")
    op = torch.ops.bitmill.binary_attention_bits
    assert all(torch.equal(a, b) for a, b in zip(op(q, q, q, *rest), op(packed, packed, packed, *rest), strict=True))
