# SPDX-License-Identifier: Apache-2.0
"""Chains of bits: ranges found through the float epilogue, and kernels that answer packed rows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import on_meta, tiles, values
from bitmill import ops
from bitmill.ops.binary_bits import _binary_matmul_bits_reference
from bitmill.ops.bitpack import LEVELS
from problems import HEIGHTS, LAYOUTS, MODELS, UGLY, WIDTHS, Problem, assert_same_bits, on_every_machine


def arguments_of(
    m: int, n: int, k: int, levels: str = "sign", a_zeros: bool = False, zeros: bool = False, two_planes: bool = True
) -> tuple[Any, ...]:
    """Arguments of binary_matmul_bits, with ranges of every kind: bounded, open, empty."""
    sign, nonzero, _, _ = ops.bitpack(values(m, k), levels=levels)
    weight, weight_nonzero, _ = tiles(n, k, zeros)
    edges = torch.randint(-k - 2, k + 3, (2, 2, n), dtype=torch.int32)
    return (
        sign,
        weight,
        edges[0],
        edges[1] if two_planes else None,
        n,
        k,
        nonzero if a_zeros else None,
        weight_nonzero,
        levels,
    )


def assert_bits_alike(arguments: tuple[Any, ...], what: object = "") -> None:
    want = _binary_matmul_bits_reference(*arguments)
    for machine, got in on_every_machine(lambda: ops.binary_matmul_bits(*arguments)):
        for name, g, w in zip(("sign", "nonzero"), got, want, strict=True):
            assert_same_bits(g, w, f"{name} on {machine}, {what}")


@pytest.mark.parametrize("n", (*WIDTHS, 48, 96, 113))
def test_bits_equal_default(n: int) -> None:
    kinds = itertools.cycle(itertools.product(("sign", "ternary", "plus", "bool"), (False, True), (False, True)))
    for m, k in itertools.product(HEIGHTS, (1, 33, 64, 197)):
        for kind, zeros, two_planes in itertools.islice(kinds, 3):
            levels = "sign" if kind == "ternary" else kind
            assert_bits_alike(arguments_of(m, n, k, levels, kind == "ternary", zeros, two_planes), (m, n, k, kind))


@pytest.mark.parametrize("problem", [p for p in MODELS if p.m * p.n * p.k < 5e8], ids=lambda p: p.name)
def test_bits_of_model_shapes(problem: Problem) -> None:
    assert_bits_alike(arguments_of(problem.m, problem.n, problem.k, "plus"), problem)


@pytest.mark.parametrize("problem", UGLY, ids=lambda p: p.name)
@pytest.mark.parametrize("leading", [(), (3,), (2, 0, 3), (2, 1, 3)])
def test_bits_of_any_rank(problem: Problem, leading: tuple[int, ...]) -> None:
    _, *rest = arguments_of(1, problem.n, problem.k)
    sign = ops.bitpack(values(*leading, problem.k), levels="plus")[0]
    assert_bits_alike((sign, *rest), problem)
    answer = ops.binary_matmul_bits(sign, *rest)
    assert answer[0].shape == answer[1].shape == (*leading, -(-problem.n // 32))


def epilogue(dot: Tensor, scale: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
    z = scale * dot.float()
    z = z if bias is None else z + bias
    return z if shift is None else z + shift


@pytest.mark.parametrize("levels", LEVELS)
def test_bit_ranges_are_what_the_epilogue_says_for_every_dot(levels: str) -> None:
    """All 2 k + 1 dot products of every output, scales of both signs and 0, biases that make ties."""
    n, k = 400, 197
    scale = torch.randn(n) * 10.0 ** torch.randint(-6, 7, (n,))
    scale[::7] = 0.0
    whole = torch.randint(-k, k + 1, (n,)).float()
    for bias, shift in (
        (None, None),
        (torch.randn(n) * scale.abs() * 50, None),
        (-scale * whole, None),  # z = 0 or its last bit
        (torch.where(whole % 2 == 0, 0.0, whole), -scale * whole),
    ):
        threshold = 0.3
        positive, zero = ops.bit_ranges(scale, bias, k, levels, shift, threshold)
        assert (zero is None) == (levels != "sign")
        dot = torch.arange(-k, k + 1)[:, None]
        z = epilogue(dot, scale, bias, shift)
        want = {"sign": z > 0, "plus": z >= 0, "bool": z > threshold}[levels]
        assert torch.equal((positive[0] <= dot) & (dot <= positive[1]), want)
        if zero is not None:
            assert torch.equal((zero[0] <= dot) & (dot <= zero[1]), z == 0)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_chain_of_two_layers_stays_bits(levels: str) -> None:
    """binary_linear to floats and bitpack, against one product that answers bits; then the second layer."""
    m, k, n = 37, 300, 113
    x = values(m, k)
    weight, _, _ = tiles(n, k, False)
    scale, bias, shift = torch.rand(n, 1), torch.randn(n) * 5, torch.randn(n)
    bias[::3] = -(scale[::3, 0] * 8)  # z = 0 occurs
    shift[::3] = 0.0
    hidden = ops.binary_linear(x, weight, scale, bias)
    want = ops.bitpack(hidden, shift, levels=levels, threshold=0.25)
    positive, zero = ops.bit_ranges(scale, bias, k, levels, shift, 0.25)
    sign, nonzero, _, _ = ops.bitpack(x)
    got = ops.binary_matmul_bits(sign, weight, positive, zero, n, k, nonzero)
    assert_same_bits(got[0], want[0])
    if levels == "sign":
        assert_same_bits(got[1], want[1])
        assert (ops.bitunpack(*got, n) == 0).any()
    second, _, _ = tiles(20, n, False)
    rows = (got[1] if levels == "sign" else None, None, levels)
    dot = ops.binary_matmul(got[0], second, 20, n, *rows)
    level = ops.bitunpack(want[0], want[1] if levels == "sign" else None, n).int()
    level = (level + 1) // 2 if levels == "bool" else level
    assert torch.equal(dot, level @ (ops.tile_unpack(second, 20, n, 1).int() * 2 - 1).T)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_of_any_memory_layout(layout: str) -> None:
    a, weight, positive, zero, *rest = arguments_of(6, 50, 100)
    want = ops.binary_matmul_bits(a, weight, positive, zero, *rest)
    views = [a, positive, zero] if layout == "lazily negated" else [LAYOUTS[layout](t) for t in (a, positive, zero)]
    got = ops.binary_matmul_bits(views[0], weight, *views[1:], *rest)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w, layout)


ARGUMENTS = arguments_of(3, 17, 40)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 3, dtype=torch.int32), r"a must have shape \[3, 2\], got \[3, 3\]"),
        (1, torch.zeros(2, 3, 16, dtype=torch.int32), r"weight must have shape \[2, 2, 16\], got \[2, 3, 16\]"),
        (2, torch.zeros(2, 18, dtype=torch.int32), r"positive must have shape \[2, 17\], got \[2, 18\]"),
        (2, torch.zeros(2, 17), "positive must be int32, got float32"),
        (3, torch.zeros(17, 2, dtype=torch.int32), r"zero must have shape \[2, 17\], got \[17, 2\]"),
        (5, -1, "n must be at least 0 and k between 0 and 16777216"),
        (8, "ternary", 'levels must be "sign", "plus" or "bool", got "ternary"'),
    ],
)
def test_bits_errors(place: int, value: Any, message: str) -> None:
    arguments = (*ARGUMENTS[:place], value, *ARGUMENTS[place + 1 :])
    for kernel, inputs in (
        (ops.binary_matmul_bits, arguments),
        (_binary_matmul_bits_reference, arguments),
        (ops.binary_matmul_bits, on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"binary_matmul_bits: {message}"):
            kernel(*inputs)


def test_bit_ranges_errors() -> None:
    scale = torch.ones(4)
    for arguments, message in (
        ((torch.ones(4, 2), None, 5), r"scale must have shape \[n\] or \[n, 1\], got \[4, 2\]"),
        ((scale.double(), None, 5), "scale must be float32, got float64"),
        ((scale, torch.ones(3), 5), r"bias must have shape \[4\], got \[3\]"),
        ((scale * torch.inf, None, 5), "scale must be finite, got NaN or infinity"),
        ((scale, scale * torch.nan, 5), "bias must be finite, got NaN or infinity"),
        ((scale, None, -1), "k must be between 0 and 16777216, got -1"),
        ((scale, None, 5, "ternary"), 'levels must be "sign", "plus" or "bool", got "ternary"'),
    ):
        with pytest.raises(ValueError, match=f"bit_ranges: {message}"):
            ops.bit_ranges(*arguments)


@pytest.mark.parametrize(
    "arguments", [ARGUMENTS, arguments_of(3, 17, 40, "bool", zeros=True, two_planes=False), arguments_of(0, 17, 40)]
)
def test_bits_opcheck_and_compile(arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(torch.ops.bitmill.binary_matmul_bits.default, arguments)
    compiled = torch.compile(ops.binary_matmul_bits, fullgraph=True)
    for g, w in zip(compiled(*arguments), ops.binary_matmul_bits(*arguments), strict=True):
        assert_same_bits(g, w)
