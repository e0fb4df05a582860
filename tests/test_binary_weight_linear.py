# SPDX-License-Identifier: Apache-2.0
"""Float and int8 activations times 1-bit weights: every kernel against the default kernel, and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import FLOATS, assert_gradients, leaves, linear_arguments, on_meta, values, with_gradients
from bitmill import ops
from bitmill.ops.binary_matmul import _binary_weight_linear_reference
from problems import HEIGHTS, LAYOUTS, MODELS, UGLY, WIDTHS, assert_same_bits, on_every_machine


def close(got: Tensor, want: Tensor, x: Tensor, scale: Tensor) -> None:
    """Sums of k terms in another order: a bound from the size of the terms, then one rounding to the dtype."""
    assert got.dtype == want.dtype and got.shape == want.shape
    magnitude = x.double().abs().sum(-1, keepdim=True) * scale.double().abs().sum(-1)
    bound = 1e-6 * magnitude + torch.finfo(got.dtype).eps * want.double().abs() + 1e-6
    assert bool(((got.double() - want.double()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zeros", [False, True])
def test_binary_weight_linear_equals_default(dtype: torch.dtype, zeros: bool) -> None:
    for (m, n), k, group_size in itertools.product(((1, 17), (5, 16), (3, 81), (17, 33)), (0, *WIDTHS), (0, 32, 64)):
        if group_size and not k:
            continue
        arguments = linear_arguments(m, n, k, "sign", dtype, zeros, bool(k % 2), group_size=group_size)
        x, _, scale = arguments[:3]
        arguments = (*arguments[:5], group_size, "float")
        want = _binary_weight_linear_reference(*arguments)
        answers = on_every_machine(lambda: ops.binary_weight_linear(*arguments))  # noqa: B023
        for _, got in answers:
            close(got, want, x, scale)
            assert_same_bits(got, answers[0][1], "the order of summation is the same everywhere")


@pytest.mark.parametrize("dtype", FLOATS)
def test_binary_weight_linear_of_special_values(dtype: torch.dtype) -> None:
    """NaN and infinity reach the outputs that they belong to, on every machine; a weight of 0 times infinity is NaN."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3e38])
    for zeros, k in itertools.product((False, True), (33, 200)):
        _, weight, scale, _, nonzero, *_ = linear_arguments(1, 20, k, zeros=zeros)
        x = torch.randn(12, k)
        x[torch.arange(12), torch.randint(k, (12,))] = special.repeat(2)
        arguments = (x.to(dtype), weight, scale, None, nonzero, 0, "float")
        want = _binary_weight_linear_reference(*arguments)
        answers = on_every_machine(lambda: ops.binary_weight_linear(*arguments))  # noqa: B023
        for machine, got in answers:
            assert_same_bits(got, answers[0][1], machine)
            assert torch.equal(got.isnan(), want.isnan()), machine
            assert torch.equal(got.isinf() * got.sign().nan_to_num(), want.isinf() * want.sign().nan_to_num()), machine


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_binary_weight_linear_gradients(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    for zeros, bias, group_size in itertools.product((False, True), (False, True), (0, 32)):
        every = linear_arguments(1, 17, 70, "sign", dtype, zeros, bias, group_size=group_size)
        _, weight, scale, b, nonzero = every[:5]
        signs = ops.tile_unpack(weight, 17, 70, 1).float() * 2 - 1
        signs = signs if nonzero is None else signs * ops.tile_unpack(nonzero, 17, 70, 1)
        arguments = (values(*leading, 70, dtype=dtype), weight, scale, b, nonzero, group_size)
        ours, inputs = leaves(arguments, (0, 2, 3))
        (x, _, s, c, *_), same = leaves(arguments, (0, 2, 3))
        columns = s.repeat_interleave(group_size, 1)[:, :70] if group_size else s
        y = x.float() @ (signs * columns).T
        y = (y if c is None else y + c).to(dtype)
        assert_gradients(ops.binary_weight_linear(*ours), y, inputs, same)


def int8_arguments(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    zeros: bool = False,
    bias: bool = False,
    group_size: int = 0,
) -> tuple[Any, ...]:
    """Arguments of binary_weight_linear with int8 activations."""
    x, weight, scale, b, nonzero, *_ = linear_arguments(m, n, k, "sign", dtype, zeros, bias, group_size=group_size)
    return x, weight, scale, b, nonzero, group_size, "int8"


def assert_int8_alike(arguments: tuple[Any, ...], what: object = "") -> None:
    want = _binary_weight_linear_reference(*arguments)
    for machine, got in on_every_machine(lambda: ops.binary_weight_linear(*arguments)):
        assert_same_bits(got, want, f"binary_weight_linear on {machine}, {what}")


@pytest.mark.parametrize("k", (0, *WIDTHS))
def test_int8_activations_equal_default_bit_for_bit(k: int) -> None:
    for i, (m, n) in enumerate(itertools.product((*HEIGHTS, 3, 5, 8), (1, 16, 17, 33, 100))):
        arguments = int8_arguments(m, n, k, FLOATS[i % 3], i % 4 == 3, i % 2 == 0)
        assert_int8_alike(arguments, (m, n, k))


@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_int8_activations_of_groups(group_size: int) -> None:
    for i, (m, k) in enumerate(itertools.product((1, 2, 5, 9), (31, 33, 100, 197, 700))):
        assert_int8_alike(int8_arguments(m, 50, k, FLOATS[i % 3], i % 3 == 0, True, group_size), (m, k, group_size))


@pytest.mark.parametrize("problem", [p for p in MODELS if p.m * p.n * p.k < 5e8], ids=lambda p: p.name)
def test_int8_activations_of_model_shapes(problem: Any) -> None:
    assert_int8_alike(int8_arguments(problem.m, problem.n, problem.k, bias=True), problem)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_activations_of_any_layout(layout: str) -> None:
    for problem in UGLY:
        x, *rest = int8_arguments(problem.m, problem.n, problem.k, bias=True)
        assert_int8_alike((LAYOUTS[layout](x), *rest), (layout, problem))


def test_int8_activations_are_the_integer_product() -> None:
    x, weight, scale, bias, *_ = int8_arguments(7, 33, 700, bias=True)
    q, rows = ops.int8_quantize(x)
    signs = ops.tile_unpack(weight, 33, 700, 1).int() * 2 - 1
    want = (scale.T * rows[:, None]) * (q.int() @ signs.T).float() + bias
    assert_same_bits(ops.binary_weight_linear(x, weight, scale, bias, activations="int8"), want)
    exact = ops.binary_weight_linear(x, weight, scale, bias)
    assert ((want - exact).abs() <= 0.51 * rows[:, None] * 700 * scale.T.abs() + 1e-3).all()


@pytest.mark.parametrize("m", [1, 8])
def test_int8_sums_reach_their_limits(m: int) -> None:
    """All activations +-127 and all weights +1 fill the 16-bit partial sums and pass 2^24."""
    k = 300_032
    weight = ops.tile_pack(torch.ones(17, k, dtype=torch.uint8), 1)
    for x in (torch.ones(m, k), -torch.ones(m, k), torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0).expand(m, k)):
        assert_int8_alike((x, weight, torch.ones(17, 1), None, None, 0, "int8"))


def test_int8_activations_that_are_not_finite_stay_in_their_row() -> None:
    x, *rest = int8_arguments(6, 20, 100)
    x[1, 5], x[3, 50], x[4] = torch.nan, torch.inf, 0.0
    assert_int8_alike((x, *rest))
    y = ops.binary_weight_linear(x, *rest)
    assert y[1].isnan().all() and y[4].eq(0).all() and y[[0, 2, 5]].isfinite().all()


@pytest.mark.parametrize("group_size", [0, 32])
def test_int8_gradients_are_straight_through(group_size: int) -> None:
    x, weight, scale, b, *_ = int8_arguments(5, 17, 70, bias=True, group_size=group_size)
    signs = ops.tile_unpack(weight, 17, 70, 1).float() * 2 - 1
    ours, inputs = leaves((x, weight, scale, b, None, group_size, "int8"), (0, 2, 3))
    (x2, _, s, c, *_), same = leaves(ours, (0, 2, 3))
    columns = s.repeat_interleave(group_size, 1)[:, :70] if group_size else s
    assert_gradients(ops.binary_weight_linear(*ours), ops.int8_fake_quant(x2) @ (signs * columns).T + c, inputs, same)


def test_activations_are_named() -> None:
    arguments = linear_arguments(3, 17, 40)[:5]
    for inputs in (arguments, on_meta(arguments)):
        for kernel in (ops.binary_weight_linear, _binary_weight_linear_reference):
            with pytest.raises(
                ValueError, match=r'binary_weight_linear: activations must be "float" or "int8", got "int4"'
            ):
                kernel(*inputs, 0, "int4")


@pytest.mark.parametrize(
    "arguments",
    [
        (*linear_arguments(3, 17, 40, zeros=True, bias=True)[:5], 0, "float"),
        with_gradients((*linear_arguments(3, 17, 40, bias=True)[:5], 0, "float"), (0, 2, 3)),
        with_gradients((*linear_arguments(2, 17, 40, group_size=32)[:5], 32, "float"), (0, 2)),
        (values(40, 3).T, *linear_arguments(3, 17, 40)[1:5], 0, "float"),
        int8_arguments(3, 17, 40, bias=True),
        with_gradients(int8_arguments(3, 17, 40, bias=True, group_size=32), (0, 2, 3)),
    ],
)
def test_binary_weight_linear_opcheck(arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(torch.ops.bitmill.binary_weight_linear.default, arguments)


def test_int8_activations_compile() -> None:
    arguments = with_gradients(int8_arguments(3, 17, 40, bias=True), (0, 2, 3))
    compiled = torch.compile(ops.binary_weight_linear, fullgraph=True)
    y = compiled(*arguments)
    assert_same_bits(y, ops.binary_weight_linear(*arguments))
    y.sum().backward()
    assert arguments[0].grad is not None and arguments[0].grad.isfinite().all()


def test_groups_wider_than_any_layer() -> None:
    x, weight = torch.randn(2, 96), torch.zeros(1, 3, 16, dtype=torch.int32)
    for group_size in (2**63 - 32, 2**62, 2**25):
        with pytest.raises(ValueError, match="group_size must be"):
            torch.ops.bitmill.binary_weight_linear(x, weight, torch.zeros(16, 0), None, None, group_size, "float")
