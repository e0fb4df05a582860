# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels on NumPy arrays; torch is not needed.

Layouts and formulas are those of `bitmill.ops`: activation rows int32 [..., ceil(k / 32)], weight tiles int32
[ceil(n / 16), ceil(k bits / 32), 16], FP4 bytes uint8 [..., ceil(k / 2)] with element 0 in the low nibble. One thread.
"""

from __future__ import annotations

from numbers import Real

import numpy as np
from numpy.typing import NDArray

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"bitmill.arrays needs the compiled library _C, which cannot be imported ({error}); install bitmill from a"
        " wheel, or with a C++20 compiler"
    ) from error

_MAX_COLUMNS = 1 << 24
_LEVELS = ("sign", "plus", "bool")
_FORMATS = ("e2m1", "e1m2", "e3m0")
_ROUNDINGS = ("nearest_even", "stochastic", "toward_zero", "half_away")


def bitpack(
    x: NDArray[np.generic], levels: str = "sign", threshold: float = 0.0
) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    """Pack float32 or float16 rows [..., k] to bits.

    Args:
        levels: "sign" {-1, 0, +1}, "plus" {-1, +1} with 0 as +1, or "bool" [x > threshold].
    Returns:
        sign int32 [..., ceil(k / 32)], and nonzero of the same shape ("sign") or None.
    Raises:
        ValueError: for another dtype, a scalar, or unknown levels.
    """
    _require(levels in _LEVELS, "bitpack", "levels", f"one of {', '.join(_LEVELS)}", levels)
    _require(isinstance(threshold, Real), "bitpack", "threshold", "a number", threshold)
    rows = _float_rows("bitpack", x)
    sign, nonzero = _C.bitpack(rows, rows.dtype == np.float16, levels, threshold)
    shape = (*x.shape[:-1], sign.shape[1])
    return sign.reshape(shape), nonzero.reshape(shape) if levels == "sign" else None


def bitunpack(sign: NDArray[np.int32], nonzero: NDArray[np.int32] | None, k: int) -> NDArray[np.int8]:
    """Undo `bitpack`: int8 [..., k] of -1, 0 (only with `nonzero`) and +1."""
    _require_columns("bitunpack", k)
    words = _rows("bitunpack", "sign", sign, np.int32, _words(k))
    mask = None if nonzero is None else _rows("bitunpack", "nonzero", nonzero, np.int32, _words(k), sign.shape)
    return _C.bitunpack(words, mask, k).reshape(*sign.shape[:-1], k)


def tile_pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Pack uint8 codes [n, k] of 1, 4 or 8 bits to weight tiles."""
    _require_bits("tile_pack", bits)
    _require(
        isinstance(codes, np.ndarray) and codes.ndim == 2, "tile_pack", "codes", "an array [n, k]", np.shape(codes)
    )
    return _C.tile_pack(_rows("tile_pack", "codes", codes, np.uint8, codes.shape[1]), bits)


def tile_unpack(tiles: NDArray[np.int32], n: int, k: int, bits: int) -> NDArray[np.uint8]:
    """Undo `tile_pack`: uint8 codes [n, k]."""
    _require_bits("tile_unpack", bits)
    return _C.tile_unpack(_tiles("tile_unpack", tiles, n, k, bits), n, k, bits)


def binary_matmul(
    a: NDArray[np.int32],
    weight: NDArray[np.int32],
    n: int,
    k: int,
    a_nonzero: NDArray[np.int32] | None = None,
    levels: str = "sign",
) -> NDArray[np.int32]:
    """Exact products of packed rows [..., ceil(k / 32)] with weight tiles of n x k bits: int32 [..., n].

    Activations are {-1, +1}, with `a_nonzero` {-1, 0, +1}, or {0, 1} for levels "bool".
    """
    _require(levels in _LEVELS, "binary_matmul", "levels", f"one of {', '.join(_LEVELS)}", levels)
    _require(
        a_nonzero is None or levels == "sign", "binary_matmul", "a_nonzero", 'None unless levels is "sign"', levels
    )
    rows = _rows("binary_matmul", "a", a, np.int32, _words(k))
    mask = None if a_nonzero is None else _rows("binary_matmul", "a_nonzero", a_nonzero, np.int32, _words(k), a.shape)
    tiles = _tiles("binary_matmul", weight, n, k, 1)
    for name, last in (("a", rows[:, -1:]), ("weight", tiles[:, -1:])):
        past = k % 32 and (last.view(np.uint32) >> np.uint32(k % 32)).any()
        _require(not past, "binary_matmul", name, f"0 in all bits past column {k}", "others; pack it again")
    return _C.binary_matmul(rows, mask, tiles, n, k, levels == "bool").reshape(*a.shape[:-1], n)


def fp4_cast(
    x: NDArray[np.generic],
    format: str = "e2m1",
    rounding: str = "nearest_even",
    seed: int = 0,
    offset: int = 0,
) -> NDArray[np.uint8]:
    """Cast float32 or float16 [..., k] to packed 4-bit codes uint8 [..., ceil(k / 2)], saturating, NaN to the largest
    value. Roundings, seed and offset are those of `bitmill.ops.fp4_cast`."""
    _require(format in _FORMATS, "fp4_cast", "format", f"one of {', '.join(_FORMATS)}", format)
    _require(rounding in _ROUNDINGS, "fp4_cast", "rounding", f"one of {', '.join(_ROUNDINGS)}", rounding)
    for name, value in (("seed", seed), ("offset", offset)):
        _require(-(2**63) <= value < 2**63, "fp4_cast", name, "an int64", value)
    rows = _float_rows("fp4_cast", x)
    packed = _C.fp4_cast(rows, rows.dtype == np.float16, format, rounding, seed, offset)
    return packed.reshape(*x.shape[:-1], packed.shape[1])


def fp4_uncast(packed: NDArray[np.uint8], k: int, format: str = "e2m1") -> NDArray[np.float32]:
    """Values float32 [..., k] of packed 4-bit codes."""
    _require(format in _FORMATS, "fp4_uncast", "format", f"one of {', '.join(_FORMATS)}", format)
    _require_columns("fp4_uncast", k)
    rows = _rows("fp4_uncast", "packed", packed, np.uint8, (k + 1) // 2)
    return _C.fp4_uncast(rows, k, format).reshape(*packed.shape[:-1], k)


def _words(k: int) -> int:
    return (k + 31) // 32


def _require(condition: bool, function: str, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{function}: {name} must be {expected}, got {got!r}")


def _require_bits(function: str, bits: int) -> None:
    _require(bits in (1, 4, 8), function, "bits", "1, 4 or 8", bits)


def _require_columns(function: str, k: int, name: str = "k") -> None:
    whole = isinstance(k, (int, np.integer)) and 0 <= k <= _MAX_COLUMNS
    _require(whole, function, name, f"an integer in [0, {_MAX_COLUMNS}]", k)


def _float_rows(function: str, x: NDArray[np.generic]) -> NDArray[np.generic]:
    _require(isinstance(x, np.ndarray) and x.ndim >= 1, function, "x", "an array of at least one dimension", type(x))
    _require(x.dtype in (np.float32, np.float16), function, "x", "float32 or float16", str(x.dtype))
    _require_columns(function, x.shape[-1], "the last dimension of x")
    return np.ascontiguousarray(x).reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def _rows(
    function: str,
    name: str,
    array: NDArray[np.generic],
    dtype: type[np.generic],
    columns: int,
    shape: tuple[int, ...] | None = None,
) -> NDArray:
    _require(isinstance(array, np.ndarray) and array.ndim >= 1, function, name, "an array", type(array))
    _require(array.dtype == dtype, function, name, np.dtype(dtype).name, str(array.dtype))
    _require(array.shape[-1] == columns, function, f"the last dimension of {name}", str(columns), array.shape)
    _require(shape is None or array.shape == shape, function, f"the shape of {name}", str(shape), array.shape)
    return np.ascontiguousarray(array).reshape(int(np.prod(array.shape[:-1])), columns)


def _tiles(function: str, tiles: NDArray[np.int32], n: int, k: int, bits: int) -> NDArray[np.int32]:
    _require_columns(function, k)
    _require(isinstance(n, (int, np.integer)) and 0 <= n <= 2**31, function, "n", "an integer in [0, 2^31]", n)
    shape = ((n + 15) // 16, (k * bits + 31) // 32, 16)
    _require(
        isinstance(tiles, np.ndarray) and tiles.shape == shape, function, "weight", f"tiles {shape}", np.shape(tiles)
    )
    _require(tiles.dtype == np.int32, function, "weight", "int32", str(tiles.dtype))
    return np.ascontiguousarray(tiles)
