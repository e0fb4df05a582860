# SPDX-License-Identifier: Apache-2.0
"""The ops of the salient_scatter family: compiled kernels against the default kernel, and arrays that lie."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitmill.ops import _library, salient_linear, salient_weight, tile_pack, tile_unpack
from bitmill.ops import _salient_encoding as encoding
from bitmill.ops.salient_scatter import _salient_weight_reference
from problems import LAYOUTS, UGLY, on_every_machine
from salient_inputs import ENCODINGS, OP, WEIGHT_OP, Case, assert_agrees, every_activation, every_encoding

WIDTHS = (1, 7, 31, 32, 33, 63, 64, 65, 100, 197, 768)
ROWS = (1, 2, 15, 16, 17, 100)

compiled = pytest.mark.skipif(not _library.has_compiled_kernel("salient_linear"), reason="no compiled kernels")


@every_activation
@every_encoding
@pytest.mark.parametrize("k", WIDTHS)
def test_salient_linear_equals_default_kernel(k: int, kind: str, activations: str) -> None:
    for i, (n, m) in enumerate(itertools.product(ROWS, (1, 17))):
        case = Case(n, k, (0.1, 0.3, 0.0, 1.0)[i % 4], i % 3 != 0, i % 2 == 0, (0, 32, 0, 64)[i % 4], kind)
        bias = torch.randn(n) if i % 2 else None
        assert_agrees(torch.randn(m, k), case.arrays(), bias, case.group_size, activations, n <= 17)


@every_activation
@every_encoding
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_salient_linear_batches_and_dtypes(m: int, dtype: torch.dtype, kind: str, activations: str) -> None:
    for codes, k in ((True, 197), (False, 197), (True, 600)):
        arrays = Case(33, k, 0.2, codes, kind=kind).arrays()
        assert_agrees(torch.randn(m, k).to(dtype), arrays, torch.randn(33), 0, activations, m < 10)


@every_activation
@every_encoding
def test_salient_linear_of_every_layout_and_ugly_size(kind: str, activations: str) -> None:
    for _, m, n, k in UGLY:
        assert_agrees(torch.randn(m, k), Case(n, k, 0.3, kind=kind).arrays(), torch.randn(n), 0, activations)
    case = Case(18, 65, 0.2, kind=kind)
    arrays, x = case.arrays(), torch.randn(6, 65)
    expected = OP(x, *arrays, None, 0, activations)
    for name, layout in LAYOUTS.items():
        assert torch.equal(OP(layout(x), *arrays, None, 0, activations), expected), name


@every_activation
@every_encoding
@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.5])
def test_salient_linear_of_wide_rows(fraction: float, kind: str, activations: str) -> None:
    """Gaps above 255 columns, several segments and chunks, sums that need more than one flush."""
    for k, group_size in ((3000, 0), (2100, 1024)):
        arrays = Case(18, k, fraction, group_size=group_size, kind=kind).arrays()
        for m in (1, 9):
            assert_agrees(torch.randn(m, k), arrays, None, group_size, activations)


@every_activation
@every_encoding
def test_codes_of_4_bits_are_codes_of_8_bits_in_half_the_bytes(kind: str, activations: str) -> None:
    encode = {"bitmap": encoding.encode_bitmap, "list": encoding.encode_list, "columns": encoding.encode_columns}[kind]
    for (n, k), fraction, group_size in itertools.product(((1, 7), (19, 70), (40, 601)), (0.0, 0.13, 1.0), (0, 32)):
        arrays = Case(n, k, fraction, group_size=group_size).arrays()
        salient, value = torch.rand(n, k) < fraction, torch.randint(16, (n, k), dtype=torch.uint8)
        if kind == "columns":
            salient = salient[0].expand(n, k)
        marked = salient[0] if kind == "columns" else salient
        plain, narrow = list(arrays), list(arrays)
        for target, bits in ((plain, 8), (narrow, 4)):
            target[0] = tile_pack((~salient & (value % 3 > 0)).to(torch.uint8), 1)
            target[1:4] = encode(marked, value, bits)
        if kind != "columns":
            assert narrow[2].numel() == (plain[2].numel() + 1) // 2
        assert torch.equal(salient_weight(*narrow, k, group_size, 4), salient_weight(*plain, k, group_size))
        assert torch.equal(_salient_weight_reference(*narrow, k, group_size, 4), salient_weight(*plain, k, group_size))
        for m in (0, 1, 5, 40):
            x = torch.randn(m, k)
            wanted = on_every_machine(lambda: OP(x, *plain, None, group_size, activations))  # noqa: B023
            got = on_every_machine(lambda: OP(x, *narrow, None, group_size, activations, 4))  # noqa: B023
            for (machine, a), (_, b) in zip(got, wanted, strict=True):
                assert torch.equal(a, b), machine


@every_encoding
def test_salient_int8_sums_are_exact(kind: str) -> None:
    """Integers that add up to far more than 2^24: the largest codes and activations, 3000 times."""
    case = Case(17, 3000, 1.0, kind=kind)
    arrays = case.arrays()
    arrays[2].fill_(255 if kind != "columns" else -1)
    arrays[4].zero_()
    arrays[5], arrays[6], arrays[7] = None, torch.ones(17), torch.zeros(17)
    for m in (1, 8):
        x = torch.ones(m, 3000) * 127
        for _, out in on_every_machine(lambda: OP(x, *arrays, None, 0, "int8")):  # noqa: B023
            expected = torch.full((m, 17), 127.0 * 255 * 3000)
            assert ((out - expected).abs() <= expected * 2e-7).all()


@every_encoding
def test_salient_int8_of_nan_zeros_and_infinity(kind: str) -> None:
    arrays, x = Case(17, 65, 0.3, kind=kind).arrays(), torch.randn(9, 65)
    x[1, 3], x[2], x[3, 5] = float("nan"), 0.0, float("inf")
    for m in (9, 4):
        for _, out in on_every_machine(lambda: OP(x[:m], *arrays, None, 0, "int8")):  # noqa: B023
            assert out[1].isnan().all() and (out[2] == 0).all() and not out[3].isfinite().any()
            assert torch.isfinite(out[[0, *range(4, m)]]).all()


@every_encoding
def test_salient_infinities_stay_in_their_rows(kind: str) -> None:
    arrays = Case(40, 70, 0.3, codes=False, kind=kind).arrays()
    value = arrays[2].view(torch.float16)
    value[value > 2.3] = float("inf")
    hit = salient_weight(*arrays, 70).isinf().any(1)
    assert hit.any() and not hit.all()
    for m in (1, 5):
        for machine, out in on_every_machine(lambda: OP(torch.ones(m, 70), *arrays, None, 0, "float")):  # noqa: B023
            assert torch.equal(out.isinf(), hit.expand(m, 40)), machine


@every_activation
@every_encoding
@pytest.mark.parametrize("n,k,group_size", [(0, 40, 0), (3, 0, 0), (3, 0, 32), (0, 0, 0)])
def test_salient_linear_of_nothing(n: int, k: int, group_size: int, kind: str, activations: str) -> None:
    arrays, bias = Case(n, k, group_size=group_size, kind=kind).arrays(), torch.randn(n)
    for m in (0, 2, 40):
        for _, out in on_every_machine(lambda: OP(torch.randn(m, k), *arrays, bias, group_size, activations)):  # noqa: B023
            assert torch.equal(out, bias.expand(m, n))
    assert salient_weight(*arrays, k, group_size).shape == (n, k)


@every_activation
def test_salient_linear_of_more_columns_than_a_list_or_int32_sums_hold(activations: str) -> None:
    k = 70001
    for kind in ("bitmap", "columns"):
        arrays = Case(3, k, 0.01, kind=kind).arrays()
        for m in (1, 9):
            assert_agrees(torch.randn(m, k), arrays, None, 0, activations)
    arrays = Case(3, 65535, 0.01, kind="list").arrays()
    for m in (1, 9):
        assert_agrees(torch.randn(m, 65535), arrays, None, 0, activations)
    with pytest.raises(ValueError, match="fewer than 65536"):
        OP(torch.randn(1, k), tile_pack(torch.zeros(3, k, dtype=torch.uint8), 1), *arrays[1:], None, 0, activations)


@pytest.mark.parametrize("k", WIDTHS)
def test_salient_weight_is_exact(k: int) -> None:
    for fraction, codes, centred, group_size in [
        (0.1, True, True, 32),
        (0.3, False, True, 64),
        (0.2, True, False, 0),
        (0.0, True, True, 0),
        (0.0, False, False, 0),
        (1.0, False, True, 32),
        (1.0, True, True, 0),
    ]:
        for kind in ENCODINGS:
            arrays = Case(17, k, fraction, codes, centred, group_size, kind).arrays()
            dense = salient_weight(*arrays, k, group_size)
            assert dense.dtype == torch.float32
            assert torch.equal(dense, _salient_weight_reference(*arrays, k, group_size))


def test_salient_weight_follows_the_formula() -> None:
    case = Case(5, 70, 0.3, group_size=32)
    weight, mask, value, start, alpha, mu, scale, zero = case.arrays()
    dense = salient_weight(weight, mask, value, start, alpha, mu, scale, zero, 70, 32)
    signs, salient, entry = tile_unpack(weight, 5, 70, 1), tile_unpack(mask, 5, 70, 1), 0
    for r in range(5):
        assert entry == int(start[r])
        for c in range(70):
            if salient[r, c]:
                expected = scale[r] * (value[entry].float() - zero[r])
                entry += 1
            else:
                expected = mu[r, c // 32] + alpha[r, c // 32] * (1.0 if signs[r, c] else -1.0)
            assert dense[r, c] == expected


def test_salient_linear_of_strided_and_stacked_inputs() -> None:
    case = Case(18, 65, 0.2)
    arrays = case.arrays()
    for x in (
        torch.randn(65),
        torch.randn(2, 3, 65),
        torch.randn(2, 1, 3, 65),
        torch.randn(65, 4).T,
        torch.randn(4, 130)[:, ::2],
        torch.randn(1, 65).expand(5, 65),
        torch.randn(6, 65)[::2],
        torch.randn(0, 3, 65),
    ):
        assert_agrees(x, arrays, torch.randn(18), 0)
    strided = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in arrays]
    assert_agrees(torch.randn(3, 65), strided, torch.stack([torch.randn(18)] * 2, -1)[:, 0], 0)
    one = [arrays[0], arrays[1], arrays[2], arrays[3], torch.ones(1, 1).expand(18, 1), *arrays[5:]]
    assert_agrees(torch.randn(3, 65), one, None, 0)


@compiled
@every_activation
@every_encoding
def test_salient_linear_does_not_depend_on_threads(kind: str, activations: str) -> None:
    arrays, x = Case(300, 768, 0.1, group_size=128, kind=kind).arrays(), torch.randn(70, 768)
    results: dict[str, Tensor] = {}
    for machine, out in on_every_machine(lambda: OP(x, *arrays, None, 128, activations)):
        assert torch.equal(out, results.setdefault(machine.split(",")[0], out)), machine


@compiled
@every_activation
@every_encoding
def test_salient_linear_rows_do_not_depend_on_the_batch(kind: str, activations: str) -> None:
    """Except for a bitmap with float activations, which adds up single rows in another order."""
    arrays, x = Case(20, 197, 0.2, kind=kind).arrays(), torch.randn(600, 197)
    whole = OP(x, *arrays, None, 0, activations)
    for part in (slice(0, 1), slice(255, 258), slice(599, 600), slice(3, 12)):
        out = OP(x[part], *arrays, None, 0, activations)
        if kind == "bitmap" and activations == "float":
            torch.testing.assert_close(out, whole[part], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(out, whole[part])


def test_salient_bits_past_the_end_are_ignored() -> None:
    arrays, x = Case(19, 70, 0.3).arrays(), torch.randn(3, 70)
    expected = OP(x, *arrays, None, 0, "float"), salient_weight(*arrays, 70)
    for index in (0, 1):
        arrays[index] = arrays[index].clone()
        arrays[index][:, -1] |= ~((1 << 6) - 1)  # columns 70 ... 95
        arrays[index][1, :, 3:] = -1  # rows 19 ... 31
    for activations, m in itertools.product(("float", "int8"), (1, 3, 40)):
        wide = torch.randn(m, 70)
        dense = salient_weight(*arrays, 70)
        for machine, out in on_every_machine(lambda: OP(wide, *arrays, None, 0, activations)):  # noqa: B023
            torch.testing.assert_close(out, wide @ dense.T, rtol=0.05, atol=0.1 * (70**0.5), msg=machine)
    assert torch.equal(OP(x, *arrays, None, 0, "float"), expected[0])
    assert torch.equal(salient_weight(*arrays, 70), expected[1])
    assert torch.equal(_salient_weight_reference(*arrays, 70, 0), expected[1])


def narrow_codes(arrays: list, case: Case) -> list:
    """The same weight with the low halves of its codes."""
    salient, value = encoding.decode("test", tuple(arrays[1:4]), case.n, case.k, 8)
    encode = {"bitmap": encoding.encode_bitmap, "list": encoding.encode_list, "columns": encoding.encode_columns}
    marked = salient[0] if case.kind == "columns" else salient
    return [arrays[0], *encode[case.kind](marked, value.to(torch.uint8) & 15, 4), *arrays[4:]]


OPCHECKS = [
    Case(17, 65, 0.2),
    Case(3, 33, 0.3, codes=False, kind="list"),
    Case(5, 100, 0.2, centred=False, group_size=32, kind="columns"),
    Case(4, 64, 0.0, group_size=64),
    Case(17, 300, 0.01, kind="list"),
]


@every_activation
@pytest.mark.parametrize("case", OPCHECKS, ids=str)
def test_salient_ops_pass_opcheck(case: Case, activations: str) -> None:
    arrays = case.arrays()
    x, bias = torch.randn(2, 3, case.k, requires_grad=True), torch.randn(case.n, requires_grad=True)
    torch.library.opcheck(OP, (x, *arrays, bias, case.group_size, activations))
    torch.library.opcheck(OP, (torch.randn(4, case.k).bfloat16(), *arrays, None, case.group_size, activations))
    torch.library.opcheck(WEIGHT_OP, (*arrays, case.k, case.group_size))
    if case.codes and activations == "float" and case.group_size != 64:
        narrow = narrow_codes(arrays, case)
        torch.library.opcheck(OP, (x, *narrow, bias, case.group_size, activations, 4))
        torch.library.opcheck(WEIGHT_OP, (*narrow, case.k, case.group_size, 4))


@every_activation
@pytest.mark.parametrize("case", OPCHECKS, ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 3)])
def test_salient_linear_gradients(case: Case, shape: tuple[int, ...], activations: str) -> None:
    arrays = case.arrays()
    x, bias = torch.randn(*shape, case.k, requires_grad=True), torch.randn(case.n, requires_grad=True)
    out = salient_linear(x, *arrays, bias, case.group_size, activations)
    g = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, bias), g)
    dense = salient_weight(*arrays, case.k, case.group_size)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), g)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_salient_linear_gradient_dtype_is_that_of_x() -> None:
    case = Case(6, 40, 0.2)
    x = torch.randn(3, 40, dtype=torch.bfloat16, requires_grad=True)
    salient_linear(x, *case.arrays()).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@every_activation
@every_encoding
def test_salient_linear_compiles_with_a_dynamic_batch(kind: str, activations: str) -> None:
    case = Case(20, 70, 0.2, group_size=32, kind=kind)
    arrays, bias = case.arrays(), torch.randn(20, requires_grad=True)
    torch._dynamo.reset()

    def call(x: Tensor) -> Tensor:
        return salient_linear(x, *arrays, bias, 32, activations) * 2

    compiled_op = torch.compile(call, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (11, 5, 8):  # the first unlike every other size, which torch would take for the same symbol
            x = torch.randn(m, 70, requires_grad=True)
            out, eager = compiled_op(x), call(x)
            assert torch.equal(out, eager)
            got, expected = (torch.autograd.grad(y.sum(), (x, bias)) for y in (out, eager))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
