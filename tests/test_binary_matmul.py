# SPDX-License-Identifier: Apache-2.0
"""Binary products: every kernel against the default kernel bit for bit, and gradients against the straight-through
formula written with plain autograd.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import (
    FLOATS,
    assert_gradients,
    leaves,
    linear_arguments,
    tiles,
    values,
)
from bitmill import ops
from bitmill.ops.binary_matmul import (
    SURROGATES,
    _binary_linear_reference,
    _binary_matmul_reference,
    _binary_weight_linear_reference,
    surrogate_slope,
)
from bitmill.ops.bitpack import LEVELS
from problems import HEIGHTS, LAYOUTS, MODELS, UGLY, WIDTHS, Problem, assert_same_bits, on_every_machine

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_linear_alike(arguments: tuple[Any, ...], what: object = "") -> None:
    want = _binary_linear_reference(*arguments)
    for machine, got in on_every_machine(lambda: ops.binary_linear(*arguments)):
        assert_same_bits(got, want, f"binary_linear on {machine}, {what}")


def assert_dot_alike(m: int, n: int, k: int, levels: str, zeros: bool, a_zeros: bool) -> None:
    x = values(m, k)
    sign, nonzero, _, _ = ops.bitpack(x, levels=levels)
    weight, weight_nonzero, signs = tiles(n, k, zeros)
    arguments = (sign, weight, n, k, nonzero if a_zeros else None, weight_nonzero, levels)
    want = _binary_matmul_reference(*arguments)
    level = ops.bitunpack(sign, nonzero if a_zeros else None, k).int()
    level = (level + 1) // 2 if levels == "bool" else level
    assert torch.equal(want, level @ signs.T.int())
    for machine, got in on_every_machine(lambda: ops.binary_matmul(*arguments)):
        assert_same_bits(got, want, f"binary_matmul on {machine}, {m, n, k, levels, zeros, a_zeros}")


@pytest.mark.parametrize("k", WIDTHS)
def test_binary_matmul_equals_default(k: int) -> None:
    kinds = list(itertools.product(("sign", "ternary", "plus", "bool"), (False, True)))
    for i, (m, n) in enumerate(itertools.product(HEIGHTS, HEIGHTS)):
        for kind, zeros in kinds if m * n * k < 20_000 else kinds[i % 8 :: 3]:
            assert_dot_alike(m, n, k, "sign" if kind == "ternary" else kind, zeros, kind == "ternary")


@pytest.mark.parametrize("k", WIDTHS)
def test_binary_linear_equals_default(k: int) -> None:
    """Every height and width with every level; the other options take turns, so that each meets each."""
    turns = itertools.cycle(itertools.product(FLOATS, (0, 32, 64), *((False, True),) * 5))
    for m, n, levels in itertools.product(HEIGHTS, HEIGHTS, LEVELS):
        dtype, group_size, *flags = next(itertools.islice(turns, 36, None))
        zeros, bias, shift, alpha, row_scale = flags
        settings = (levels, dtype, zeros, bias, shift, alpha, row_scale, group_size)
        assert_linear_alike(linear_arguments(m, n, k, *settings), (m, n, k, *settings))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_binary_linear_equals_default_with_every_option(levels: str, dtype: torch.dtype) -> None:
    for problem in UGLY:
        for *flags, group_size in itertools.product(*((False, True),) * 5, (0, 32)):
            arguments = linear_arguments(*problem[1:], levels, dtype, *flags, group_size)
            assert_linear_alike(arguments, (problem, levels, dtype, flags, group_size))


@pytest.mark.parametrize("problem", MODELS, ids=lambda problem: problem.name)
def test_binary_linear_equals_default_on_model_shapes(problem: Problem) -> None:
    """At most 64 rows and 256 outputs of each layer, which still needs both threads."""
    m, n, k = min(problem.m, 64), min(problem.n, 256), problem.k
    arguments = linear_arguments(m, n, k, bias=True, alpha=True)
    want = _binary_linear_reference(*arguments)
    assert_same_bits(ops.binary_linear(*arguments), want, problem.name)


@pytest.mark.parametrize("levels", LEVELS)
def test_binary_linear_in_parallel(levels: str) -> None:
    assert_linear_alike(linear_arguments(130, 300, 768, levels, shift=True, row_scale=True, bias=True))


def test_binary_linear_rows_with_and_without_zeros_in_one_block() -> None:
    """Four rows are one block of the kernel, which treats rows without a zero as plain signs."""
    for zero_rows in itertools.product((False, True), repeat=4):
        for k in (32, 65):
            x = torch.randn(4, k) * ~torch.tensor(zero_rows)[:, None]
            arguments = linear_arguments(4, 70, k, group_size=32)
            assert_linear_alike((x, *arguments[1:]), zero_rows)


@pytest.mark.parametrize("levels", LEVELS)
def test_binary_linear_of_special_values(levels: str) -> None:
    """NaN is level 0 ("sign") or the lower one; with row_scale it reaches the output through the row's mean."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3e38])
    for row_scale, k in itertools.product((False, True), (8, 40)):
        arguments = linear_arguments(5, 20, k, levels, row_scale=row_scale)
        x = special.repeat(k)[: 5 * k].view(5, k)
        assert_linear_alike((x, *arguments[1:]), row_scale)
    nan = torch.full((1, 40), float("nan"))
    assert torch.equal(ops.binary_linear(nan, *arguments[1:3]), torch.zeros(1, 20))
    for scale in (float("inf"), float("nan"), 1e38, 1e-42, -1e-42):
        scaled = (*arguments[:2], torch.full((20, 1), scale), *arguments[3:])
        for dtype in FLOATS:
            assert_linear_alike((scaled[0].to(dtype), *scaled[1:]), (scale, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_binary_linear_of_any_memory_layout(layout: str) -> None:
    for k, dtype in itertools.product((33, 197), FLOATS):
        arguments = linear_arguments(6, 17, k, "sign", dtype, True, True, True, True, True, 32)
        view = LAYOUTS[layout](arguments[0])
        assert_linear_alike((view, *arguments[1:]), layout)
        assert_same_bits(ops.binary_linear(view, *arguments[1:]), ops.binary_linear(*arguments), layout)
        x, weight, scale, bias, nonzero = arguments[:5]
        tables = (LAYOUTS[layout](scale), LAYOUTS[layout](bias[None])[0], nonzero.transpose(1, 2).contiguous().mT)
        got = ops.binary_linear(x, torch.stack((weight, -weight), -1)[..., 0], *tables, *arguments[5:])
        assert_same_bits(got, ops.binary_linear(*arguments), f"{layout} weight")
        want = ops.binary_weight_linear(x, weight, scale, bias, nonzero, 32)
        assert_same_bits(ops.binary_weight_linear(view, weight, *tables, 32), want, layout)


def test_binary_ops_of_misaligned_storage() -> None:
    """Every tensor one element into a longer buffer: nothing is aligned to a vector, or to a cache line."""
    odd = LAYOUTS["odd offset"]
    for m, k in itertools.product((1, 6, 70), (33, 197)):
        arguments = linear_arguments(m, 50, k, "sign", torch.float32, False, True, True, True, True, 32)
        moved = [odd(a) if isinstance(a, Tensor) and a.dim() else a for a in arguments]
        assert moved[1].data_ptr() % 64 != 0
        assert_same_bits(ops.binary_linear(*moved), ops.binary_linear(*arguments))
        for activations in ("float", "int8"):
            answers = [ops.binary_weight_linear(*a[:5], 32, activations) for a in (moved, arguments)]
            assert_same_bits(*answers)


def test_binary_matmul_of_strided_planes() -> None:
    sign, nonzero, _, _ = ops.bitpack(values(6, 100))
    weight, weight_nonzero, _ = tiles(20, 100, True)
    want = ops.binary_matmul(sign, weight, 20, 100, nonzero, weight_nonzero)
    wide = torch.stack((sign, nonzero), 0).permute(1, 2, 0).contiguous()
    got = ops.binary_matmul(wide[..., 0], weight.mT.contiguous().mT, 20, 100, wide[..., 1], weight_nonzero)
    assert_same_bits(got, want)
    expanded = sign[:1].expand(6, -1)
    assert_same_bits(ops.binary_matmul(expanded, weight, 20, 100), ops.binary_matmul(expanded.clone(), weight, 20, 100))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("n", [0, 17])
@pytest.mark.parametrize("k", [0, 40])
def test_binary_linear_of_any_rank(leading: tuple[int, ...], n: int, k: int) -> None:
    for levels, group_size in itertools.product(LEVELS, (0, 32)):
        _, *rest = linear_arguments(1, n, k, levels, row_scale=True, bias=True, group_size=group_size)
        x = values(*leading, k)
        assert ops.binary_linear(x, *rest).shape == (*leading, n)
        assert_linear_alike((x, *rest), (leading, n, k))
        sign = ops.bitpack(x, levels="plus")[0]
        arguments = (sign, rest[0], n, k)
        assert_same_bits(ops.binary_matmul(*arguments), _binary_matmul_reference(*arguments))
        floats = (x, *rest[:4], group_size)
        torch.testing.assert_close(ops.binary_weight_linear(*floats), _binary_weight_linear_reference(*floats, "float"))


def test_every_argument_of_every_op_matters() -> None:
    """The binding counts arguments and does not check their types: each one, changed, changes the answer."""
    base = linear_arguments(5, 17, 70, "bool", torch.float32, True, True, True, True, True, 32)
    names = ("bias", "weight_nonzero", "shift", "alpha", "levels", "row_scale")
    others = {"levels": "sign", "row_scale": False}
    for name, place in zip(names, (3, 4, 5, 6, 7, 8), strict=True):
        changed = (*base[:place], others.get(name), *base[place + 1 :])
        assert_linear_alike(changed, name)
        assert not torch.equal(ops.binary_linear(*changed), ops.binary_linear(*base)), name
    for surrogate in SURROGATES:
        assert_linear_alike((*base[:10], surrogate), surrogate)
    wide = (*base[:2], base[2][:, :2].contiguous(), *base[3:9], 64, base[10])
    assert_linear_alike(wide, "group_size")


def straight_through(arguments: tuple[Any, ...], signs: Tensor) -> Tensor:
    """binary_linear as plain autograd: level forward, the surrogate's slope backward."""
    x, _, scale, bias, _, shift, alpha, levels, row_scale, group_size, surrogate = arguments
    z = x.float() if shift is None else x.float() + shift
    step = torch.ones(()) if alpha is None else alpha
    level = {"sign": torch.sign(z), "plus": (z >= 0) * 2.0 - 1, "bool": (z > step / 2).float()}[levels].detach()
    slope = (surrogate_slope(z / step, surrogate) / step).detach()
    level = level + (z - z.detach()) * slope
    if row_scale:
        level = level * z.detach().abs().mean(-1, keepdim=True)
    columns = scale.repeat_interleave(group_size, 1)[:, : x.shape[-1]] if group_size else scale
    y = level @ (signs.float() * columns).T
    return (y if bias is None else y + bias).to(x.dtype)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("levels", LEVELS)
def test_binary_linear_gradients_are_straight_through(levels: str, surrogate: str) -> None:
    for dtype, (*flags, group_size) in zip(
        itertools.cycle(FLOATS), itertools.product(*((False, True),) * 5, (0, 32)), strict=False
    ):
        arguments = linear_arguments(5, 17, 70, levels, dtype, *flags, group_size, surrogate)
        nonzero = arguments[4]
        signs = ops.tile_unpack(arguments[1], 17, 70, 1).float() * 2 - 1
        signs = signs if nonzero is None else signs * ops.tile_unpack(nonzero, 17, 70, 1)
        ours, inputs = leaves(arguments, (0, 2, 3, 5))
        plain, same = leaves(arguments, (0, 2, 3, 5))
        assert_gradients(ops.binary_linear(*ours), straight_through(plain, signs), inputs, same)


@pytest.mark.parametrize("place", [0, 2, 3, 5])
@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (2, 1, 1, 3)])
def test_binary_linear_one_gradient_of_any_rank(place: int, leading: tuple[int, ...]) -> None:
    _, *rest = linear_arguments(1, 17, 33, bias=True, shift=True)
    signs = ops.tile_unpack(rest[0], 17, 33, 1).float() * 2 - 1
    arguments = (values(*leading, 33), *rest)
    ours, inputs = leaves(arguments, (place,))
    plain, same = leaves(arguments, (place,))
    if leading == (0,):
        (gradient,) = torch.autograd.grad(ops.binary_linear(*ours).sum(), inputs)
        assert_same_bits(gradient, torch.zeros_like(inputs[0]))
    else:
        assert_gradients(ops.binary_linear(*ours), straight_through(plain, signs), inputs, same)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("k", [0, 5])
def test_binary_gradients_of_empty_weights(n: int, k: int) -> None:
    arguments = linear_arguments(4, n, k, bias=True, shift=True)
    ours, inputs = leaves(arguments, (0, 2, 3, 5))
    for gradient, t in zip(torch.autograd.grad(ops.binary_linear(*ours).sum(), inputs), inputs, strict=True):
        assert gradient.shape == t.shape and bool(gradient.isfinite().all())
    ours, inputs = leaves((*arguments[:5], 0), (0, 2, 3))
    for gradient, t in zip(torch.autograd.grad(ops.binary_weight_linear(*ours).sum(), inputs), inputs, strict=True):
        assert gradient.shape == t.shape and bool(gradient.isfinite().all())


def test_binary_gradients_do_not_depend_on_autocast() -> None:
    arguments = linear_arguments(5, 17, 70, bias=True, shift=True)
    floats = (*arguments[:5], 0)
    for op, inputs_of, places in (
        (ops.binary_linear, arguments, (0, 2, 3, 5)),
        (ops.binary_weight_linear, floats, (0, 2, 3)),
    ):
        answers = []
        for enabled in (False, True):
            ours, inputs = leaves(inputs_of, places)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = op(*ours)
                answers.append((y, *torch.autograd.grad(y.sum(), inputs)))
        for a, b in zip(*answers, strict=True):
            assert_same_bits(a, b)


def test_binary_linear_without_gradients() -> None:
    arguments = linear_arguments(5, 17, 70, bias=True)
    want = _binary_linear_reference(*arguments)
    ours, _ = leaves(arguments, (0, 2, 3))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = ops.binary_linear(*ours)
            assert not y.requires_grad
            assert_same_bits(y, want)
            assert not ops.binary_weight_linear(*ours[:5], 0).requires_grad
    assert ops.binary_linear(*ours).requires_grad
