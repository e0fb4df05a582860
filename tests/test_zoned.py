# SPDX-License-Identifier: Apache-2.0
"""The ops of the zoned family: compiled kernels against the default kernel and the formula, and arrays that lie."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitmill.config import ZonedConfig
from bitmill.ops import _library, zoned
from bitmill.ops.zoned import _zoned_linear_reference, _zoned_weight_reference
from problems import LAYOUTS, UGLY, on_every_machine
from zoned_inputs import FORMS, form_name, zoned_weight_of

OP, WEIGHT_OP = torch.ops.bitmill.zoned_linear.default, torch.ops.bitmill.zoned_weight.default
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHARES = (0.2, 0.0, 1.0, 0.03)

compiled = pytest.mark.skipif(not _library.has_compiled_kernel("zoned_linear"), reason="no compiled kernels")
every_form = pytest.mark.parametrize("config", FORMS, ids=form_name)


def arrays_of(config: ZonedConfig, n: int, k: int, share: float = 0.2) -> zoned.Arrays:
    dtype = torch.float16 if config.scale_bits == 16 else torch.float32
    return zoned.pack(zoned_weight_of(config, n, k, share), config.block, dtype)


def assert_agrees(x: Tensor, arrays: zoned.Arrays, bias: Tensor | None, n: int, block: int) -> None:
    """Results are within float32 summation error of a float64 product with the default kernel's weight."""
    reference = _zoned_linear_reference(x, *arrays, bias, n, block)
    dense = _zoned_weight_reference(*arrays, n, x.shape[-1], block).double()
    exact = x.double() @ dense.T + (0 if bias is None else bias)
    # A zone's sum is made of sums of the whole block, so a term is as large as the largest scale of its row.
    largest = dense.abs().amax(1, keepdim=True) if x.shape[-1] else dense.new_zeros(n, 1)
    allowed = x.double().abs().sum(-1, keepdim=True) * largest.T * 3e-6 + exact.abs() * TOLERANCE[x.dtype] + 1e-6
    for machine, out in [*on_every_machine(lambda: OP(x, *arrays, bias, n, block)), ("reference", reference)]:
        assert out.dtype == x.dtype and out.shape == reference.shape and out.is_contiguous(), machine
        assert ((out.double() - exact).abs() <= allowed).all(), machine


@every_form
@pytest.mark.parametrize("k", [1, 7, 31, 32, 33, 65, 100, 128, 197, 300])
def test_zoned_linear_equals_the_formula(config: ZonedConfig, k: int) -> None:
    for i, (n, m) in enumerate(itertools.product((1, 15, 17, 100), (1, 6))):
        arrays = arrays_of(config, n, k, SHARES[i % 4])
        assert_agrees(torch.randn(m, k), arrays, torch.randn(n) if i % 3 else None, n, config.block)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zoned_linear_batches_and_dtypes(config: ZonedConfig, dtype: torch.dtype) -> None:
    arrays = arrays_of(config, 33, 197)
    for m in (0, 1, 3, 4, 5, 8, 65):
        assert_agrees(torch.randn(m, 197).to(dtype), arrays, torch.randn(33), 33, config.block)


@every_form
def test_zoned_linear_of_every_layout_and_ugly_size(config: ZonedConfig) -> None:
    for _, m, n, k in UGLY:
        assert_agrees(torch.randn(m, k), arrays_of(config, n, k), torch.randn(n), n, config.block)
    arrays, x = arrays_of(config, 18, 65), torch.randn(6, 65)
    expected = OP(x, *arrays, None, 18, config.block)
    for name, layout in LAYOUTS.items():
        assert torch.equal(OP(layout(x), *arrays, None, 18, config.block), expected), name
    for shape in ((65,), (2, 3, 65), (0, 3, 65)):
        assert_agrees(torch.randn(shape), arrays, None, 18, config.block)


@every_form
def test_zoned_weight_is_exact_and_pack_is_undone(config: ZonedConfig) -> None:
    for n, k, share in itertools.product((1, 17, 40), (1, 33, 96, 300), SHARES):
        weight = zoned_weight_of(config, n, k, share)
        arrays = zoned.pack(weight, config.block, torch.float16 if config.scale_bits == 16 else torch.float32)
        value = weight.value(config.block)
        for _, dense in on_every_machine(lambda: WEIGHT_OP(*arrays, n, k, config.block)):  # noqa: B023
            assert torch.equal(dense, value)
        assert torch.equal(_zoned_weight_reference(*arrays, n, k, config.block), value)
        again = zoned.unpack("test", arrays, n, k, config.block)
        for field, one, other in zip(weight._fields, weight, again, strict=True):
            one, other = (t & weight.salient if field == "second" else t for t in (one, other))
            assert (one is None and other is None) or torch.equal(one, other), field


def test_zoned_weight_follows_the_formula() -> None:
    for config in FORMS:
        n, k, block = 5, 200, config.block
        w = zoned_weight_of(config, n, k)
        dense, zones = w.value(block), ("concentrated", "sparse", "salient", "sparse salient")
        for r, c in itertools.product(range(n), range(k)):
            scales = iter(w.scale[r, c // block])
            table = {}
            for name in zones[: 4 if config.split_salient else 3]:
                mu = next(scales) if config.centre else 0.0
                table[name] = mu, next(scales), next(scales) if "salient" in name else 0.0
            salient = "sparse salient" if config.split_salient and w.sparse[r, c] else "salient"
            mu, alpha, beta = table[salient if w.salient[c] else "sparse" if w.sparse[r, c] else "concentrated"]
            value = mu + (alpha if w.first[r, c] else -alpha)
            value = value + (beta if w.second[r, c] else -beta) if w.salient[c] else value
            torch.testing.assert_close(dense[r, c], value * (w.column_scale[c] if config.column_scale else 1.0))


@compiled
@every_form
def test_zoned_linear_rows_and_threads_change_nothing(config: ZonedConfig) -> None:
    arrays, x = arrays_of(config, 300, 500), torch.randn(70, 500)
    results: dict[str, Tensor] = {}
    for machine, out in on_every_machine(lambda: OP(x, *arrays, None, 300, config.block)):
        assert torch.equal(out, results.setdefault(machine.split(",")[0], out)), machine
    whole = OP(x, *arrays, None, 300, config.block)
    for part in (slice(0, 1), slice(3, 9), slice(66, 70)):
        assert torch.equal(OP(x[part], *arrays, None, 300, config.block), whole[part])


@every_form
def test_zoned_linear_has_the_gradients_of_its_weight(config: ZonedConfig) -> None:
    arrays = arrays_of(config, 18, 65)
    x, bias = torch.randn(3, 65, requires_grad=True), torch.randn(18, requires_grad=True)
    g = torch.randn(3, 18)
    (OP(x, *arrays, bias, 18, config.block) * g).sum().backward()
    torch.testing.assert_close(x.grad, g @ WEIGHT_OP(*arrays, 18, 65, config.block))
    torch.testing.assert_close(bias.grad, g.sum(0))


def test_opcheck_and_compile() -> None:
    for config in (FORMS[1], FORMS[4]):
        arrays = arrays_of(config, 18, 65)
        x, bias = torch.randn(3, 65, requires_grad=True), torch.randn(18, requires_grad=True)
        torch.library.opcheck(OP, (x, *arrays, bias, 18, config.block))
        torch.library.opcheck(WEIGHT_OP, (*arrays, 18, 65, config.block))
        torch._dynamo.reset()
        compiled = torch.compile(zoned.zoned_linear, fullgraph=True)
        torch.testing.assert_close(compiled(x, *arrays, bias, 18, config.block), OP(x, *arrays, bias, 18, config.block))


def test_says_what_is_wrong() -> None:
    config, n, k = FORMS[4], 18, 200
    good, x = arrays_of(config, n, k), torch.randn(3, k)
    names = ("sign", "zone", "salient_zone", "salient", "scale", "column_scale")

    def refused(match: str, x: Tensor = x, bias: Tensor | None = None, n: int = n, block: int = 128, **changed) -> None:
        arrays = [changed.get(name, t) for name, t in zip(names, good, strict=True)]
        for function in (OP, _zoned_linear_reference):
            with pytest.raises(ValueError, match=match):
                function(x, *arrays, bias, n, block)

    for name, t in zip(names, good, strict=True):
        refused(f"zoned_linear: {name} must (have shape|be float32, got)", **{name: t[:-1]})
        wrong = torch.int64 if t.dtype == torch.int32 else torch.float64
        refused(f"zoned_linear: {name} must be", **{name: t.to(wrong)})
    refused("x must be float32, bfloat16 or float16", x=x.double())
    refused("bias must have shape", bias=torch.zeros(3))
    refused("block must be a positive multiple of 32 up to 16777216, got 100", block=100)
    refused("n must be at least 0", n=-1)
    wide = torch.cat([good[2], good[2], good[2]], 1).contiguous()
    for contradiction in ({"salient_zone": wide}, {"salient": torch.zeros_like(good[3])}):
        refused("zoned_linear: the packed arrays contradict each other", **contradiction)
        with pytest.raises(ValueError, match="contradict"):
            OP(x[:0], *[contradiction.get(name, t) for name, t in zip(names, good, strict=True)], None, n, 128)
