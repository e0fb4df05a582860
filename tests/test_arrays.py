# SPDX-License-Identifier: Apache-2.0
"""bitmill.arrays against the torch ops and plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitmill import arrays, ops
from bitmill.ops._machine import instruction_sets, use_instruction_set

RNG = np.random.default_rng(0)


def activations(*shape: int, dtype: type = np.float32) -> np.ndarray:
    x = RNG.standard_normal(shape).astype(dtype)
    x[RNG.random(shape) < 0.1] = 0
    return x


@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 100, 768])
@pytest.mark.parametrize("levels", ["sign", "plus", "bool"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bitpack_equals_the_op(k: int, levels: str, dtype: type) -> None:
    x = activations(3, 5, k, dtype=dtype)
    sign, nonzero = arrays.bitpack(x, levels, 0.25)
    want_sign, want_nonzero, _, _ = ops.bitpack(torch.from_numpy(x), None, levels, 0.25)
    assert np.array_equal(sign, want_sign.numpy())
    if levels == "sign":
        assert np.array_equal(nonzero, want_nonzero.numpy())
        assert np.array_equal(arrays.bitunpack(sign, nonzero, k), np.sign(x).astype(np.int8))
    else:
        assert nonzero is None


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (40, 100), (0, 8), (3, 0)])
def test_tiles_round_trip(bits: int, shape: tuple[int, int]) -> None:
    codes = RNG.integers(0, 1 << bits, shape).astype(np.uint8)
    tiles = arrays.tile_pack(codes, bits)
    assert np.array_equal(tiles, ops.tile_pack(torch.from_numpy(codes), bits).numpy())
    assert np.array_equal(arrays.tile_unpack(tiles, *shape, bits), codes)


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 7, 100), (4, 64, 768), (3, 100, 33), (0, 4, 8), (2, 3, 0)])
def test_binary_matmul_is_exact(name: str, m: int, n: int, k: int) -> None:
    x = activations(2, m, k)
    w = RNG.integers(0, 2, (n, k)).astype(np.uint8)
    tiles = arrays.tile_pack(w, 1)
    with use_instruction_set(name):
        sign, nonzero = arrays.bitpack(x)
        dot = arrays.binary_matmul(sign, tiles, n, k, nonzero)
        ones, _ = arrays.bitpack(x, "bool", 0.0)
        counts = arrays.binary_matmul(ones, tiles, n, k, levels="bool")
    signs = 2 * w.astype(np.int64) - 1
    assert np.array_equal(dot, np.sign(x).astype(np.int64) @ signs.T)
    assert np.array_equal(counts, (x > 0).astype(np.int64) @ signs.T)


@pytest.mark.parametrize("format", ["e2m1", "e1m2", "e3m0"])
def test_fp4_cast_equals_the_op(format: str) -> None:
    x = activations(4, 33) * 4
    packed = arrays.fp4_cast(x, format)
    assert np.array_equal(packed, ops.fp4_cast(torch.from_numpy(x), format).numpy())
    for rounding in ("nearest_even", "stochastic", "toward_zero", "half_away"):
        want = ops.fp4_cast(torch.from_numpy(x), format, "max", rounding, -5, 1 << 40)
        assert np.array_equal(arrays.fp4_cast(x, format, rounding, -5, 1 << 40), want.numpy())
    values = arrays.fp4_uncast(packed, 33, format)
    assert np.array_equal(values, ops.fp4_uncast(torch.from_numpy(packed), 33, format).numpy())


def test_strided_arrays_give_the_same_bits() -> None:
    x = activations(6, 64)
    assert np.array_equal(arrays.bitpack(x.T)[0], arrays.bitpack(np.ascontiguousarray(x.T))[0])
    assert np.array_equal(arrays.bitpack(x[:, ::2])[0], arrays.bitpack(np.ascontiguousarray(x[:, ::2]))[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arrays.bitpack(np.zeros((2, 3))), "x must be float32 or float16, got 'float64'"),
        (lambda: arrays.bitpack(np.float32(1)), "x must be an array of at least one dimension"),
        (lambda: arrays.bitpack(np.zeros((2, 3), np.float32), "ternary"), "levels must be one of sign, plus, bool"),
        (lambda: arrays.bitunpack(np.zeros((2, 2), np.int32), None, 100), "last dimension of sign must be 4"),
        (lambda: arrays.tile_pack(np.zeros((2, 3), np.uint8), 2), "bits must be 1, 4 or 8, got 2"),
        (lambda: arrays.tile_pack(np.zeros(3, np.uint8), 1), "codes must be an array [n, k]"),
        (lambda: arrays.tile_unpack(np.zeros((1, 1, 16), np.int32), 17, 3, 1), "must be tiles (2, 1, 16)"),
        (lambda: arrays.tile_unpack(np.zeros((1, 1, 16), np.int32), -1, 3, 1), "n must be an integer"),
        (
            lambda: arrays.binary_matmul(np.zeros((2, 1), np.int64), np.zeros((1, 1, 16), np.int32), 3, 8),
            "a must be int32, got 'int64'",
        ),
        (lambda: arrays.fp4_cast(np.zeros(3, np.float32), "e4m3"), "format must be one of e2m1, e1m2, e3m0"),
        (
            lambda: arrays.fp4_cast(np.zeros(3, np.float32), "e2m1", "up"),
            "rounding must be one of nearest_even, ",
        ),
        (lambda: arrays.fp4_uncast(np.zeros(3, np.uint8), -2), "k must be an integer in [0,"),
    ],
)
def test_bad_input_is_one_sentence(call, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "weight"])
def test_bits_past_the_last_column_are_refused(name: str) -> None:
    a, _ = arrays.bitpack(activations(2, 40), "plus")
    weight = arrays.tile_pack(np.ones((16, 40), np.uint8), 1)
    arrays.binary_matmul(a, weight, 16, 40)
    {"a": a, "weight": weight}[name][..., -1, -1] |= 1 << 20 if name == "a" else 1 << 8
    with pytest.raises(ValueError, match=f"binary_matmul: {name} must be 0 in all bits past column 40"):
        arrays.binary_matmul(a, weight, 16, 40)
