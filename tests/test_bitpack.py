# SPDX-License-Identifier: Apache-2.0
"""Packing: every kernel bit-equal to the default kernel, as the layout is written, and on every 16-bit float."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops._checks import MAX_COLUMNS
from bitmill.ops.bitpack import (
    LEVELS,
    _bitpack_reference,
    _bitunpack_reference,
    _tile_pack_reference,
    _tile_unpack_reference,
    mean_by_halves,
)
from problems import HEIGHTS, LAYOUTS, UGLY, WIDTHS, assert_same_bits, on_every_machine

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = torch.tensor(
    [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45, 1e-40, -1e-40, 3.4e38, -3.4e38, 0.5, -0.5]
)


pytestmark = pytest.mark.usefixtures("one_thread")


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, a tenth of them replaced by 0, -0 and +-0.5, where a level changes."""
    x = torch.randn(shape)
    ties = torch.tensor([0.0, -0.0, 0.5, -0.5])[torch.randint(4, shape)]
    return torch.where(torch.rand(shape) < 0.1, ties, x).to(dtype)


def assert_packed_alike(x: Tensor, what: str = "", **settings: Any) -> None:
    want = _bitpack_reference(x, **settings)
    for machine, got in on_every_machine(lambda: ops.bitpack(x, **settings)):
        for name, g, w in zip(("sign", "nonzero", "count", "mean"), got, want, strict=True):
            assert_same_bits(g, w, f"{name} on {machine}, {what} {list(x.shape)} {x.dtype} {settings}")


@pytest.mark.parametrize("k", WIDTHS)
def test_bitpack_equals_default(k: int) -> None:
    for i, m in enumerate(HEIGHTS):
        for j, levels in enumerate(LEVELS):
            dtype = FLOATS[(i + j) % 3]
            assert_packed_alike(values(m, k, dtype=dtype), levels=levels, threshold=0.5)
            assert_packed_alike(values(m, k, dtype=dtype), levels=levels, shift=values(k), threshold=-0.5, mean=True)


def test_bitpack_in_parallel() -> None:
    for levels in LEVELS:
        assert_packed_alike(values(300, 3072), levels=levels, shift=values(3072), threshold=0.5, mean=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", LEVELS)
def test_bitpack_of_every_16_bit_float(dtype: torch.dtype, levels: str) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    for shape in ((1, 1 << 16), (1 << 16, 1), (1 << 8, 1 << 8)):
        assert_packed_alike(every.view(shape), levels=levels, threshold=0.5, mean=True)
    sign, nonzero, _, _ = ops.bitpack(every, levels=levels, threshold=0.5)
    level = ops.bitunpack(sign, nonzero if levels == "sign" else None, 1 << 16).float()
    z = every.float()
    want = {"sign": torch.sign(z), "plus": (z >= 0) * 2.0 - 1, "bool": (z > 0.5) * 2.0 - 1}[levels]
    assert torch.equal(level, want)


@pytest.mark.parametrize("levels", LEVELS)
def test_bitpack_of_special_values(levels: str) -> None:
    for k in (1, 14, 33, 100):
        x = SPECIAL.repeat(k)[: 14 * k].view(k, 14).T.contiguous()
        for threshold in (0.0, 0.5, math.inf, -math.inf, math.nan):
            assert_packed_alike(x, levels=levels, threshold=threshold, mean=True)
        assert_packed_alike(x, levels=levels, shift=SPECIAL.repeat(8)[:k].clone(), mean=True)
    sign, nonzero, count, _ = ops.bitpack(torch.tensor([math.nan, -0.0, 1e-45, -1e-45, math.inf]))
    assert (sign.item(), nonzero.item(), count.item()) == (0b10100, 0b11100, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitpack_of_any_memory_layout(layout: str) -> None:
    for k in (1, 33, 197):
        for dtype in FLOATS:
            x = values(5, k, dtype=dtype)
            view = LAYOUTS[layout](x)
            assert_same_bits(view.clone(), x)
            for levels in LEVELS:
                assert_packed_alike(view, layout, levels=levels, shift=LAYOUTS[layout](values(1, k))[0], mean=True)
                for got, want in zip(ops.bitpack(view, None, levels), ops.bitpack(x, None, levels), strict=True):
                    assert_same_bits(got, want, layout)


def test_bitpack_of_expanded_rows() -> None:
    x = values(1, 70)
    for view in (x.expand(6, 70), x[0, 0].expand(70), x[:, None].expand(2, 3, 70)):
        assert_packed_alike(view, mean=True)


def test_bitunpack_of_rows_without_columns_takes_no_time_for_each() -> None:
    assert ops.bitunpack(torch.empty(2**40, 0, dtype=torch.int32), None, 0).shape == (2**40, 0)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("k", [0, 1, 65])
def test_bitpack_of_any_rank(leading: tuple[int, ...], k: int) -> None:
    for levels in LEVELS:
        x = values(*leading, k)
        assert_packed_alike(x, levels=levels, mean=True, shift=values(k), threshold=0.1)
        sign, nonzero, count, mean = ops.bitpack(x, levels=levels, mean=True)
        assert sign.shape == (*leading, -(-k // 32))
        assert nonzero.shape == (sign.shape if levels == "sign" else (0,))
        assert count.shape == mean.shape == leading


def test_bitpack_does_not_depend_on_values_past_the_row() -> None:
    """Everything past k is 0 in the planes, whatever lies behind the row in memory."""
    x = torch.full((4, 40), 3.0)[:, :33]
    sign, nonzero, count, mean = ops.bitpack(x, mean=True)
    assert sign.tolist() == nonzero.tolist() == [[-1, 1]] * 4
    assert count.tolist() == [33] * 4 and mean.tolist() == [3.0] * 4


def test_bitpack_mean_is_the_sum_by_halves() -> None:
    """Every width up to 3072, against the default kernel; some against a loop in numpy."""
    x = values(3, 3072).abs()
    for k in range(1, 3073):
        assert_same_bits(ops.bitpack(x[:, :k], mean=True)[3], mean_by_halves(x[:, :k]), f"k = {k}")
    for k in (1, 3, 64, 197, 3072):
        total = np.zeros(1 << (k - 1).bit_length(), np.float32)
        total[:k] = x[0, :k].numpy()
        while total.size > 1:
            total = total[: total.size // 2] + total[total.size // 2 :]
        assert ops.bitpack(x[0, :k], mean=True)[3].item() == total[0] / np.float32(k)


def test_bitunpack_undoes_bitpack() -> None:
    for k in (0, *WIDTHS):
        for leading in ((), (3,), (2, 2)):
            x = values(*leading, k)
            sign, nonzero, _, _ = ops.bitpack(x)
            for planes, want in (((sign, nonzero), torch.sign(x)), ((sign, None), (x > 0) * 2.0 - 1)):
                got = ops.bitunpack(*planes, k)
                assert_same_bits(got, want.to(torch.int8))
                assert_same_bits(got, _bitunpack_reference(*planes, k))


def test_bitunpack_of_strided_planes() -> None:
    sign, nonzero, _, _ = ops.bitpack(values(6, 100))
    wide = torch.stack((sign, nonzero), -1)
    assert_same_bits(ops.bitunpack(wide[..., 0], wide[..., 1], 100), ops.bitunpack(sign, nonzero, 100))


def codes_of(n: int, k: int, bits: int) -> Tensor:
    return torch.randint(1 << bits, (n, k), dtype=torch.uint8)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_tile_pack_round_trip_equals_default(bits: int) -> None:
    for n in (0, *HEIGHTS):
        for k in (0, 3, 8, 9, *WIDTHS):
            codes = codes_of(n, k, bits)
            tiles = ops.tile_pack(codes, bits)
            assert tiles.shape == (-(-n // 16), -(-k * bits // 32), 16)
            assert_same_bits(tiles, _tile_pack_reference(codes, bits))
            assert_same_bits(ops.tile_unpack(tiles, n, k, bits), codes)
            assert_same_bits(_tile_unpack_reference(tiles, n, k, bits), codes)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_tile_pack_of_every_code_in_every_place(bits: int) -> None:
    """All 2, 16 or 256 codes, in every row of a tile and every place of a word; bits above the code are dropped."""
    every = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([every.roll(i) for i in range(48)])
    tiles = ops.tile_pack(codes, bits)
    assert_same_bits(tiles, _tile_pack_reference(codes, bits))
    assert_same_bits(ops.tile_unpack(tiles, 48, 256, bits), codes & ((1 << bits) - 1))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_tile_pack_layout_is_the_written_one(bits: int) -> None:
    """Word [t, w, l] holds row 16 t + l, columns v w ... v w + v - 1, the lowest bits first; past n or k is 0."""
    n, k, v = 19, 37, 32 // bits
    codes = codes_of(n, k, bits)
    tiles = ops.tile_pack(codes, bits)
    for t in range(tiles.shape[0]):
        for w in range(tiles.shape[1]):
            for lane in range(16):
                word, row = tiles[t, w, lane].item() & 0xFFFFFFFF, 16 * t + lane
                inside = [codes[row, c].item() if row < n and c < k else 0 for c in range(v * w, v * w + v)]
                assert word == sum(code << (bits * i) for i, code in enumerate(inside))


def test_tile_pack_of_any_memory_layout() -> None:
    codes = codes_of(20, 45, 4)
    for name in ("transposed", "every second row", "odd offset", "sliced columns"):
        assert_same_bits(ops.tile_pack(LAYOUTS[name](codes), 4), ops.tile_pack(codes, 4), name)
    tiles = ops.tile_pack(codes, 4)
    strided = torch.stack((tiles, -tiles), -1)[..., 0]
    assert_same_bits(ops.tile_unpack(strided, 20, 45, 4), codes)


ROWS, PLANE = torch.randn(3, 40), torch.zeros(3, 2, dtype=torch.int32)
CODES, TILES = torch.zeros(3, 40, dtype=torch.uint8), torch.zeros(1, 2, 16, dtype=torch.int32)

# op, arguments, and the sentence; each is asked of the compiled, the default and the fake kernel.
ERRORS: list[tuple[str, tuple[Any, ...], str]] = [
    ("bitpack", (ROWS, None, "both"), 'levels must be "sign", "plus" or "bool", got "both"'),
    ("bitpack", (ROWS[0, 0],), "x must have at least one dimension, got a scalar"),
    ("bitpack", (ROWS.double(),), "x must be float32, bfloat16 or float16, got float64"),
    ("bitpack", (ROWS.int(),), "x must be float32, bfloat16 or float16, got int32"),
    ("bitpack", (ROWS, torch.zeros(41)), r"shift must have shape \[40\], got \[41\]"),
    ("bitpack", (ROWS, torch.zeros(1, 40)), r"shift must have shape \[40\], got \[1, 40\]"),
    ("bitpack", (ROWS, torch.zeros(40).half()), "shift must be float32, got float16"),
    ("bitpack", (torch.empty(0, MAX_COLUMNS + 1),), "x must have at most 16777216 columns, got 16777217"),
    ("bitunpack", (PLANE, None, 65), r"sign must have ceil\(k / 32\) words .* got k = 65 and 2 words"),
    ("bitunpack", (PLANE, None, -1), r"sign must have ceil\(k / 32\) words .* got k = -1 and 2 words"),
    ("bitunpack", (PLANE[0, 0], None, 1), "sign must have at least one dimension, got a scalar|x must have"),
    ("bitunpack", (PLANE.long(), None, 40), "sign must be int32, got int64"),
    ("bitunpack", (PLANE, PLANE[:2], 40), r"nonzero must have shape \[3, 2\], got \[2, 2\]"),
    ("bitunpack", (PLANE, PLANE.short(), 40), "nonzero must be int32, got "),
    ("tile_pack", (CODES, 2), "bits must be 1, 4 or 8, got 2"),
    ("tile_pack", (CODES[0], 1), r"codes must have shape \[n, k\], got \[40\]"),
    ("tile_pack", (CODES.int(), 1), "codes must be uint8, got int32"),
    (
        "tile_pack",
        (torch.empty(0, MAX_COLUMNS + 1, dtype=torch.uint8), 1),
        "codes must have at most 16777216|.* k is above 16777216",
    ),
    ("tile_unpack", (TILES, 3, 40, 3), "bits must be 1, 4 or 8, got 3"),
    ("tile_unpack", (TILES, -3, 40, 1), "n must be at least 0 and k between 0 and 16777216, got n = -3, k = 40"),
    ("tile_unpack", (TILES, 3, -40, 1), "n must be at least 0 and k between 0 and 16777216, got n = 3, k = -40"),
    ("tile_unpack", (TILES, 17, 40, 1), r"tiles must have shape \[2, 2, 16\], got \[1, 2, 16\]"),
    ("tile_unpack", (TILES, 3, 65, 1), r"tiles must have shape \[1, 3, 16\], got \[1, 2, 16\]"),
    ("tile_unpack", (TILES.float(), 3, 40, 1), "tiles must be int32, got float32"),
]
REFERENCES = {
    "bitpack": _bitpack_reference,
    "bitunpack": _bitunpack_reference,
    "tile_pack": _tile_pack_reference,
    "tile_unpack": _tile_unpack_reference,
}


def on_meta(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize(("op", "arguments", "message"), ERRORS)
def test_bitpack_family_errors(op: str, arguments: tuple[Any, ...], message: str) -> None:
    for kernel, inputs in (
        (getattr(ops, op), arguments),
        (REFERENCES[op], arguments),
        (getattr(ops, op), on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"{op}: ({message})"):
            kernel(*inputs)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("bitpack", (ROWS, torch.zeros(40, device="meta"))),
        ("bitpack", (ROWS.to("meta"), torch.zeros(40))),
        ("bitunpack", (PLANE, PLANE.to("meta"), 40)),
        ("bitunpack", (PLANE.to("meta"), PLANE, 40)),
    ],
)
def test_bitpack_family_wants_one_device(op: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=f"{op}: (shift|nonzero) must be on (meta|cpu), got (cpu|meta)"):
        getattr(ops, op)(*arguments)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("bitpack", (values(3, 40),)),
        ("bitpack", (values(2, 3, 33, dtype=torch.bfloat16), values(33), "plus", 0.0, True)),
        ("bitpack", (values(40, 3).T, None, "bool", 0.25, True)),
        ("bitpack", (values(0, 7), None, "sign", 0.0, True)),
        ("bitunpack", (PLANE, PLANE + 5, 40)),
        ("bitunpack", (PLANE.T.contiguous().T, None, 33)),
        ("bitunpack", (PLANE[:0], None, 64)),
        ("tile_pack", (CODES, 1)),
        ("tile_pack", (CODES.T, 4)),
        ("tile_pack", (CODES[:0], 8)),
        ("tile_unpack", (TILES, 3, 40, 1)),
        ("tile_unpack", (torch.ones(2, 5, 16, dtype=torch.int32), 17, 40, 4)),
        ("tile_unpack", (torch.ones(0, 10, 16, dtype=torch.int32), 0, 40, 8)),
    ],
)
def test_bitpack_family_opcheck(op: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.bitmill, op).default, arguments)


def test_bitpack_family_compiles_without_a_graph_break() -> None:
    def round_trip(x: Tensor, shift: Tensor) -> Tensor:
        sign, nonzero, count, mean = ops.bitpack(x, shift, mean=True)
        level = ops.bitunpack(sign, nonzero, x.shape[-1])
        return level * mean.unsqueeze(-1) + count.unsqueeze(-1)

    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True, backend="aot_eager")
    shift = values(33)
    assert_same_bits(compiled(x := values(4, 33), shift), round_trip(x, shift))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_bits(compiled(x := values(9, 33), shift), round_trip(x, shift))


def test_default_kernels_serve_every_ugly_shape() -> None:
    """The default kernels on sizes of 0 and 1: no special case is left to the compiled library."""
    for problem in UGLY:
        x = values(problem.m, problem.k)
        sign, nonzero, _, _ = _bitpack_reference(x, mean=True)
        assert torch.equal(_bitunpack_reference(sign, nonzero, problem.k).float(), torch.sign(x))
