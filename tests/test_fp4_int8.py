# SPDX-License-Identifier: Apache-2.0
"""fp4_linear with int8 activations: compiled kernels are the default kernel bit for bit, and both the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill import ops
from fp4_inputs import FLOATS, GROUPS, SHAPES, WIDE, default_linear, layer
from problems import LAYOUTS, UGLY, Problem, assert_same_bits, on_every_machine


@pytest.mark.parametrize("format", ["e2m1", "e1m2", "e3m0", "codebook"])
@pytest.mark.parametrize(("group_size", "e8m0"), GROUPS)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (150, 200), (129, 1000)])
def test_int8_is_the_default_bit_for_bit(n: int, k: int, group_size: int, e8m0: bool, format: str) -> None:
    table = WIDE if format == "codebook" else None
    settings = {"format": "e2m1" if table is not None else format, "group_size": group_size, "codebook": table}
    for m in (1, 3, 4, 13):
        for dtype in FLOATS:
            a = layer(n, k, group_size, e8m0, dtype, (m,))
            if m == 3:
                a["bias"] = None
            if m == 13 and k > 0:
                a["x"][0], a["x"][1, -1], a["x"][2, 0] = 0.0, torch.nan, torch.inf
            want = default_linear(**a, **settings, activations="int8")
            for machine, got in on_every_machine(lambda a=a: ops.fp4_linear(**a, **settings, activations="int8")):
                assert_same_bits(got, want, f"m = {m}, {dtype}, {machine}")
            if m == 13 and k > 0 and n > 0:
                assert want[1].isnan().all() and want[2].isnan().all() and want[3:].isfinite().all()


@pytest.mark.parametrize("problem", UGLY, ids=lambda p: p.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_of_any_layout(layout: str, problem: Problem) -> None:
    a = layer(problem.n, problem.k, 16, leading=(problem.m,))
    want = default_linear(**a, group_size=16, activations="int8")
    x = LAYOUTS[layout](a["x"])
    for machine, got in on_every_machine(lambda: ops.fp4_linear(**(a | {"x": x}), group_size=16, activations="int8")):
        assert_same_bits(got, want, machine)


def test_int8_is_the_definition() -> None:
    a = layer(21, 90, 32)
    q, row_scale = ops.int8_quantize(a["x"])
    codes = ops.tile_unpack(a["weight"], 21, 90, 4).long()
    integers = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])[codes]
    total = torch.zeros(3, 21)
    for group in range(3):
        columns = slice(32 * group, 32 * group + 32)
        dot = q[:, columns].long() @ integers[:, columns].T
        total = total + (a["scale"][:, group] * 0.5) * dot.float()
    got = ops.fp4_linear(**a, group_size=32, activations="int8")
    assert_same_bits(got, total * row_scale[:, None] + a["bias"])
    exact = ops.fp4_linear(**a, group_size=32)
    assert (got - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    "codebook",
    [
        torch.randn(16),
        torch.arange(16.0) * 0.1,
        torch.tensor([128.0, *[1.0] * 15]),
        torch.tensor([torch.inf, *[1.0] * 15]),
        torch.tensor([torch.nan, *[1.0] * 15]),
        torch.tensor([1e30, *[1.0] * 15]),
    ],
    ids=["random", "tenths", "128", "inf", "nan", "spread"],
)
def test_int8_refuses_a_codebook_without_integers(codebook: Tensor) -> None:
    a = layer(5, 40)
    for kernel in (ops.fp4_linear, default_linear):
        with pytest.raises(ValueError, match="of codes must be integers of magnitude up to 127 times a power of two"):
            kernel(**a, codebook=codebook, activations="int8")


@pytest.mark.parametrize("codebook", [torch.zeros(16), torch.full((16,), -(2.0**127)), torch.full((16,), 2.0**-149)])
def test_int8_takes_extreme_codebooks(codebook: Tensor) -> None:
    a = layer(5, 40)
    settings = {"codebook": codebook, "activations": "int8"}
    for machine, got in on_every_machine(lambda: ops.fp4_linear(**a, **settings)):
        assert_same_bits(got, default_linear(**a, **settings), machine)


def test_int8_refuses_sums_beyond_int32() -> None:
    most = (2**31 - 1) // (127 * 127)
    x = torch.ones(1, most + 9)
    codes = torch.ones(1, most + 9, dtype=torch.uint8)  # 127 in WIDE
    a = {"x": x, "weight": ops.tile_pack(codes, 4), "scale": torch.ones(1, 1), "codebook": WIDE, "activations": "int8"}
    for kernel in (ops.fp4_linear, default_linear):
        with pytest.raises(ValueError, match=f"a group must have at most {most} columns .* got {most + 9}; pass a sm"):
            kernel(**a)
    a |= {"x": x[:, :most], "weight": ops.tile_pack(codes[:, :most].contiguous(), 4)}
    want = torch.full((1, 1), float(127 * 127 * most)) / 32 * (torch.ones(()) / 127)
    for machine, got in [*on_every_machine(lambda: ops.fp4_linear(**a)), ("default", default_linear(**a))]:
        assert_same_bits(got, want, machine)
