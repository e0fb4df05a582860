# SPDX-License-Identifier: Apache-2.0
"""Every rounding of every cast to FP4 against a slow definition in integers of any size, which know no rounding."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops import codebook4, fp4, nvfp4
from bitmill.ops._philox import philox, random_words
from bitmill.ops.fp4 import unpack_nibbles
from fp4_cast_inputs import HALVES, VALUES, every, finite_rows
from problems import assert_same_bits, on_every_machine

TIES = {"e2m1": (0, 2, 2, 4, 4, 6, 6), "e1m2": (0, 2, 2, 4, 4, 6, 6), "e3m0": (0, 2, 3, 4, 5, 6, 7)}
ROUNDINGS = ("nearest_even", "stochastic", "toward_zero", "half_away")
INPUTS = (*HALVES, "float32")
SEED, OFFSET = -0x123456789ABCDEF, 0x1_0000_0003
each_format = pytest.mark.parametrize("format", VALUES)
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def defined(x: Tensor, format: str, words: Tensor) -> dict[str, list[int]]:
    """Codes of each rounding; NaN has code 7."""
    whole = [int(v * 2.0**149) for v in VALUES[format]]  # as multiples of the smallest float32
    codes: dict[str, list[int]] = {rounding: [] for rounding in ROUNDINGS}
    for value, word in zip(x.double().flatten().tolist(), words.flatten().tolist(), strict=True):
        sign = 8 if str(value)[0] == "-" else 0
        i = 7 if abs(value) >= VALUES[format][-1] or value != value else -1
        ups = dict.fromkeys(ROUNDINGS, 0)
        if i < 0:
            magnitude = int(abs(value) * 2.0**149)
            i = bisect.bisect_right(whole, magnitude) - 1
            above, distance = magnitude - whole[i], whole[i + 1] - whole[i]
            # x / distance + u >= the next integer, u = word / 2^32
            ups["stochastic"] = int((above << 32) + word * distance >= distance << 32)
            ups["half_away"] = int(2 * above >= distance)
            ups["nearest_even"] = TIES[format][i] - i if 2 * above == distance else int(2 * above > distance)
        for rounding, up in ups.items():
            codes[rounding].append(i + up + sign)
    return codes


@cache
def defined_inputs(kind: str, format: str) -> dict[str, Tensor]:
    x = every(kind)
    return {r: torch.tensor(codes) for r, codes in defined(x, format, random_words(x, SEED, OFFSET)).items()}


def test_philox_has_the_published_numbers() -> None:
    """Known answers of the Random123 distribution, philox4x32-10."""
    for counter, seed, words in (
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        got = philox([torch.tensor([word]) for word in counter], seed)
        assert [word.item() for word in got] == words


def test_random_words_belong_to_elements() -> None:
    seed, offset = 0x299F31D0_A4093822, 0x03707344_13198A2E
    words = random_words(torch.empty(3, 7), seed, offset)
    counter = [torch.tensor([word]) for word in (5, 0, 0x13198A2E, 0x03707344)]
    assert words.flatten()[20].item() == philox(counter, seed)[0].item()  # element 20 is word 0 of block 5
    assert words.shape == (3, 7) and random_words(torch.empty(0, 3), 1, 2).shape == (0, 3)
    assert torch.equal(random_words(torch.empty(21), seed, offset), words.flatten())


@each_format
@pytest.mark.parametrize("kind", INPUTS)
def test_fp4_cast_is_its_definition(kind: str, format: str) -> None:
    x = every(kind)
    for rounding, want in defined_inputs(kind, format).items():
        arguments = (x, format, "max", rounding, SEED, OFFSET)
        want = torch.where(x.isnan(), 7, want).to(torch.uint8)
        machines = on_every_machine(lambda arguments=arguments: ops.fp4_cast(*arguments))
        for machine, packed in [*machines, ("default", fp4._fp4_cast_reference(*arguments))]:
            assert torch.equal(unpack_nibbles(packed, x.numel()), want), (rounding, machine)


@each_rounding
@pytest.mark.parametrize("kernel", [ops.fp4_cast, fp4._fp4_cast_reference])
def test_nan_in_every_rounding(rounding: str, kernel: Callable[..., Tensor]) -> None:
    x = torch.tensor([torch.nan, 1.0, -torch.nan])
    for nan, codes in (("max", [7, 2, 7]), ("zero", [0, 2, 0])):
        assert unpack_nibbles(kernel(x, "e2m1", nan, rounding), 3).tolist() == codes
    with pytest.raises(ValueError, match='must not have a NaN with nan="error"'):
        kernel(x, "e2m1", "error", rounding)
    assert kernel(x[1:2], "e2m1", "error", rounding).tolist() == [2]


@pytest.mark.parametrize(("m", "k"), [(3, k) for k in (1, 2, 31, 33, 128, 130, 257)] + [(130, 1000), (0, 5), (5, 0)])
@each_rounding
def test_any_width_and_layout_on_every_machine(m: int, k: int, rounding: str) -> None:
    x = torch.randn(m, k) * 3
    settings = (rounding, SEED, OFFSET)
    for rows in (x, x.bfloat16(), x.half(), x.T.contiguous().T, torch.stack((x, -x), -1)[..., 0], x.unsqueeze(1)):

        def everything(rows: Tensor = rows) -> list[Tensor]:
            return [ops.fp4_cast(rows, "e1m2", "zero", *settings), *ops.mxfp4_quantize(rows, "even", *settings)]

        expected = [
            fp4._fp4_cast_reference(rows, "e1m2", "zero", *settings),
            *fp4._mxfp4_quantize_reference(rows, "even", *settings),
        ]
        for machine, results in on_every_machine(everything):
            for got, want in zip(results, expected, strict=True):
                assert_same_bits(got, want, machine)


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("kind", INPUTS)
def test_mxfp4_is_its_definition(kind: str, rule: str) -> None:
    x = finite_rows(kind, 128)[:, :125]  # the last block of a row is partial
    words = random_words(x, SEED, OFFSET)
    scale = ops.mxfp4_quantize(x, rule)[1]
    want = defined(_divide_by_blocks(x, ops.e8m0_uncast(scale), 32), "e2m1", words)
    for rounding in ROUNDINGS:
        arguments = (x, rule, rounding, SEED, OFFSET)
        machines = on_every_machine(lambda arguments=arguments: ops.mxfp4_quantize(*arguments))
        for machine, got in [*machines, ("default", fp4._mxfp4_quantize_reference(*arguments))]:
            assert unpack_nibbles(got[0], x.shape[1]).flatten().tolist() == want[rounding], (rounding, machine)
            assert torch.equal(got[1], scale)


def _divide_by_blocks(x: Tensor, scale: Tensor, width: int) -> Tensor:
    """x / scale in float64, where it is exact for a scale that is a power of two."""
    return x.double() / scale.double().repeat_interleave(width, -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("kind", INPUTS)
def test_nvfp4_is_its_definition(kind: str) -> None:
    x = finite_rows(kind, 64)[:, :61]
    g = ops.nvfp4_global_scale(x) if kind in HALVES else None
    words = random_words(x, SEED, OFFSET)
    scale = ops.nvfp4_quantize(x, g)[1]
    inverse = (1 if g is None else 1 / g) / ops.e4m3_uncast(scale)
    assert kind in HALVES or inverse.eq(1).all()
    want = defined(x.float() * inverse.repeat_interleave(16, -1)[..., : x.shape[-1]], "e2m1", words)
    for rounding in ROUNDINGS:
        arguments = (x, g, rounding, SEED, OFFSET)
        for got in (ops.nvfp4_quantize(*arguments), nvfp4._nvfp4_quantize_reference(*arguments)):
            assert unpack_nibbles(got[0], x.shape[1]).flatten().tolist() == want[rounding], rounding
            assert torch.equal(got[1], scale)


@each_format
def test_fpq_is_its_definition(format: str) -> None:
    x = torch.randn(40, 33) * 2.0 ** torch.randint(-3, 3, (40, 1))
    words = random_words(x, SEED, OFFSET)
    for bias in (ops.fpq_bias(x.abs().amax(1, keepdim=True) * 0.8, format), torch.randn(33)):
        want = defined(x / ops.fpq_scale(bias, format), format, words)
        for rounding in ROUNDINGS:
            packed = ops.fpq_quantize(x, bias, format, "max", rounding, SEED, OFFSET)
            assert unpack_nibbles(packed, 33).flatten().tolist() == want[rounding], rounding
    x[3, 5] = torch.nan
    assert unpack_nibbles(ops.fpq_quantize(x, torch.zeros(()), format, "zero"), 33)[3, 5] == 0
    with pytest.raises(ValueError, match='must not have a NaN with nan="error"'):
        ops.fpq_quantize(x, torch.zeros(()), format, "error")


@pytest.mark.parametrize("name", ["nf4", "bnb-fp4", "e3m0", "short"])
def test_stochastic_codebook_is_its_definition(name: str) -> None:
    table = torch.tensor([-2.0, -2.0, 1.0, *([5.0] * 12), 0.5] if name == "short" else ops.code_values(name))
    x = torch.randn(60, 77)
    x[0], x[1, :40], x[2, 3] = 0, table.repeat(3)[:40], torch.nan
    words = random_words(x, SEED, OFFSET)
    packed, scale = ops.codebook4_quantize(x, table, 16, "stochastic", SEED, OFFSET)
    assert torch.equal(scale.nan_to_num(7), ops.codebook4_quantize(x, table, 16)[1].nan_to_num(7))
    inverse = (1 / scale).clamp_max(torch.finfo(torch.float32).max).repeat_interleave(16, -1)[:, :77]
    values, codes = table.unique().tolist(), table.tolist()
    for z, word, code in zip((x * inverse).flatten().tolist(), words.flatten().tolist(), _flat(packed), strict=True):
        if z != z:
            assert code == 0
            continue
        i = min(max(bisect.bisect_right(values, z) - 1, 0), len(values) - 2)
        p = (Fraction(z) - Fraction(values[i])) / (Fraction(values[i + 1]) - Fraction(values[i]))
        up = int(min(max(p, Fraction(0)), Fraction(1)) * 2**32) + word >= 2**32
        assert code == codes.index(values[i + up])
    assert torch.equal(packed, codebook4._codebook4_quantize_reference(x, table, 16, "stochastic", SEED, OFFSET)[0])


def _flat(packed: Tensor) -> list[int]:
    return unpack_nibbles(packed, 77).flatten().tolist()


@each_format
def test_stochastic_rounding_is_unbiased_in_every_binade(format: str) -> None:
    """The sum of errors is within 4 of its own standard deviations, so a bias of 1 % of a step would show."""
    count, values = 200_000, torch.tensor(VALUES[format], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for exponent in range(-8, 4):
        magnitude = (1 + torch.rand(count, generator=generator)) * 2.0**exponent
        x = magnitude[magnitude < values[-1]]
        if not x.numel():
            continue
        for sign in (1, -1):
            packed = ops.fp4_cast(sign * x, format, rounding="stochastic", seed=exponent, offset=sign)
            error = ops.fp4_uncast(packed, x.numel(), format).double() - sign * x.double()
            i = torch.bucketize(x.double(), values, right=True) - 1
            lower, upper = values[i], values[i + 1]
            variance = ((x - lower) * (upper - x)).sum()
            assert error.sum().abs() <= 4 * variance.sqrt(), (exponent, sign)


def test_seeds_and_offsets_give_other_numbers() -> None:
    x = torch.rand(40_000) * 6
    settings = [(s, o) for s in (0, 1, 1 << 32, -1) for o in (0, 1, 1 << 32, -1)]
    ups = [ops.fp4_cast(x, rounding="stochastic", seed=s, offset=o) for s, o in settings]
    values = torch.stack([ops.fp4_uncast(packed, x.numel()) for packed in ups]) - x
    correlation = torch.corrcoef(values.double())
    assert (correlation - torch.eye(len(settings))).abs().max() < 6 / 200  # 6 standard deviations
    assert torch.equal(ups[5], ops.fp4_cast(x, rounding="stochastic", seed=1, offset=1))


def test_a_new_offset_does_not_recompile() -> None:
    table = torch.tensor(ops.code_values("nf4"))

    def everything(x: Tensor, offset: int) -> list[Tensor]:
        settings = ("stochastic", 7, offset)
        return [
            ops.fp4_cast(x, "e2m1", "max", *settings),
            *ops.mxfp4_quantize(x, "floor", *settings),
            *ops.nvfp4_quantize(x, None, *settings),
            *ops.codebook4_quantize(x, table, 16, *settings),
        ]

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(4, 40)
    for offset in (3, 4, 1 << 40):
        with torch._dynamo.config.patch(error_on_recompile=offset > 4):
            for got, want in zip(compiled(x, offset), everything(x, offset), strict=True):
                assert torch.equal(got, want)


def test_opcheck_of_stochastic_rounding() -> None:
    x, table = torch.randn(3, 37), torch.tensor(ops.code_values("nf4"))
    torch.library.opcheck(torch.ops.bitmill.fp4_cast.default, (x, "e3m0", "zero", "stochastic", 5, 6))
    torch.library.opcheck(torch.ops.bitmill.mxfp4_quantize.default, (x.half(), "even", "stochastic", 5, 6))
    torch.library.opcheck(torch.ops.bitmill.nvfp4_quantize.default, (x.T, None, "stochastic", 5, 6))
    torch.library.opcheck(torch.ops.bitmill.codebook4_quantize.default, (x, table, 8, "stochastic", 5, 6))


def test_unknown_roundings_are_refused() -> None:
    x = torch.randn(2, 40)
    choices = 'rounding must be "nearest_even", "stochastic", "toward_zero" or "half_away", got "up"'
    for call, message in (
        (lambda: ops.fp4_cast(x, rounding="up"), f"fp4_cast: {choices}"),
        (lambda: ops.mxfp4_quantize(x, rounding="up"), f"mxfp4_quantize: {choices}"),
        (lambda: fp4._fp4_cast_reference(x, rounding="up"), f"fp4_cast: {choices}"),
        (lambda: fp4._mxfp4_quantize_reference(x, rounding="up"), f"mxfp4_quantize: {choices}"),
        (lambda: ops.nvfp4_quantize(x, rounding="up"), f"nvfp4_quantize: {choices}"),
        (lambda: ops.fpq_quantize(x, torch.zeros(()), rounding="up"), f"fpq_quantize: {choices}"),
        (
            lambda: ops.codebook4_quantize(x, rounding="half_away"),
            'codebook4_quantize: rounding must be "nearest" or "stochastic", got "half_away"',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
