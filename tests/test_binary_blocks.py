# SPDX-License-Identifier: Apache-2.0
"""Blocks as one op: equal to the ops that they are made of on every kernel; shapes, masks, lengths, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import on_meta, tiles, values
from bitmill import ops
from bitmill.ops.binary_blocks import _binary_mlp_reference, _binary_self_attention_reference
from bitmill.ops.bitpack import LEVELS
from problems import assert_same_bits, on_every_machine
from test_binary_attention_bits import steps_of
from test_binary_attention_op import every_rule

MLP = torch.ops.bitmill.binary_mlp.default
ATTENTION = torch.ops.bitmill.binary_self_attention.default


def ranges(*leading: int, n: int, k: int, two_planes: bool, single: bool) -> tuple[Tensor | None, ...]:
    """Ranges of every kind: bounded, open, wrapping."""
    positive, negative = torch.randint(-k - 2, k + 3, (2, *leading, 2, n), dtype=torch.int32)
    others = torch.randint(-k, k + 1, (*leading, n, 2), dtype=torch.int32)
    return positive, negative if two_planes else None, others if two_planes and single else None


def mlp_arguments(
    shape: tuple[int, ...] = (3, 40),
    h: int = 50,
    n: int = 17,
    levels: str = "sign",
    inner_levels: str = "sign",
    zeros: bool = False,
    two_planes: bool = True,
    shift: bool = False,
    bias: bool = True,
    residual: bool = True,
) -> tuple[Any, ...]:
    k = shape[-1]
    up, up_nonzero, _ = tiles(h, k, zeros)
    down, down_nonzero, _ = tiles(n, h, zeros)
    return (
        values(*shape),
        torch.randn(*shape[:-1], n) if residual else None,
        values(k) if shift else None,
        0.3,
        levels,
        up,
        up_nonzero,
        *ranges(n=h, k=k, two_planes=two_planes, single=zeros),
        inner_levels,
        down,
        down_nonzero,
        torch.rand(n, 1),
        torch.randn(n) if bias else None,
    )


def assert_alike(op: Any, reference: Any, arguments: tuple[Any, ...], what: object = "") -> None:
    want = reference(*arguments)
    for machine, got in on_every_machine(lambda: op(*arguments)):
        assert_same_bits(got, want, f"{machine}, {what}")


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("inner_levels", LEVELS)
def test_mlp_equals_the_ops_it_is_made_of(levels: str, inner_levels: str) -> None:
    options = itertools.cycle(itertools.product((False, True), repeat=5))
    for m, (k, h, n) in itertools.product((1, 7, 63, 64, 150), ((40, 50, 17), (64, 96, 32), (33, 1, 70))):
        zeros, two_planes, shift, bias, residual = next(options)
        two_planes = two_planes and inner_levels == "sign"
        arguments = mlp_arguments((m, k), h, n, levels, inner_levels, zeros, two_planes, shift, bias, residual)
        assert_alike(MLP, _binary_mlp_reference, arguments, (m, k, h, n))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 70, 40), (2, 0, 3, 40)])
def test_mlp_of_any_rank(shape: tuple[int, ...]) -> None:
    assert_alike(MLP, _binary_mlp_reference, mlp_arguments(shape))


def test_mlp_of_bert_base() -> None:
    assert_alike(MLP, _binary_mlp_reference, mlp_arguments((1, 128, 768), 3072, 768, two_planes=False))


def attention_arguments(
    rule: str = "bool",
    sequences: int = 2,
    n: int = 5,
    k: int = 40,
    heads: int = 2,
    d: int = 32,
    layers: int = 3,
    levels: str = "sign",
    out_levels: str = "sign",
    zeros: bool = False,
    shift: bool = False,
    lengths: list[int] | None = None,
    mask: Tensor | None = None,
    residual: bool = True,
    n_out: int = 33,
) -> tuple[Any, ...]:
    width = heads * d
    columns = width * 3 // layers
    weights = [tiles(columns, k, zeros and i != 1) for i in range(layers)]
    empty = torch.empty(0, dtype=torch.int32)
    out, out_nonzero, _ = tiles(n_out, width, zeros)
    x = values(sequences, n, k) if lengths is None else values(sum(lengths), k)
    return (
        x,
        torch.randn(*x.shape[:-1], n_out) if residual else None,
        [values(k) for _ in weights] if shift else [],
        [0.1 * i for i in range(layers)] if shift else [0.2] * layers,
        levels,
        [weight for weight, _, _ in weights],
        [empty if nonzero is None else nonzero for _, nonzero, _ in weights] if zeros else [],
        *ranges(layers, n=columns, k=k, two_planes=zeros, single=zeros),
        mask,
        None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
        heads,
        rule,
        None,
        0.4,
        *steps_of(rule),
        *ranges(n=width, k=n, two_planes=zeros and out_levels == "sign", single=False)[:2],
        out_levels,
        out,
        out_nonzero,
        torch.rand(n_out, 1),
        torch.randn(n_out),
    )


@pytest.mark.parametrize("layers", [1, 3])
@every_rule
def test_attention_equals_the_ops_it_is_made_of(rule: str, layers: int) -> None:
    options = itertools.cycle(itertools.product((False, True), repeat=3))
    kinds = itertools.cycle(itertools.product(LEVELS, LEVELS))
    for (sequences, n), d in itertools.product(((1, 1), (1, 70), (3, 33), (2, 100)), (32, 64)):
        (zeros, shift, residual), (levels, out_levels) = next(options), next(kinds)
        arguments = attention_arguments(
            rule, sequences, n, 40, 2, d, layers, levels, out_levels, zeros, shift, residual=residual
        )
        assert_alike(ATTENTION, _binary_self_attention_reference, arguments, (sequences, n, d, levels, out_levels))


@pytest.mark.parametrize("layers", [1, 3])
@every_rule
def test_attention_with_masks_and_lengths(rule: str, layers: int) -> None:
    n = 40
    masks = (torch.rand(2, 1, 1, n) < 0.7, torch.randn(2, 2, n, n), torch.randn(n, n) < 0)
    for mask, zeros in itertools.product(masks, (False, True)):
        arguments = attention_arguments(rule, n=n, layers=layers, zeros=zeros, mask=mask)
        assert_alike(ATTENTION, _binary_self_attention_reference, arguments, zeros)
    for lengths in ([5, 0, 70, 33, 1], [], [0], [64]):
        arguments = attention_arguments(rule, n=max(lengths, default=1), layers=layers, lengths=lengths)
        assert_alike(ATTENTION, _binary_self_attention_reference, arguments, lengths)


def test_attention_of_bert_base() -> None:
    arguments = attention_arguments(sequences=1, n=128, k=768, heads=12, d=64)
    assert_alike(ATTENTION, _binary_self_attention_reference, arguments)


def words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.rand(3, 40).bfloat16(), "x must be float32, got bfloat16"),
        (0, torch.rand(3, 33), r"up must have shape \[4, 2, 16\]|residual must have shape|down must have shape"),
        (1, torch.rand(17), r"residual must have shape \[3, 17\], got \[17\]"),
        (2, torch.rand(41), r"shift must have shape \[40\], got \[41\]"),
        (4, "ternary", 'levels must be "sign", "plus" or "bool", got "ternary"'),
        (5, words(4, 3, 16), r"up must have shape \[4, 2, 16\], got \[4, 3, 16\]; pack the weight"),
        (6, words(4, 3, 16), r"up_nonzero must have shape \[4, 2, 16\], got \[4, 3, 16\]"),
        (8, words(50, 2), r"negative must have shape \[2, 50\], got \[50, 2\]"),
        (9, words(50), r"single must have shape \[n, count\] and goes with negative, got \[50\]"),
        (10, "ternary", '(inner_)?levels must be "sign", "plus" or "bool", got "ternary"'),
        (11, words(2, 1, 16), r"down must have shape \[2, 2, 16\], got \[2, 1, 16\]"),
        (13, torch.rand(17), r"scale must have shape \[17, 1\], got \[17\]"),
        (14, torch.rand(16), r"bias must have shape \[17\], got \[16\]"),
    ],
)
def test_mlp_errors(place: int, value: Any, message: str) -> None:
    arguments = mlp_arguments()
    arguments = (*arguments[:place], value, *arguments[place + 1 :])
    if place == 0 and value.shape[-1] == 33:
        arguments = (arguments[0], None, *arguments[2:5], words(4, 3, 16), *arguments[6:])
    for kernel, inputs in ((MLP, arguments), (_binary_mlp_reference, arguments), (MLP, on_meta(arguments))):
        with pytest.raises(ValueError, match=f"binary_mlp: ({message})"):
            kernel(*inputs)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.rand(5, 40), r"x must have shape \[sequences, n, k\], got \[5, 40\]"),
        (2, [torch.rand(40)], "shift must hold one entry for each of the 3 weights or none, got 1"),
        (2, [torch.rand(41)] * 3, r"shift must have shape \[40\], got \[41\]"),
        (3, [], "threshold must hold one entry for each of the 3 weights, got 0"),
        (5, [words(4, 2, 16)] * 2, "weight must hold the weights of one or three layers, got 2"),
        (5, [words(4, 3, 16)] * 3, r"weight must have shape \[4, 2, 16\], got \[4, 3, 16\]"),
        (6, [words(4, 2, 16)], "weight_nonzero must hold one entry for each of the 3 weights or none, got 1"),
        (6, [words(4, 3, 16)] * 3, r"weight_nonzero must have shape \[4, 2, 16\], got \[4, 3, 16\]"),
        (7, words(3, 2, 65), "positive must be of heads of whole words, a multiple of 64 columns, got 65"),
        (7, words(2, 2, 64), r"positive must have shape \[3, 2, 64\], got \[2, 2, 64\]"),
        (8, words(2, 64), r"negative must have shape \[3, 2, 64\], got \[2, 64\]"),
        (9, words(3, 64, 1), r"single must have shape .* got \[3, 64, 1\] without negative"),
        (10, torch.zeros(7, dtype=torch.bool), r"mask must be broadcastable to \[2, 2, 5, 5\], got shape \[7\]"),
        (12, 0, "heads must be at least 1, got 0"),
        (12, 2**59, "heads must be at most 16777216, got 576460752303423488"),
        (13, "exact", 'rule must be "bool", "softmax_aware" or "elastic", got "exact"'),
        (14, -1.0, "scaling must be a positive, finite float32, got -1"),
        (15, 0.0, r"beta must lie in \(0, 1\], got 0"),
        (16, torch.tensor(1.0), 'alpha_q goes with rule "elastic" only'),
        (19, words(2, 63), r"context_positive must have shape \[2, 64\], got \[2, 63\]"),
        (20, words(2, 63), r"context_negative must have shape \[2, 64\], got \[2, 63\]"),
        (22, words(1, 2, 16), r"out must have shape \[3, 2, 16\], got \[1, 2, 16\]"),
        (25, torch.rand(16), r"bias must have shape \[33\], got \[16\]"),
    ],
)
def test_attention_errors(place: int, value: Any, message: str) -> None:
    arguments = attention_arguments()
    arguments = (*arguments[:place], value, *arguments[place + 1 :])
    for kernel, inputs in (
        (ATTENTION, arguments),
        (_binary_self_attention_reference, arguments),
        (ATTENTION, on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"binary_self_attention: {message}"):
            kernel(*inputs)


def test_lengths_must_add_up_and_go_without_a_mask() -> None:
    arguments = attention_arguments(lengths=[4, 6])
    for lengths in ([4, 5], [4, 7], [-1, 11], [2**62, 2**62]):
        changed = (*arguments[:11], torch.tensor(lengths), *arguments[12:])
        with pytest.raises(ValueError, match=r"lengths must .*add up to the 10 rows of x"):
            ATTENTION(*changed)
    changed = (*arguments[:10], torch.ones(5, dtype=torch.bool), *arguments[11:])
    for kernel in (ATTENTION, _binary_self_attention_reference):
        with pytest.raises(ValueError, match="binary_self_attention: mask and lengths exclude each other"):
            kernel(*changed)


@pytest.mark.parametrize("flat", [False, True])
@every_rule
def test_attention_opcheck_and_compile(rule: str, flat: bool) -> None:
    arguments = attention_arguments(rule, zeros=True, shift=flat, lengths=[4, 6] if flat else None)
    torch.library.opcheck(ATTENTION, arguments)
    compiled = torch.compile(lambda *inputs: ATTENTION(*inputs), fullgraph=True)
    assert_same_bits(compiled(*arguments), ATTENTION(*arguments))


@pytest.mark.parametrize("arguments", [mlp_arguments(), mlp_arguments((0, 40), two_planes=False, shift=True)])
def test_mlp_opcheck_and_compile(arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(MLP, arguments)
    compiled = torch.compile(lambda *inputs: MLP(*inputs), fullgraph=True)
    assert_same_bits(compiled(*arguments), MLP(*arguments))


def test_public_functions_pass_every_argument_on() -> None:
    (
        x, residual, shift, threshold, levels, up, up_nonzero, positive, negative, single, inner_levels, down,
        down_nonzero, scale, bias,
    ) = arguments = mlp_arguments(zeros=True, shift=True, levels="bool")  # fmt: skip
    got = ops.binary_mlp(
        x, up, ops.BitRanges(positive, negative, single), down, scale, bias, up_nonzero, down_nonzero, shift,
        threshold, levels, inner_levels, residual,
    )  # fmt: skip
    assert_same_bits(got, MLP(*arguments))
    (
        x, residual, shift, threshold, levels, weight, weight_nonzero, positive, negative, single, mask, lengths,
        heads, rule, scaling, beta, alpha_q, alpha_k, alpha_a, context_positive, context_negative, out_levels, out,
        out_nonzero, scale, bias,
    ) = arguments = attention_arguments("elastic", zeros=True, shift=True, lengths=[3, 4])  # fmt: skip
    got = ops.binary_self_attention(
        x, weight, ops.BitRanges(positive, negative, single), heads,
        ops.BitRanges(context_positive, context_negative, None), out, scale, bias, weight_nonzero, out_nonzero, shift,
        threshold, levels, out_levels, residual, mask, lengths, rule, scaling, beta, alpha_q, alpha_k, alpha_a,
    )  # fmt: skip
    assert_same_bits(got, ATTENTION(*arguments))
