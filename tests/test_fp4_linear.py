# SPDX-License-Identifier: Apache-2.0
"""The product with an FP4 weight against float64, and what torch and the user ask of every fp4 op: gradients, opcheck,
compilation, threads, errors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops import fp4
from bitmill.ops._library import failure, has_compiled_kernel
from fp4_inputs import FLOATS, GROUPS, SHAPES, WIDE, default_linear, default_weight, layer
from problems import assert_same_bits, on_every_machine

CASTS = ("fp4_cast", "fp4_uncast", "e8m0_cast", "e8m0_uncast", "mxfp4_quantize", "mxfp4_dequantize")
DEFAULTS = {
    "fp4_linear": default_linear,
    "fp4_weight": default_weight,
    **{name: getattr(fp4, f"_{name}_reference") for name in CASTS},
}


@pytest.mark.skipif(failure("_ops_cpu") is not None, reason="no compiled kernels")
def test_compiled_kernels_are_in_use() -> None:
    assert all(has_compiled_kernel(name) for name in DEFAULTS)


@pytest.mark.parametrize("codebook", [False, True])
@pytest.mark.parametrize(("group_size", "e8m0"), GROUPS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_fp4_linear_equals_default(n: int, k: int, group_size: int, e8m0: bool, codebook: bool) -> None:
    table = torch.randn(16) if codebook else None
    for dtype in FLOATS:
        a = layer(n, k, group_size, e8m0, dtype)
        settings = {"format": "e3m0", "group_size": group_size, "codebook": table}
        dense = ops.fp4_weight(a["weight"], a["scale"], n, k, **settings)
        codes = ops.tile_unpack(a["weight"], n, k, 4).long()
        values = torch.tensor(ops.code_values("e3m0")) if table is None else table
        scale = ops.e8m0_uncast(a["scale"]) if e8m0 else a["scale"]
        columns = scale.repeat_interleave(group_size, 1)[:, :k] if group_size else scale
        assert torch.equal(dense, values[codes] * columns)
        default = default_weight(a["weight"], a["scale"], n, k, "e3m0", group_size, table)
        weights = lambda a=a, settings=settings: ops.fp4_weight(a["weight"], a["scale"], n, k, **settings)  # noqa: E731
        for machine, got in on_every_machine(weights):
            assert torch.equal(got, default), machine
        exact = a["x"].double() @ dense.double().T + a["bias"]
        room = a["x"].double().abs() @ dense.double().abs().T + a["bias"].abs()
        ulp = 2.0 ** {torch.float32: -24, torch.bfloat16: -8, torch.float16: -11}[dtype]
        machines = on_every_machine(lambda a=a, settings=settings: ops.fp4_linear(**a, **settings))
        for machine, out in [*machines, ("default", default_linear(**a, **settings))]:
            assert out.dtype == dtype and out.shape == (3, n), machine
            assert ((out.double() - exact).abs() <= room * k * 2.0**-24 + exact.abs() * ulp * 1.01 + 1e-6).all()


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (129, 1000)])
def test_e4m3_scales_on_every_machine(n: int, k: int) -> None:
    g = torch.tensor(0.0123)
    for m, dtype in ((1, torch.float32), (9, torch.bfloat16), (3, torch.float16)):
        a = layer(n, k, 16, dtype=dtype, leading=(m,))
        a["scale"] = torch.randint(0, 256, a["scale"].shape, dtype=torch.uint8)  # both signs, subnormal ones
        a["scale"][(a["scale"] & 127) == 127] = 3
        settings = {"group_size": 16, "global_scale": g}
        dense = default_weight(a["weight"], a["scale"], n, k, **settings)
        codes = ops.tile_unpack(a["weight"], n, k, 4).long()
        columns = ops.e4m3_uncast(a["scale"]).repeat_interleave(16, 1)[:, :k]
        assert torch.equal(dense, torch.tensor(ops.code_values("e2m1"))[codes] * columns * g)
        int8 = settings | {"activations": "int8"}
        want = default_linear(**a, **int8)
        exact = a["x"].double() @ dense.double().T + a["bias"]
        ulp = 2.0 ** {torch.float32: -24, torch.bfloat16: -8, torch.float16: -11}[dtype]
        room = a["x"].double().abs() @ dense.double().abs().T * k * 2.0**-24 + exact.abs() * ulp * 1.01 + 1e-6
        for machine, out in on_every_machine(lambda a=a, settings=settings: ops.fp4_linear(**a, **settings)):
            assert ((out.double() - exact).abs() <= room).all(), machine
        for machine, out in on_every_machine(lambda a=a, int8=int8: ops.fp4_linear(**a, **int8)):
            assert_same_bits(out, want, machine)
        weights = lambda a=a, settings=settings: ops.fp4_weight(a["weight"], a["scale"], n, k, **settings)  # noqa: E731
        for machine, got in on_every_machine(weights):
            assert_same_bits(got, dense, machine)
        if n and k:
            a["scale"][0, 0], a["x"][:, 0] = 127 + 128 * (m % 2), 1.0
            for machine, out in on_every_machine(lambda a=a, settings=settings: ops.fp4_linear(**a, **settings)):
                assert out[:, 0].isnan().all() and out[:, 1:].isfinite().all(), machine


@pytest.mark.parametrize("format", ["nf4", "bnb-fp4"])
def test_named_tables_are_codebooks(format: str) -> None:
    a = layer(33, 300, 64)
    table = torch.tensor(ops.code_values(format))
    for machine, out in on_every_machine(lambda: ops.fp4_linear(**a, format=format, group_size=64)):
        with_table = on_every_machine(lambda: ops.fp4_linear(**a, group_size=64, codebook=table))
        assert_same_bits(out, dict(with_table)[machine], machine)
    dense = ops.fp4_weight(a["weight"], a["scale"], 33, 300, format, 64)
    assert_same_bits(dense, default_weight(a["weight"], a["scale"], 33, 300, format, 64))
    assert_same_bits(dense, ops.fp4_weight(a["weight"], a["scale"], 33, 300, "e2m1", 64, table))


# Row counts around blocks of 8, 4 and 1 rows, with what is left over.
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 11, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, m: int) -> None:
    a = layer(150, 200, 32, True, dtype, (m,))
    for activations in ("float", "int8"):
        settings = {"group_size": 32, "activations": activations}
        together = ops.fp4_linear(**a, **settings)
        for row in range(m) if dtype != torch.float32 or activations == "int8" else ():
            alone = ops.fp4_linear(**(a | {"x": a["x"][row : row + 1]}), **settings)
            assert_same_bits(together[row : row + 1], alone)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (5,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
def test_fp4_linear_of_any_shape_and_stride(leading: tuple[int, ...]) -> None:
    a = layer(18, 40, leading=leading)
    dense = ops.fp4_weight(a["weight"], a["scale"], 18, 40)
    inputs = [a["x"], torch.stack([a["x"], a["x"]], -1)[..., 1], a["x"].unsqueeze(0).expand(2, *a["x"].shape)]
    if leading:
        inputs.append(a["x"].transpose(0, -1).contiguous().transpose(0, -1))
    for x in inputs:
        out = ops.fp4_linear(x, a["weight"], a["scale"])
        assert out.shape == (*x.shape[:-1], 18) and out.is_contiguous()
        torch.testing.assert_close(out, x @ dense.T, rtol=1e-5, atol=1e-5)
        strided = torch.stack([a["scale"], a["scale"]], -1)[..., 0]
        assert torch.equal(ops.fp4_linear(x, a["weight"], strided), out)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(("group_size", "e8m0"), [(0, False), (8, False), (32, True)])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_fp4_linear_gradients(leading: tuple[int, ...], group_size: int, e8m0: bool, activations: str) -> None:
    a = layer(19, 77, group_size, e8m0, leading=leading)
    table = torch.randn(16) if activations == "float" else WIDE
    settings = {"format": "e1m2", "group_size": group_size, "codebook": table, "activations": activations}
    codes = ops.tile_unpack(a["weight"], 19, 77, 4).long()
    wanted = [t.requires_grad_() for t in a.values() if t.is_floating_point()]
    upstream = torch.randn(*leading, 19)
    got = torch.autograd.grad(ops.fp4_linear(**a, **settings), wanted, upstream)
    scale = ops.e8m0_uncast(a["scale"]) if e8m0 else a["scale"]
    dense = table[codes] * (scale.repeat_interleave(group_size, 1)[:, :77] if group_size else scale)
    values = a["x"] if activations == "float" else ops.int8_fake_quant(a["x"])
    out = torch.nn.functional.linear(values, dense, a["bias"])
    for g, e in zip(got, torch.autograd.grad(out, wanted, upstream, retain_graph=True), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
    if not e8m0 and activations == "float":
        same = ops.fp4_weight(a["weight"], a["scale"], 19, 77, "e1m2", group_size, table)
        (got_scale,) = torch.autograd.grad(same.square().sum(), a["scale"])
        (expected_scale,) = torch.autograd.grad(dense.square().sum(), a["scale"])
        torch.testing.assert_close(got_scale, expected_scale, rtol=1e-4, atol=1e-3)


def test_one_and_two_threads_are_equal() -> None:
    a = layer(96, 640, 32, True, leading=(65,))
    x = torch.randn(300, 999)

    def results() -> list[Tensor]:
        packed, scale = ops.mxfp4_quantize(x)
        return [
            ops.fp4_linear(**a, group_size=32),
            ops.fp4_linear(**a, group_size=32, activations="int8"),
            ops.fp4_weight(a["weight"], a["scale"], 96, 640, group_size=32),
            ops.fp4_cast(x),
            ops.fp4_uncast(ops.fp4_cast(x), 999),
            packed,
            scale,
            ops.mxfp4_dequantize(packed, scale, 999),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_compile_fullgraph_with_a_dynamic_batch() -> None:
    a = layer(19, 64)

    def model(x: Tensor, scale: Tensor) -> Tensor:
        q = ops.fp4_fake_quant(x, "e1m2", 0.5) + ops.mxfp4_fake_quant(x, "even")
        y = ops.fp4_linear(q, a["weight"], scale, a["bias"], "e3m0")
        y = y + ops.fp4_linear(q, a["weight"], scale, activations="int8")
        return y + ops.fp4_uncast(ops.fp4_cast(y), 19) * ops.e8m0_uncast(ops.e8m0_cast(y.abs()))

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (2, 3, 7):
        x, scale = torch.randn(m, 64, requires_grad=True), a["scale"].clone().requires_grad_()
        out, expected = compiled(x, scale), model(x, scale)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad(out.square().sum(), (x, scale))
        for g, e in zip(got, torch.autograd.grad(expected.square().sum(), (x, scale)), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-3)


def test_meta_tensors() -> None:
    x = torch.empty(3, 5, device="meta")
    assert ops.fp4_cast(x).shape == (3, 3)
    packed, scale = ops.mxfp4_quantize(x)
    assert ops.mxfp4_dequantize(packed, scale, 5).shape == (3, 5)
    a = {name: t.to("meta") for name, t in layer(19, 64).items()}
    assert ops.fp4_linear(**a).shape == (3, 19) and ops.fp4_linear(**a).is_meta


def _op_samples() -> dict[str, list[tuple]]:
    x, a = torch.randn(3, 37), layer(19, 77, 8, leading=(2, 3))
    packed, scale = ops.mxfp4_quantize(x)
    bytes = layer(19, 77, 8, True)["scale"]
    rows, weight, scales, bias = (t.requires_grad_(t.is_floating_point()) for t in a.values())
    linear = [
        (rows, weight, scales, bias, "e2m1", 8, None, "float"),
        (rows[0], weight, scales, None, "e1m2", 8, torch.randn(16), "float"),
        (rows.bfloat16(), weight, bytes, bias, "e3m0", 8, None, "int8"),
        (rows[0, 0], weight, scales, bias, "e2m1", 8, WIDE, "int8"),
        (rows, weight, bytes % 127, bias, "nf4", 8, None, "float", torch.tensor(0.01)),
    ]
    return {
        "fp4_cast": [(x, "e3m0", "max"), (x.T, "e1m2", "zero"), (x.bfloat16(), "e2m1", "error"), (x[:0],)],
        "fp4_uncast": [(ops.fp4_cast(v, "e3m0"), v.shape[-1], "e3m0") for v in (x, x.T, x[:0])],
        "e8m0_cast": [(x, "up"), (x.T.half(), "down"), (x[0, 0], "up")],
        "e8m0_uncast": [(scale,), (packed.T,), (scale[:0],)],
        "mxfp4_quantize": [(x, "floor"), (x.T.half(), "even"), (x[0], "rceil")],
        "mxfp4_dequantize": [(packed[i], scale[i], 37) for i in (slice(None), slice(0), 1)],
        "fp4_linear": linear,
        "fp4_weight": [(*arguments[1:3], 19, 77, *arguments[4:7], *arguments[8:]) for arguments in linear],
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_opcheck(name: str) -> None:
    for arguments in _op_samples()[name]:
        torch.library.opcheck(getattr(torch.ops.bitmill, name).default, arguments)


def _error_cases() -> list:
    x, byte = torch.randn(2, 6), torch.zeros(2, 3, dtype=torch.uint8)
    a = layer(4, 40)
    w, s = a["weight"], a["scale"]
    g, bytes = torch.tensor(1.0), torch.zeros(4, 1, dtype=torch.uint8)
    return [
        (ops.fp4_cast, (x.double(),), "fp4_cast: x must be float32, bfloat16 or float16, got float64"),
        (ops.fp4_cast, (torch.tensor(1.0),), "fp4_cast: x must have at least one dimension, got a scalar"),
        (ops.fp4_cast, (x, "e4m3"), 'fp4_cast: format must be "e2m1", "e1m2" or "e3m0", got "e4m3"'),
        (ops.fp4_cast, (x, "e2m1", "min"), 'fp4_cast: nan must be "max", "zero" or "error", got "min"'),
        (ops.fp4_uncast, (byte, 7), r"packed must have ceil\(k / 2\) bytes in its last dimension, got k = 7 and 3"),
        (ops.fp4_uncast, (byte, -1), "got k = -1"),
        (ops.fp4_uncast, (byte.int(), 6), "fp4_uncast: packed must be uint8, got int32"),
        (ops.fp4_uncast, (byte[0, 0], 1), "at least one dimension"),
        (ops.fp4_uncast, (byte, 6, "fp4"), "fp4_uncast: format must be"),
        (ops.e8m0_cast, (byte,), "e8m0_cast: x must be float32, bfloat16 or float16, got uint8"),
        (ops.e8m0_cast, (x, "even"), 'e8m0_cast: rounding must be "down" or "up", got "even"'),
        (ops.e8m0_uncast, (x,), "e8m0_uncast: codes must be uint8, got float32"),
        (ops.mxfp4_quantize, (x, "max"), "mxfp4_quantize: scale_rule must be"),
        (ops.mxfp4_quantize, (x.int(),), "mxfp4_quantize: x must be float32"),
        (ops.mxfp4_dequantize, (byte, byte, 6), r"mxfp4_dequantize: scale must have shape \[2, 1\], got \[2, 3\]"),
        (ops.mxfp4_dequantize, (byte, x[:, :1], 6), "mxfp4_dequantize: scale must be uint8, got float32"),
        (ops.fp4_linear, (a["x"].double(), w, s), "fp4_linear: x must be float32, bfloat16 or float16, got float64"),
        (ops.fp4_linear, (torch.tensor(1.0), w, s), "fp4_linear: x must have at least one dimension"),
        (ops.fp4_linear, (x, w, s), r"weight must have shape \[1, 1, 16\], got \[1, 5, 16\]; pack the weight with"),
        (ops.fp4_linear, (a["x"], w.float(), s), "fp4_linear: weight must be int32, got float32"),
        (ops.fp4_linear, (a["x"], w, s.double()), "scale must be float32, or uint8 for E8M0, got float64"),
        (ops.fp4_linear, (a["x"], w, s[:, 0]), r"scale must have shape \[4, 1\], got \[4\]"),
        (ops.fp4_linear, (a["x"], w, s[0, 0]), r"scale must have shape \[0, 1\], got \[\]"),
        (ops.fp4_linear, (a["x"], w, s, s), r"bias must have shape \[4\], got \[4, 1\]"),
        (ops.fp4_linear, (a["x"], w, s, None, "fp4"), 'fp4_linear: format must be .* "nf4" or "bnb-fp4", got "fp4"'),
        (ops.fp4_cast, (x, "nf4"), "fp4_cast: format must be"),
        (ops.fp4_linear, (a["x"], w, s, None, "e2m1", 12), "group_size must be .* multiple of 8 up to .*, got 12"),
        (ops.fp4_linear, (a["x"], w, s, None, "e2m1", -8), "group_size must be .* multiple of 8 up to .*, got -8"),
        (ops.fp4_linear, (a["x"], w, s, None, "e2m1", 8), r"scale must have shape \[4, 5\], got \[4, 1\]"),
        (ops.fp4_linear, (a["x"], w, s, None, "e2m1", 0, s), r"codebook must have shape \[16\], got \[4, 1\]"),
        (
            ops.fp4_linear,
            (a["x"], w, s, None, "e2m1", 0, None, "int4"),
            'fp4_linear: activations must be "float" or "int8", got "int4"',
        ),
        (ops.fp4_linear, (a["x"], w, s.to("meta")), "fp4_linear: .* must be on"),
        (
            ops.fp4_linear,
            (a["x"], w, s, None, "e2m1", 0, None, "float", g),
            "fp4_linear: scale must be uint8, E4M3, with a global_scale, got float32",
        ),
        (
            ops.fp4_weight,
            (w, bytes, 4, 40, "e2m1", 0, None, g.view(1)),
            r"global_scale must have shape \[\], got \[1\]",
        ),
        (ops.fp4_weight, (w, bytes, 4, 40, "e2m1", 0, None, g.half()), "global_scale must be float32, got float16"),
        (
            ops.fp4_weight,
            (w, s, 4, -1),
            "fp4_weight: n must be at least 0 and k between 0 and 16777216, got n = 4, k = -1",
        ),
        (ops.fp4_weight, (w, s, 4, 48), r"fp4_weight: weight must have shape \[1, 6, 16\]"),
        (ops.code_values, ("e5m2",), "code_values: format must be"),
    ]


@pytest.mark.parametrize("case", range(len(_error_cases())))
def test_errors_say_what_is_wrong(case: int) -> None:
    call, arguments, message = _error_cases()[case]
    with pytest.raises(ValueError, match=message):
        call(*arguments)
    if call is not ops.code_values and not any(isinstance(t, Tensor) and t.is_meta for t in arguments):
        with pytest.raises(ValueError, match=message):
            DEFAULTS[call.__name__](*arguments)
