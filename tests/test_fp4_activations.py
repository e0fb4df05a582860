# SPDX-License-Identifier: Apache-2.0
"""FP4 activations as integers, and their products with FP4 weights: compiled kernels are the default kernel bit for
bit, and both the float64 product of the decoded values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitmill import ops
from bitmill.ops.fp4_activations import (
    BLOCKS,
    _fp4_activations_reference,
    _fp4_fp4_linear_reference,
)
from bitmill.ops.fpq import largest_shift
from problems import LAYOUTS, assert_same_bits, on_every_machine

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (16, 32), (19, 77), (33, 300), (5, 0), (0, 9), (150, 197)]
CASES = [("e2m1", "floor"), ("e1m2", "floor"), ("nvfp4", "floor"), *(("mxfp4", r) for r in ops.fp4.SCALE_RULES)]
each_case = pytest.mark.parametrize(("activations", "rule"), CASES, ids=lambda v: v)


def casting(k: int, format: str, rule: str = "floor") -> tuple[Any, ...]:
    """(format, input_scale, input_shift, scale_rule)."""
    if format in BLOCKS:
        return format, None, None, rule
    shift = torch.randint(0, largest_shift(format) + 1, (k,), dtype=torch.uint8)
    return format, torch.tensor(0.37), shift, rule


def linear(n: int, k: int, activations: str, rule: str = "floor", format: str = "e2m1") -> tuple[Any, ...]:
    """What follows x in fp4_fp4_linear."""
    width = BLOCKS.get(activations, 0)
    groups = -(-k // width) if width else 1
    low = 40 if activations == "nvfp4" else 118  # bytes of E4M3 or E8M0 around 1
    scale = torch.randint(low, low + 20, (n, groups), dtype=torch.uint8) if width else torch.rand(n, 1) + 0.1
    global_scale = torch.tensor(0.7) if activations == "nvfp4" else None
    weight = ops.tile_pack(torch.randint(0, 16, (n, k), dtype=torch.uint8), 4)
    return weight, scale, torch.randn(n), format, width, global_scale, *casting(k, activations, rule)


def awkward(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes of many binades, ties, zeros of both signs, a NaN and infinities."""
    x = torch.randn(m, k) * torch.exp2(torch.randint(-9, 9, (m, k)).float())
    x[:, ::3] = x[:, ::3].to(torch.float8_e4m3fn).float()
    x = x.nan_to_num(0.0)
    if m > 5 and k > 0:
        x[0], x[1, -1], x[2, 0], x[3, k // 2], x[4] = 0.0, torch.nan, torch.inf, -0.0, 1e-42
        x[5] = x[5].sign() * 3e38
    return x.to(dtype)


@each_case
@pytest.mark.parametrize("k", [1, 15, 16, 31, 33, 64, 200, 0])
def test_activations_are_the_default_bit_for_bit(activations: str, rule: str, k: int) -> None:
    for dtype in FLOATS:
        x, how = awkward(9, k, dtype), casting(k, activations, rule)
        q, scale = _fp4_activations_reference(x, *how)
        calls = on_every_machine(lambda x=x, how=how: torch.ops.bitmill.fp4_activations.default(x, *how))
        for machine, (got, got_scale) in calls:
            assert_same_bits(got_scale, scale, f"{dtype}, {machine}")
            assert_same_bits(got, q, f"{dtype}, {machine}")
        if k:
            assert scale[1].isnan().any() and scale[3:5].isfinite().all()
            assert scale[2].isnan().any() == (activations in BLOCKS)  # FPQ saturates


@each_case
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product_is_the_default_bit_for_bit(n: int, k: int, activations: str, rule: str) -> None:
    for m in (1, 3, 13):
        for dtype in FLOATS:
            x, arguments = awkward(m, k, dtype), linear(n, k, activations, rule)
            want = _fp4_fp4_linear_reference(x, *arguments)
            calls = on_every_machine(lambda x=x, a=arguments: torch.ops.bitmill.fp4_fp4_linear.default(x, *a))
            for machine, got in calls:
                assert_same_bits(got, want, f"m = {m}, {dtype}, {machine}")


@pytest.mark.parametrize("format", ["e2m1", "e1m2", "e3m0"])
@pytest.mark.parametrize("activations", ["e2m1", "e1m2"])
def test_fpq_integers_equal_the_float64_product_of_the_decoded_values(format: str, activations: str) -> None:
    """Exactly, whatever the biases; the output is one float32 rounding away."""
    n, k = 33, 1000
    x, codes = torch.randn(7, k), torch.randint(0, 16, (n, k), dtype=torch.uint8)
    values = torch.tensor(ops.code_values(format), dtype=torch.float64)[codes.int()]
    shift = torch.randint(0, largest_shift(activations) + 1, (k,), dtype=torch.uint8)
    for rho in (1.0, 0.8125, 0.3):
        scale = ops.fpq_scale(torch.tensor(rho), activations)
        step = scale * torch.exp2(-shift.float())
        decoded = ops.fp4_uncast(ops.fp4_cast(x / step, activations), k, activations).double() * step.double()
        assert torch.equal(decoded.float(), ops.fp4_activations_fake_quant(x, activations, scale, shift))
        q, row_scale = ops.fp4_activations(x, activations, scale, shift)
        assert q.abs().max() <= {"e2m1": 96, "e1m2": 14}[activations]
        assert torch.equal(decoded, q.double() * row_scale.double())
        want = decoded @ values.T  # within 53 bits, in any order
        assert torch.equal((q.double() @ values.T) * row_scale.double(), want)
        weight = ops.tile_pack(codes, 4), torch.ones(n, 1), None, format, 0, None
        assert torch.equal(ops.fp4_fp4_linear(x, *weight, activations, scale, shift), want.float())


def test_nvfp4_rows_do_not_depend_on_each_other() -> None:
    x = torch.randn(4, 64) * torch.tensor([1e-20, 1.0, 1e4, 1e20])[:, None]
    q, scale = ops.fp4_activations(x, "nvfp4")
    for row in range(4):
        alone, alone_scale = ops.fp4_activations(x[row], "nvfp4")
        assert torch.equal(alone, q[row]) and torch.equal(alone_scale, scale[row])
    decoded, x = ops.fp4_activations_fake_quant(x, "nvfp4").double(), x.double()
    assert ((decoded - x).norm(dim=1) / x.norm(dim=1) < 0.12).all()  # whatever its magnitude


@each_case
def test_fake_quant_is_the_product_of_both(activations: str, rule: str) -> None:
    x, how = torch.randn(2, 3, 77), casting(77, activations, rule)
    x.requires_grad_()
    q, scale = torch.ops.bitmill.fp4_activations.default(x, *how)
    width = BLOCKS.get(activations, 77)
    expected = q * scale.repeat_interleave(width, -1)[..., :77]
    fake = ops.fp4_activations_fake_quant(x, *how)
    torch.testing.assert_close(fake, expected, rtol=0, atol=0)
    upstream = torch.randn_like(x)
    fake.backward(upstream)
    clipped = torch.zeros_like(x, dtype=torch.bool)
    if activations not in BLOCKS:
        clipped = x.abs() > max(ops.code_values(activations)) * how[1] * torch.exp2(-how[2].float())
        assert clipped.any()
    assert torch.equal(x.grad, upstream * ~clipped)


@each_case
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_gradients_equal_those_of_the_training_form(leading: tuple[int, ...], activations: str, rule: str) -> None:
    weight, scale, bias, format, width, global_scale, *how = linear(19, 77, activations, rule)
    x, upstream = torch.randn(*leading, 77), torch.randn(*leading, 19)
    grads = []
    for packed in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x, bias, *([scale] if not width else []))]
        if packed:
            s = scale if width else inputs[2]
            out = ops.fp4_fp4_linear(inputs[0], weight, s, inputs[1], format, width, global_scale, *how)
        else:
            s = scale if width else inputs[2]
            dense = ops.fp4_weight(weight, s, 19, 77, format, width, global_scale=global_scale)
            out = nn.functional.linear(ops.fp4_activations_fake_quant(inputs[0], *how), dense, inputs[1])
        grads.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str) -> None:
    arguments = linear(19, 77, "nvfp4")
    x = torch.randn(6, 77)
    want = torch.ops.bitmill.fp4_fp4_linear.default(x, *arguments)
    assert_same_bits(torch.ops.bitmill.fp4_fp4_linear.default(LAYOUTS[layout](x), *arguments), want)


@pytest.mark.parametrize("activations", ["e2m1", "mxfp4", "nvfp4"])
def test_opcheck_and_compile(activations: str) -> None:
    arguments = linear(19, 77, activations)
    x = torch.randn(3, 77, requires_grad=True)
    torch.library.opcheck(torch.ops.bitmill.fp4_fp4_linear.default, (x, *arguments))
    torch.library.opcheck(torch.ops.bitmill.fp4_activations.default, (x.detach(), *casting(77, activations)))
    compiled = torch.compile(lambda x: ops.fp4_fp4_linear(x, *arguments) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.fp4_fp4_linear(x, *arguments) * 2)


def _errors() -> list[tuple[dict[str, Any], str]]:
    shift = torch.zeros(40, dtype=torch.uint8)
    return [
        ({"activations": "e3m0"}, 'activations must be "e2m1", "e1m2", "mxfp4" or "nvfp4", got "e3m0"'),
        ({"scale_rule": "round"}, "scale_rule must be"),
        ({"x": torch.randn(3, 40).double()}, "x must be float32, bfloat16 or float16, got float64"),
        ({"input_scale": None}, 'input_scale must be given for activations "e2m1"'),
        ({"activations": "mxfp4"}, 'input_scale must be None for activations "mxfp4"'),
        (
            {"activations": "nvfp4", "input_scale": None, "input_shift": shift},
            'input_shift must be None for activations "nvfp4"',
        ),
        ({"input_scale": torch.ones(1)}, r"input_scale must have shape \[\], got \[1\]"),
        ({"input_shift": shift[1:]}, r"input_shift must have shape \[40\], got \[39\]"),
        ({"input_shift": shift.int()}, "input_shift must be uint8, got int32"),
        ({"input_shift": shift + 4}, "input_shift must be at most 3 for this format, got more"),
        ({"group_size": 32}, 'group_size must be 0 for activations "e2m1", got 32'),
        (
            {"activations": "mxfp4", "input_scale": None, "group_size": 16},
            'group_size must be 32 for activations "mxfp4", got 16',
        ),
        ({"format": "nf4"}, "the values of codes must be integers of magnitude up to 127"),
        ({"weight": torch.zeros(1, 5, 16)}, "weight must be int32, got float32"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\], got \[4\]"),
    ]


@pytest.mark.parametrize(("changed", "message"), _errors(), ids=range(len(_errors())))
def test_errors_say_what_is_wrong(changed: dict[str, Any], message: str) -> None:
    weight = ops.tile_pack(torch.zeros(5, 40, dtype=torch.uint8), 4)
    arguments = {
        "x": torch.randn(3, 40), "weight": weight, "scale": torch.ones(5, 1), "bias": None, "format": "e2m1",
        "group_size": 0, "global_scale": None, "activations": "e2m1", "input_scale": torch.tensor(1.0),
        "input_shift": None, "scale_rule": "floor",
    }  # fmt: skip
    for kernel in (torch.ops.bitmill.fp4_fp4_linear.default, _fp4_fp4_linear_reference):
        with pytest.raises(ValueError, match=message):
            kernel(*(arguments | changed).values())
