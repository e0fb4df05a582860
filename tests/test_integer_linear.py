# SPDX-License-Identifier: Apache-2.0
"""integer_linear: whole numbers times planes of signs, exact on every instruction set."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmill import ops
from problems import LAYOUTS, UGLY, Problem, assert_same_bits, on_every_machine

RANGES = ((-1, 1), (0, 1), (0, 2), (0, 3), (-2, 1), (-8, 7), (0, 15), (-127, 127), (-128, 127), (0, 255))


def arguments(problem: Problem, low: int, high: int, planes: int = 2, rows: bool = False) -> dict[str, Any]:
    """Every argument, none at its default; a weight of 0 here and there."""
    m, n, k = problem.m, problem.n, problem.k
    signs = torch.randint(0, 2, (planes, n, k), dtype=torch.uint8)
    nonzero = (torch.rand(planes, n, k) < 0.9).to(torch.uint8)
    pack = [torch.stack([ops.tile_pack(p, 1) for p in t]) for t in (signs & nonzero, nonzero)]
    code = torch.randint(low, high + 1, (2, m, k)).float()
    code.flatten()[:2] = torch.tensor([low, high])[: code.numel()]
    shape = (2, m, 1) if rows else ()
    return {
        "value": torch.randn(2, m, k),
        "code": code,
        "weight": pack[0],
        "scale": torch.randn(n, planes),
        "bias": torch.randn(n),
        "weight_nonzero": pack[1],
        "step": torch.rand(shape) + 0.5,
        "offset": torch.randn(shape),
        "low": low,
        "high": high,
    }


def dense_planes(given: dict[str, Any]) -> list[Tensor]:
    n, k = given["scale"].shape[0], given["code"].shape[-1]
    sign, nonzero = (
        [ops.tile_unpack(p, n, k, 1).double() for p in given[name]] for name in ("weight", "weight_nonzero")
    )
    return [(2 * s - 1) * z for s, z in zip(sign, nonzero, strict=True)]


def written_out(given: dict[str, Any]) -> Tensor:
    """The formula, with the roundings that it names: integers in float64, the epilogue in float32."""
    out = torch.zeros(())
    for p, plane in enumerate(dense_planes(given)):
        dot, total = (given["code"].double() @ plane.T).float(), plane.sum(1).float()
        scale = given["scale"][:, p]
        out = out + (scale * given["step"]) * dot
        out = out + (scale * given["offset"]) * total
    return out + given["bias"]


@pytest.mark.parametrize("problem", UGLY, ids=lambda p: p.name)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_integer_linear_equals_its_formula(problem: Problem, low: int, high: int) -> None:
    given = arguments(problem, low, high, planes=1 + high % 3, rows=problem.m > 3)
    want = written_out(given)
    for machine, got in on_every_machine(lambda: ops.integer_linear(**given)):
        assert_same_bits(got, want + 0.0, f"{problem.name}, {machine}")


def test_integer_linear_without_its_options() -> None:
    given = arguments(UGLY[4], -8, 7, planes=1)
    plain = {key: given[key] for key in ("value", "code", "weight", "scale", "low", "high")}
    given.update(bias=torch.zeros(81), step=torch.ones(()), offset=torch.zeros(()))
    given["weight_nonzero"] = torch.stack([ops.tile_pack(torch.ones(81, 197, dtype=torch.uint8), 1)])
    torch.testing.assert_close(ops.integer_linear(**plain), written_out(given), rtol=0, atol=0)


def test_integers_past_the_exact_floats() -> None:
    """255 times 70000 columns is more than 2^24: integers, then one rounding."""
    k = 70_001
    ones = torch.stack([ops.tile_pack(torch.ones(1, k, dtype=torch.uint8), 1)])
    code = torch.full((1, k), 255.0)
    y = ops.integer_linear(code, code, ones, torch.ones(1, 1), low=0, high=255)
    assert y.item() == torch.tensor(255 * k, dtype=torch.float64).float().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integer_linear_takes_any_layout(layout: str) -> None:
    given = arguments(UGLY[4], 0, 3)
    given["value"], given["code"] = given["value"][0], given["code"][0]
    want = ops.integer_linear(**given)
    given["value"], given["code"] = (LAYOUTS[layout](given[key]) for key in ("value", "code"))
    assert_same_bits(ops.integer_linear(**given), want)


def test_integer_linear_gradients() -> None:
    given = arguments(UGLY[4], -8, 7, rows=True)
    for name in ("value", "bias"):
        given[name].requires_grad_()
    y = ops.integer_linear(**given)
    g = torch.randn_like(y)
    y.backward(g)
    dense = sum(given["scale"][:, p : p + 1].double() * plane for p, plane in enumerate(dense_planes(given)))
    torch.testing.assert_close(given["value"].grad, (g.double() @ dense).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(given["bias"].grad, g.sum((0, 1)))


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 3)])
def test_integer_linear_opcheck(low: int, high: int) -> None:
    given = arguments(UGLY[3], low, high)
    given["value"].requires_grad_()
    given["bias"].requires_grad_()
    torch.library.opcheck(torch.ops.bitmill.integer_linear.default, tuple(given.values()))


def test_integer_linear_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.integer_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for problem in (UGLY[3], UGLY[3]._replace(m=9)):
        given = arguments(problem, 0, 3)
        assert_same_bits(compiled(**given), ops.integer_linear(**given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": -129}, "low must be from -128 to 0 and high from 1 to 255, got -129 and 3"),
        ({"high": 256}, "got 0 and 256"),
        ({"low": 1}, "got 1 and 3"),
        ({"code": torch.zeros(2, 5, 33).double()}, "code must be float32, bfloat16 or float16, got float64"),
        ({"value": torch.zeros(2, 5, 32)}, "value must have shape [2, 5, 33], got [2, 5, 32]"),
        ({"weight": torch.zeros(2, 2, 1, 16, dtype=torch.int32)}, "weight must have shape [2, 2, 2, 16]"),
        ({"scale": torch.zeros(17)}, "scale must have shape [n, planes] with a plane at least, got [17]"),
        ({"step": torch.zeros(2, 5)}, "step must have shape [2, 5, 1], got [2, 5]"),
        ({"offset": torch.zeros(1)}, "offset must have shape [2, 5, 1], got [1]"),
        ({"bias": torch.zeros(3)}, "bias must have shape [17], got [3]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_integer_linear_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"integer_linear: .*" + re.escape(message)):
        ops.integer_linear(**{**arguments(UGLY[3], 0, 3), **change})
