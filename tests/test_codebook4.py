# SPDX-License-Identifier: Apache-2.0
"""Quantisation to a table of 16 values: against its definition, and bitsandbytes' decision points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops import codebook4
from bitmill.ops.fp4 import unpack_nibbles
from problems import assert_same_bits, on_every_machine

# From bitsandbytes' CUDA kernels, rounded there: a magnitude above the point is the larger of two neighbours.
BNB_FP4_POINTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
NF4_POINTS = (
    *(-0.8480964, -0.6106329, -0.4599953, -0.3396794, -0.2346074, -0.1379117, -0.0455250, 0.0397901),
    *(0.1202553, 0.2035213, 0.2920138, 0.3893125, 0.5016634, 0.6427869, 0.8614784),
)
TABLES = {
    "nf4": torch.tensor(ops.code_values("nf4")),
    "bnb-fp4": torch.tensor(ops.code_values("bnb-fp4")),
    "e2m1": torch.tensor(ops.code_values("e2m1")),
    "any": torch.tensor([3.0, -7.5, 0.1, 0.1, 2.0, -1.0, 5.0, 8.0, -2.0, -3.0, -4.0, -5.0, 1.0, 0.5, 6.0, 7.0]),
}
each_table = pytest.mark.parametrize("name", TABLES)


def codes_of(x: Tensor, codebook: Tensor | str, group_size: int = 0) -> Tensor:
    return unpack_nibbles(ops.codebook4_quantize(x, codebook, group_size)[0], x.shape[-1])


def defined(x: Tensor, codebook: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows [m, k], group by group."""
    values = codebook.unique()
    middle = (values[1:] + values[:-1]) / 2
    codes, scales = [], []
    for group in x.float().split(group_size or x.shape[1], 1):
        scale = group.abs().amax(1, keepdim=True) / codebook.abs().max()
        u = group * torch.where(scale > 0, 1 / scale, 0.0)
        value = values[(u.unsqueeze(-1) > middle).sum(-1)]
        assert ((u - value).abs() <= (u.unsqueeze(-1) - values).abs().amin(-1) + 2**-23).all()
        codes.append((codebook == value.unsqueeze(-1)).int().argmax(-1))  # argmax: the first of them
        scales.append(scale)
    return torch.cat(codes, 1), torch.cat(scales, 1)


@each_table
@pytest.mark.parametrize("group_size", [0, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codebook4_is_its_definition(name: str, group_size: int, dtype: torch.dtype) -> None:
    table = TABLES[name]
    x = (torch.randn(40, 77) * 2.0 ** torch.randint(-10, 10, (40, 1))).to(dtype)
    x[3] = 0
    codes, scales = defined(x, table, group_size)
    packed, scale = ops.codebook4_quantize(x, table, group_size)
    assert packed.shape == (40, 39) and packed.dtype == torch.uint8 and (packed[:, -1] < 16).all()
    assert torch.equal(unpack_nibbles(packed, 77).long(), codes) and torch.equal(scale, scales)
    columns = scales.repeat_interleave(group_size or 77, 1)[:, :77]
    values = ops.codebook4_dequantize(packed, scale, table, 77, group_size)
    assert torch.equal(values, table[codes] * columns) and values[3].eq(0).all()
    stacked = x.view(2, 20, 77).transpose(0, 1)
    again = ops.codebook4_quantize(stacked, table, group_size)
    assert torch.equal(again[0], packed.view(2, 20, -1).transpose(0, 1)) and again[0].is_contiguous()
    assert torch.equal(again[1], scale.view(2, 20, -1).transpose(0, 1))


@pytest.mark.parametrize("name", ["nf4", "bnb-fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codebook4_of_every_half(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    for x in (every, every[torch.randperm(every.numel())]):
        x = x[: x.numel() // 256 * 256].view(-1, 256)
        codes, scales = defined(x, TABLES[name], 64)
        packed, scale = ops.codebook4_quantize(x, name, 64)
        assert torch.equal(unpack_nibbles(packed, 256).long(), codes) and torch.equal(scale, scales)


@each_table
def test_every_value_keeps_its_code_and_ties_go_down(name: str) -> None:
    table = TABLES[name]
    values = table.unique()
    first = torch.tensor([(table == value).int().argmax().item() for value in values])
    rows = torch.stack([values, table.abs().max().expand_as(values)], 1)  # the second column makes the scale 1
    assert torch.equal(codes_of(rows, table)[:, 0].long(), first)
    middle = (values[1:] + values[:-1]) / 2
    rows = torch.stack([middle, table.abs().max().expand_as(middle)], 1)
    assert torch.equal(codes_of(rows, table)[:, 0].long(), first[:-1])
    rows[:, 0] = middle.nextafter(torch.tensor(torch.inf))
    assert torch.equal(codes_of(rows, table)[:, 0].long(), first[1:])


def test_decision_points_of_bitsandbytes() -> None:
    points = torch.tensor(NF4_POINTS)
    one = torch.ones_like(points)
    assert codes_of(torch.stack([points - 1e-6, one], 1), "nf4")[:, 0].tolist() == list(range(15))
    assert codes_of(torch.stack([points + 1e-6, one], 1), "nf4")[:, 0].tolist() == list(range(1, 16))
    points = torch.tensor(BNB_FP4_POINTS)
    one = torch.ones_like(points)
    ascending = [0, 1, 6, 7, 4, 5, 2, 3]
    assert codes_of(torch.stack([points - 1e-6, one], 1), "bnb-fp4")[:, 0].tolist() == ascending[:-1]
    assert codes_of(torch.stack([points + 1e-6, one], 1), "bnb-fp4")[:, 0].tolist() == ascending[1:]
    below_zero = codes_of(torch.stack([-points - 1e-6, one], 1), "bnb-fp4")[:, 0]
    assert below_zero.tolist() == [code + 8 for code in ascending[1:]]
    assert codes_of(torch.tensor([0.001, -0.001, -0.0, 1.0]), "bnb-fp4").tolist() == [0, 0, 0, 3]


def test_groups_that_are_not_finite_or_next_to_nothing() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 40)
        x[0, 17] = value
        packed, scale = ops.codebook4_quantize(x, "nf4", 16)
        assert scale.isnan().tolist() == [[False, True, False], [False] * 3]
        assert unpack_nibbles(packed, 40)[0, 16:32].eq(0).all()
        assert ops.codebook4_dequantize(packed, scale, "nf4", 40, 16).isnan().sum() == 16
    for value in (torch.nan, torch.inf, 0.0):
        packed, scale = ops.codebook4_quantize(torch.randn(2, 40), TABLES["nf4"] * value, 16)
        assert scale.isnan().all() and packed.eq(0).all()
    tiny = torch.tensor([[1e-45, 0.0, -1e-45], [1e-39, 5e-40, 0.0], [3e38, -3e38, 1.0]])
    values = ops.codebook4_dequantize(*ops.codebook4_quantize(tiny, "nf4", 0), "nf4", 3, 0)
    assert values.isfinite().all() and ((values - tiny).abs() <= tiny.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("shape", [(0,), (7,), (0, 5), (3, 0), (2, 1, 3, 31)], ids=str)
@pytest.mark.parametrize("group_size", [0, 16])
def test_codebook4_of_any_shape(shape: tuple[int, ...], group_size: int) -> None:
    x = torch.randn(shape)
    packed, scale = ops.codebook4_quantize(x, "bnb-fp4", group_size)
    k = shape[-1]
    assert packed.shape == (*shape[:-1], -(-k // 2))
    assert scale.shape == (*shape[:-1], -(-k // group_size) if group_size else 1)
    assert ops.codebook4_dequantize(packed, scale, "bnb-fp4", k, group_size).shape == shape


def test_codebook4_fake_quant_in_a_compiled_graph() -> None:
    x = torch.randn(6, 50, dtype=torch.bfloat16).requires_grad_()
    out = ops.codebook4_fake_quant(x, "nf4", 16)
    quantised = ops.codebook4_quantize(x.detach(), "nf4", 16)
    assert torch.equal(out, ops.codebook4_dequantize(*quantised, "nf4", 50, 16).bfloat16())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.eq(1).all() and grad.dtype == x.dtype
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: ops.codebook4_fake_quant(t, "nf4", 16), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for m in (2, 3):
        assert torch.equal(compiled(x[:m]), out[:m])


@each_table
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_codebook4_kernels_equal_the_default_ones(name: str, rounding: str) -> None:
    x = torch.randn(5, 3, 77) * 2.0 ** torch.randint(-20, 20, (5, 3, 1))
    x[0, 0, 3], x[1, 0, 40], x[2] = torch.nan, torch.inf, 0
    even = torch.randn(4, 256)
    layouts = ((x, 0), (x.bfloat16(), 16), (x.half().transpose(0, 1), 64), (x[..., :9], 8), (x, 40), (even, 64))
    for rows, group_size in layouts:
        k = rows.shape[-1]
        arguments = (rows, TABLES[name], group_size, rounding, -7, 2**40 + 3)
        want = codebook4._codebook4_quantize_reference(*arguments)
        values = codebook4._codebook4_dequantize_reference(*want, TABLES[name], k, group_size)

        def both(arguments: tuple = arguments, k: int = k, group_size: int = group_size) -> list[Tensor]:
            codes = torch.ops.bitmill.codebook4_quantize.default(*arguments)
            return [*codes, torch.ops.bitmill.codebook4_dequantize.default(*codes, TABLES[name], k, group_size)]

        for machine, results in on_every_machine(both):
            for got, expected in zip(results, (*want, values), strict=True):
                assert_same_bits(got, expected, machine)


def test_codebook4_opcheck() -> None:
    x, table = torch.randn(3, 37), TABLES["nf4"]
    for rows, group_size in ((x, 16), (x.T.half(), 0), (x[0], 64), (x[:0], 8)):
        torch.library.opcheck(torch.ops.bitmill.codebook4_quantize.default, (rows, table, group_size))
        packed, scale = ops.codebook4_quantize(rows, table, group_size)
        arguments = (packed, scale, table, rows.shape[-1], group_size)
        torch.library.opcheck(torch.ops.bitmill.codebook4_dequantize.default, arguments)


def test_codebook4_errors() -> None:
    x, table, byte = torch.randn(2, 40), TABLES["nf4"], torch.zeros(2, 20, dtype=torch.uint8)
    scale = torch.ones(2, 1)
    for call, arguments, message in (
        (ops.codebook4_quantize, (x.double(), table), "codebook4_quantize: x must be float32, bfloat16 or float16"),
        (ops.codebook4_quantize, (x[0, 0], table), "codebook4_quantize: x must have at least one dimension"),
        (ops.codebook4_quantize, (x, table[:8]), r"codebook must have shape \[16\], got \[8\]"),
        (ops.codebook4_quantize, (x, table.half()), "codebook must be float32, got float16"),
        (ops.codebook4_quantize, (x, "fp4"), 'format must be .* "nf4" or "bnb-fp4", got "fp4"'),
        (ops.codebook4_quantize, (x, table, 12), "group_size must be .* multiple of 8 up to .*, got 12"),
        (ops.codebook4_quantize, (x, table, -8), "group_size must be .* multiple of 8 up to .*, got -8"),
        (ops.codebook4_dequantize, (byte, scale, table, 41), r"packed must have ceil\(k / 2\) bytes .* k = 41 and 20"),
        (ops.codebook4_dequantize, (byte.int(), scale, table, 40), "packed must be uint8, got int32"),
        (ops.codebook4_dequantize, (byte, scale, table, 40, 16), r"scale must have shape \[2, 3\], got \[2, 1\]"),
        (ops.codebook4_dequantize, (byte, scale.half(), table, 40), "scale must be float32, got float16"),
        (ops.codebook4_dequantize, (byte, scale, table.to("meta"), 40), "codebook must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
