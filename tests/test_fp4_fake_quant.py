# SPDX-License-Identifier: Apache-2.0
"""Fake quantisation: the casts' values, and the straight-through gradient with its clip mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitmill import ops
from problems import LAYOUTS, assert_same_bits

FORMATS = ("e2m1", "e1m2", "e3m0")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest_even", "stochastic", "toward_zero", "half_away")
each_format = pytest.mark.parametrize("format", FORMATS)
NF4 = "nf4"
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def largest_of(format: str) -> float:
    return max(ops.code_values(format))


def straight_through(x: Tensor, format: str, scale: Tensor, *rounding: object) -> Tensor:
    """The same written with autograd: a clip, whose gradient is its mask, and a difference without a gradient."""
    z = x.float() / scale
    clipped = z.clamp(-largest_of(format), largest_of(format))
    with torch.no_grad():
        values = ops.fp4_uncast(ops.fp4_cast(z, format, "max", *rounding), z.shape[-1], format)
    return (torch.where(z.isnan(), z, clipped + (values - clipped).detach()) * scale).to(x.dtype)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@each_format
@each_dtype
def test_values_and_gradient_are_those_of_a_clip(dtype: torch.dtype, format: str, rounding: str) -> None:
    plain = (torch.randn(4, 33) * 3).to(dtype)
    plain[0, :2] = torch.tensor([largest_of(format), -largest_of(format)])  # the ends learn
    for scale in (torch.tensor([[1.0], [0.5], [2.0], [0.25]]), torch.rand(33) + 0.5, torch.tensor(0.5)):
        upstream = torch.randn(4, 33).to(dtype)
        grads = []
        for function in (ops.fp4_fake_quant, straight_through):
            x = plain.clone().requires_grad_()
            out = function(x, format, scale, rounding, 3, 4)
            grads.append((out.detach(), *torch.autograd.grad(out, x, upstream)))
        (values, grad), (want_values, want_grad) = grads
        assert values.dtype == grad.dtype == dtype
        torch.testing.assert_close(values, want_values, rtol=1e-6, atol=1e-7)  # fl(a - b) + b may miss a by a bit
        exact = (grad == upstream) | (grad == 0)
        assert exact.all() and torch.equal(grad != 0, want_grad != 0)
        z = plain.float() / scale
        expected = ops.fp4_uncast(ops.fp4_cast(z, format, "max", rounding, 3, 4), 33, format) * scale
        assert_same_bits(values, expected.to(dtype))


@each_format
def test_special_values(format: str) -> None:
    largest = largest_of(format)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 2 * largest]).requires_grad_()
    out = ops.fp4_fake_quant(x, format, 0.5)
    assert out[0].isnan() and out[1:].tolist() == [largest / 2, -largest / 2, -0.0, largest / 2]
    assert out[3].signbit()
    (grad,) = torch.autograd.grad(out, x, torch.ones(5))
    assert grad.tolist() == [0, 0, 0, 1, 0]
    assert ops.fp4_fake_quant(torch.tensor(1.0), format, 1.0).shape == ()
    assert ops.fp4_fake_quant(torch.empty(0, 3), format, 1.0).shape == (0, 3)


@each_format
def test_the_largest_weight_learns(format: str) -> None:
    amax = torch.rand(10_000, 1).add(0.1).requires_grad_()  # amax / (amax / largest) may round above largest
    ops.fp4_fake_quant(amax, format, amax.detach() / largest_of(format)).sum().backward()
    assert amax.grad.eq(1).all()


def test_any_layout() -> None:
    x = torch.randn(5, 12)
    want = ops.fp4_fake_quant(x, "e2m1", 0.3, "stochastic", 1)
    for layout in LAYOUTS.values():
        assert_same_bits(ops.fp4_fake_quant(layout(x), "e2m1", 0.3, "stochastic", 1), want)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_blocks_go_straight_through(rounding: str) -> None:
    x, g, table = torch.randn(3, 50), torch.tensor(0.01), "stochastic" if rounding == "stochastic" else "nearest"
    blocks, bytes, codes = (
        ops.mxfp4_quantize(x, "rceil", rounding, 5, 6),
        ops.nvfp4_quantize(x, g, rounding, 5, 6),
        ops.codebook4_quantize(x, "nf4", 16, table, 5, 6),
    )
    for fake, want in (
        (lambda t: ops.mxfp4_fake_quant(t, "rceil", rounding, 5, 6), ops.mxfp4_dequantize(*blocks, 50)),
        (lambda t: ops.nvfp4_fake_quant(t, g, rounding, 5, 6), ops.nvfp4_dequantize(*bytes, 50, g)),
        (
            lambda t: ops.codebook4_fake_quant(t, "nf4", 16, table, 5, 6),
            ops.codebook4_dequantize(*codes, "nf4", 50, 16),
        ),
    ):
        leaf = x.clone().requires_grad_()
        out = fake(leaf)
        assert_same_bits(out.detach(), want)
        (grad,) = torch.autograd.grad(out, leaf, upstream := torch.randn(3, 50))
        assert torch.equal(grad, upstream)


def test_opcheck_and_a_compiled_graph() -> None:
    x, scale = torch.randn(4, 33), torch.rand(4, 1) + 0.1
    op = torch.ops.bitmill.fp4_fake_quant.default
    for rows, s in ((x, scale), (x.T.half(), torch.rand(4)), (x[0, 0], torch.tensor(0.5)), (x[:0], scale[:1])):
        torch.library.opcheck(op, (rows.detach().requires_grad_(), s, "e3m0", "stochastic", 5, 6))

    def step(t: Tensor, offset: int) -> Tensor:
        return ops.fp4_fake_quant(t, "e2m1", scale[0], "stochastic", 0, offset) + ops.mxfp4_fake_quant(t, offset=offset)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for offset in (3, 4, 1 << 40):
        with torch._dynamo.config.patch(error_on_recompile=offset > 4):
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            outs = compiled(leaves[0], offset), step(leaves[1], offset)
            assert torch.equal(*outs)
            assert torch.equal(*(torch.autograd.grad(o.sum(), t)[0] for o, t in zip(outs, leaves, strict=True)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.fp4_fake_quant(x.double(), "e2m1", 1.0), "x must be float32, bfloat16 or float16, got float64"),
        (lambda x: ops.fp4_fake_quant(x, "nf4", 1.0), 'format must be "e2m1", "e1m2" or "e3m0", got "nf4"'),
        (lambda x: ops.fp4_fake_quant(x, "e2m1", 1.0, "up"), 'rounding must be .* got "up"'),
        (
            lambda x: ops.fp4_fake_quant(x, "e2m1", torch.ones(3)),
            r"scale must be broadcastable to \[2, 4\], got shape \[3\]",
        ),
        (
            lambda x: ops.fp4_fake_quant(x, "e2m1", torch.ones(2, 2, 4)),
            r"scale must be broadcastable .* got shape \[2, 2, 4\]",
        ),
        (lambda x: ops.fp4_fake_quant(x, "e2m1", torch.ones(4).double()), "scale must be float32, got float64"),
    ],
)
def test_errors(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"fp4_fake_quant: {message}"):
        call(torch.randn(2, 4))
