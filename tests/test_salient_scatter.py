# SPDX-License-Identifier: Apache-2.0
"""The ops of the salient_scatter family: compiled kernel against the default kernel, and arrays that lie."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bitmill.ops import _library, salient_linear, salient_weight, tile_pack, tile_unpack
from bitmill.ops.salient_scatter import _salient_linear_reference, _salient_weight_reference

OP, WEIGHT_OP = torch.ops.bitmill.salient_linear.default, torch.ops.bitmill.salient_weight.default
WIDTHS = (1, 7, 31, 32, 33, 63, 64, 65, 100, 197, 768)
ROWS = (1, 2, 15, 16, 17, 100)
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}

compiled = pytest.mark.skipif(not _library.has_compiled_kernel("salient_linear"), reason="no compiled kernels")


@dataclasses.dataclass
class Case:
    n: int
    k: int
    fraction: float = 0.1
    codes: bool = True
    centred: bool = True
    group_size: int = 0

    def arrays(self) -> list[torch.Tensor | None]:
        """weight, mask, value, start, alpha, mu, value_scale, value_zero: random, none of them a default."""
        groups = -(-self.k // self.group_size) if self.group_size else 1
        salient = torch.rand(self.n, self.k) < self.fraction
        plus = torch.rand(self.n, self.k) < 0.5
        entries = int(salient.sum())
        start = torch.nn.functional.pad(salient.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        value = torch.randint(0, 256, (entries,), dtype=torch.uint8) if self.codes else torch.randn(entries).half()
        return [
            tile_pack((plus & ~salient).to(torch.uint8), 1),
            tile_pack(salient.to(torch.uint8), 1),
            value,
            start,
            torch.rand(self.n, groups),
            torch.randn(self.n, groups) * 0.1 if self.centred else None,
            torch.rand(self.n) * 0.02 + 0.01 if self.codes else None,
            torch.randint(0, 256, (self.n,)).float() if self.codes else None,
        ]


def assert_agrees(x: torch.Tensor, arrays: list, bias: torch.Tensor | None, group_size: int) -> None:
    """The compiled result is within float32 summation error of a float64 product with the default kernel's weight."""
    out = OP(x, *arrays, bias, group_size)
    reference = _salient_linear_reference(x, *arrays, bias, group_size)
    assert out.dtype == reference.dtype == x.dtype and out.shape == reference.shape and out.is_contiguous()
    dense = _salient_weight_reference(*arrays, x.shape[-1], group_size).double()
    exact = x.double() @ dense.T + (0 if bias is None else bias)
    magnitude = x.double().abs() @ dense.abs().T + (0 if bias is None else bias.abs())
    allowed = magnitude * 1e-5 + exact.abs() * TOLERANCE[x.dtype] + 1e-6
    assert ((out.double() - exact).abs() <= allowed).all()
    assert ((reference.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("k", WIDTHS)
def test_salient_linear_equals_default_kernel(k: int) -> None:
    for i, (n, m) in enumerate(itertools.product(ROWS, (1, 17))):
        case = Case(n, k, (0.1, 0.3, 0.0, 1.0)[i % 4], i % 3 != 0, i % 2 == 0, (0, 32, 64)[i % 3])
        bias = torch.randn(n) if i % 2 else None
        assert_agrees(torch.randn(m, k), case.arrays(), bias, case.group_size)


@pytest.mark.parametrize("m", [0, 1, 2, 15, 16, 17, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_salient_linear_batches_and_dtypes(m: int, dtype: torch.dtype) -> None:
    for codes in (True, False):
        assert_agrees(torch.randn(m, 197).to(dtype), Case(33, 197, 0.2, codes).arrays(), torch.randn(33), 0)


@pytest.mark.parametrize("n,k,group_size", [(0, 40, 0), (3, 0, 0), (3, 0, 32), (0, 0, 0)])
def test_salient_linear_of_nothing(n: int, k: int, group_size: int) -> None:
    arrays, bias = Case(n, k, group_size=group_size).arrays(), torch.randn(n)
    assert torch.equal(OP(torch.randn(2, k), *arrays, bias, group_size), bias.expand(2, n))
    assert salient_weight(*arrays, k, group_size).shape == (n, k)


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
        arrays = Case(17, k, fraction, codes, centred, group_size).arrays()
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
def test_salient_linear_does_not_depend_on_threads() -> None:
    arrays, x = Case(300, 768, 0.1, group_size=128).arrays(), torch.randn(70, 768)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((OP(x, *arrays, None, 128), salient_weight(*arrays, 768, 128)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_salient_linear_rows_do_not_depend_on_the_batch() -> None:
    if not _library.has_compiled_kernel("salient_linear"):
        pytest.skip("the default kernel's matrix product chooses its order by the batch")
    arrays, x = Case(20, 197, 0.2).arrays(), torch.randn(600, 197)
    whole = OP(x, *arrays, None, 0)
    for part in (slice(0, 1), slice(255, 258), slice(599, 600)):
        assert torch.equal(OP(x[part], *arrays, None, 0), whole[part])


def hostile() -> dict[str, list]:
    """Arrays that contradict each other, all of the right shapes and dtypes."""
    good = Case(19, 70, 0.3).arrays()

    def changed(index: int, change) -> list:
        arrays = list(good)
        arrays[index] = arrays[index].clone()
        change(arrays[index])
        return arrays

    def swap(start: torch.Tensor) -> None:
        start[4], start[9] = start[9].item(), start[4].item()

    row_tail = (1, 2, 2)  # tile 1, word of columns 64 ... 95, row 18

    def put(where, value):
        def change(t: torch.Tensor) -> None:
            t[where] = value

        return change

    mask = good[1]
    return {
        "first": changed(3, put(0, 1)),
        "negative first": changed(3, put(0, -1)),
        "last": changed(3, put(-1, good[2].numel() + 5)),
        "not rising": changed(3, swap),
        "row too long": changed(3, put(5, int(good[3][5]) + 1)),
        "far beyond": changed(3, put(5, 2**31 - 1)),
        "far below": changed(3, put(5, -(2**31))),
        "full mask": changed(1, lambda t: t.fill_(-1)),
        "empty mask": changed(1, lambda t: t.fill_(0)),
        "one bit more": changed(1, put((0, 1, 2), int(mask[0, 1, 2]) ^ 1)),
        "one bit in the last word": changed(1, put(row_tail, int(mask[row_tail]) ^ 32)),
        "sign bits of salient weights": [mask, *good[1:]],
        "value too short": [*good[:2], good[2][:-1], *good[3:]],
        "value too long": [*good[:2], torch.cat([good[2], good[2]]), *good[3:]],
        "no values": [*good[:2], good[2][:0], *good[3:]],
    }


@pytest.mark.parametrize("name", list(hostile()))
def test_salient_arrays_that_contradict_each_other(name: str) -> None:
    arrays, x = hostile()[name], torch.randn(3, 70)
    for call in (
        lambda: OP(x, *arrays, None, 0),
        lambda: OP(x[:0], *arrays, None, 0),
        lambda: WEIGHT_OP(*arrays, 70, 0),
        lambda: _salient_linear_reference(x, *arrays, None, 0),
        lambda: _salient_weight_reference(*arrays, 70, 0),
    ):
        with pytest.raises(ValueError, match="contradict each other"):
            call()


def test_salient_bits_past_the_end_are_ignored() -> None:
    arrays, x = Case(19, 70, 0.3).arrays(), torch.randn(3, 70)
    expected = OP(x, *arrays, None, 0), salient_weight(*arrays, 70)
    for index in (0, 1):
        arrays[index] = arrays[index].clone()
        arrays[index][:, -1] |= ~((1 << 6) - 1)  # columns 70 ... 95
        arrays[index][1, :, 3:] = -1  # rows 19 ... 31
    assert torch.equal(OP(x, *arrays, None, 0), expected[0])
    assert torch.equal(salient_weight(*arrays, 70), expected[1])
    assert torch.equal(_salient_weight_reference(*arrays, 70, 0), expected[1])


NAMES = ("weight", "mask", "value", "start", "alpha", "mu", "value_scale", "value_zero")


def wrong_arguments() -> list:
    good = dict(zip(NAMES, Case(19, 70, 0.3).arrays(), strict=True))
    good |= {"x": torch.randn(3, 70), "bias": torch.randn(19), "group_size": 0}
    cases = []
    for name in (*NAMES, "bias"):
        t = good[name]
        cases += [(name, t.unsqueeze(0), "shape"), (name, t.double(), "must be"), (name, t.to("meta"), "cpu|device")]
        if name != "value":
            cases.append((name, torch.cat([t, t], -1), "shape"))
    cases += [
        ("x", torch.tensor(1.0), "dimension"),
        ("x", torch.randn(3, 70).double(), "float32, bfloat16 or float16"),
        ("x", torch.randn(3, 102), "shape"),
        ("value_scale", None, "uint8"),
        ("value_zero", None, "uint8"),
        ("value", torch.zeros(good["value"].numel()).half(), "float16"),
        ("value", good["value"].to(torch.int8), "int8"),
        ("alpha", torch.tensor(1.0), "shape"),
        ("group_size", 16, "group_size"),
        ("group_size", -32, "group_size"),
        ("group_size", 32, "shape"),
    ]
    return [pytest.param({**good, name: wrong}, text, id=f"{name}-{i}") for i, (name, wrong, text) in enumerate(cases)]


@pytest.mark.parametrize("arguments,text", wrong_arguments())
def test_salient_linear_names_the_wrong_argument(arguments: dict, text: str) -> None:
    on_one_device = all(not isinstance(t, torch.Tensor) or t.device.type == "cpu" for t in arguments.values())
    kernels = (salient_linear, _salient_linear_reference) if on_one_device else (_salient_linear_reference,)
    for kernel in kernels:
        with pytest.raises(ValueError, match=text):
            kernel(**arguments)


@compiled
def test_salient_compiled_and_default_errors_agree() -> None:
    for parameter in wrong_arguments():
        arguments = parameter.values[0]
        if any(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in arguments.values()):
            continue
        texts = []
        for kernel in (salient_linear, _salient_linear_reference):
            with pytest.raises(ValueError) as error:
                kernel(**arguments)
            texts.append(str(error.value).split(" must")[0])
        assert texts[0] == texts[1]


def test_salient_weight_wants_a_possible_k() -> None:
    arrays = Case(3, 10).arrays()
    for kernel in (WEIGHT_OP, _salient_weight_reference):
        for k in (-1, 2**24 + 1):
            with pytest.raises(ValueError, match="k must be in"):
                kernel(*arrays, k, 0)


OPCHECKS = [
    Case(17, 65, 0.2),
    Case(3, 33, 0.3, codes=False),
    Case(5, 100, 0.2, centred=False, group_size=32),
    Case(4, 64, 0.0, group_size=64),
]


@pytest.mark.parametrize("case", OPCHECKS, ids=str)
def test_salient_ops_pass_opcheck(case: Case) -> None:
    arrays = case.arrays()
    x, bias = torch.randn(2, 3, case.k, requires_grad=True), torch.randn(case.n, requires_grad=True)
    torch.library.opcheck(OP, (x, *arrays, bias, case.group_size))
    torch.library.opcheck(OP, (torch.randn(4, case.k).bfloat16(), *arrays, None, case.group_size))
    torch.library.opcheck(WEIGHT_OP, (*arrays, case.k, case.group_size))


@pytest.mark.parametrize("case", OPCHECKS, ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 3)])
def test_salient_linear_gradients(case: Case, shape: tuple[int, ...]) -> None:
    arrays = case.arrays()
    x, bias = torch.randn(*shape, case.k, requires_grad=True), torch.randn(case.n, requires_grad=True)
    out = salient_linear(x, *arrays, bias, case.group_size)
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


def test_salient_linear_compiles_with_a_dynamic_batch() -> None:
    case = Case(20, 70, 0.2, group_size=32)
    arrays, bias = case.arrays(), torch.randn(20, requires_grad=True)
    compiled_op = torch.compile(lambda x: salient_linear(x, *arrays, bias, 32) * 2, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (11, 5, 8):  # the first unlike every other size, which torch would take for the same symbol
            x = torch.randn(m, 70, requires_grad=True)
            out = compiled_op(x)
            eager = salient_linear(x, *arrays, bias, 32) * 2
            assert torch.equal(out, eager)
            got, expected = (torch.autograd.grad(y.sum(), (x, bias)) for y in (out, eager))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
