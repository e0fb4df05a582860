# SPDX-License-Identifier: Apache-2.0
"""The binary products name a wrong argument, and pass opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from binary_inputs import (
    FLOATS,
    changed,
    linear_arguments,
    on_meta,
    values,
    with_gradients,
)
from bitmill import ops
from bitmill.ops._library import failure
from bitmill.ops.binary_matmul import (
    _binary_linear_reference,
    _binary_matmul_reference,
    _binary_weight_linear_reference,
)

pytestmark = pytest.mark.usefixtures("one_thread")


LINEAR = linear_arguments(3, 17, 40, zeros=True, bias=True, shift=True, alpha=True)
WEIGHT_SHAPE = r"must have shape \[2, 2, 16\], got \[2, 3, 16\]"
LINEAR_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.randn(())}, "x must have at least one dimension, got a scalar"),
    ({"x": torch.randn(3, 40).double()}, "x must be float32, bfloat16 or float16, got float64"),
    ({"x": torch.ones(3, 40, dtype=torch.int32)}, "x must be float32, bfloat16 or float16, got int32"),
    ({"x": torch.randn(3, 65), "shift": None}, r"weight must have shape \[2, 3, 16\], got \[2, 2, 16\]; pack"),
    ({"weight": torch.zeros(2, 3, 16).int()}, f"weight {WEIGHT_SHAPE}; pack the weight with bitmill.ops.tile_pack"),
    ({"weight": torch.zeros(32, 2).int()}, r"weight must have shape \[2, 2, 16\], got \[32, 2\]"),
    ({"weight": torch.zeros(2, 2, 16)}, "weight must be int32, got float32"),
    ({"weight_nonzero": torch.zeros(2, 3, 16).int()}, f"weight_nonzero {WEIGHT_SHAPE}"),
    ({"weight_nonzero": torch.zeros(2, 2, 16).long()}, "weight_nonzero must be int32, got int64"),
    ({"scale": torch.ones(17)}, r"scale must have shape \[17, 1\], got \[17\]"),
    ({"scale": torch.ones(17, 2)}, r"scale must have shape \[17, 1\], got \[17, 2\]"),
    ({"scale": torch.tensor(1.0)}, r"scale must have shape \[0, 1\], got \[\]"),
    ({"scale": torch.ones(17, 1).bfloat16()}, "scale must be float32, got bfloat16"),
    ({"group_size": 32}, r"scale must have shape \[17, 2\], got \[17, 1\]"),
    ({"group_size": 33}, "group_size must be 0 or a positive multiple of 32 up to 16777216, got 33"),
    ({"group_size": -32}, "group_size must be 0 or a positive multiple of 32 up to 16777216, got -32"),
    ({"bias": torch.ones(16)}, r"bias must have shape \[17\], got \[16\]"),
    ({"bias": torch.ones(17).half()}, "bias must be float32, got float16"),
    ({"shift": torch.ones(39)}, r"shift must have shape \[40\], got \[39\]"),
    ({"shift": torch.ones(40).double()}, "shift must be float32, got float64"),
    ({"alpha": torch.ones(1)}, r"alpha must have shape \[\], got \[1\]"),
    ({"alpha": torch.ones(()).half()}, "alpha must be float32, got float16"),
    ({"levels": "signs"}, 'levels must be "sign", "plus" or "bool", got "signs"'),
    (
        {"surrogate": "ste"},
        'surrogate must be "identity", "clip", "clip_open", "polynomial", "unit", "fourier", "ede" or "tanh", got ',
    ),
]


@pytest.mark.parametrize(("changes", "message"), LINEAR_ERRORS, ids=lambda p: p[:30] if isinstance(p, str) else "")
def test_binary_linear_errors(changes: dict[str, Any], message: str) -> None:
    arguments = changed(LINEAR, **changes)
    for kernel, inputs in (
        (ops.binary_linear, arguments),
        (_binary_linear_reference, arguments),
        (ops.binary_linear, on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"binary_linear: {message}"):
            kernel(*inputs)
    if changes.keys() & {"shift", "alpha", "levels", "surrogate"}:
        return
    floats = (*arguments[:5], arguments[9])
    for kernel, inputs in (
        (ops.binary_weight_linear, floats),
        (_binary_weight_linear_reference, (*floats, "float")),
        (ops.binary_weight_linear, on_meta(floats)),
    ):
        with pytest.raises(ValueError, match=f"binary_weight_linear: {message}"):
            kernel(*inputs)


PLANE, TILES = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, 2, 16, dtype=torch.int32)
MATMUL_ERRORS: list[tuple[tuple[Any, ...], str]] = [
    ((PLANE, TILES, 17, 65), r"a must have shape \[3, 3\], got \[3, 2\]"),
    ((PLANE, TILES, 33, 40), r"weight must have shape \[3, 2, 16\], got \[2, 2, 16\]; pack the weight"),
    ((PLANE, TILES, -1, 40), "n must be at least 0 and k between 0 and 16777216, got n = -1, k = 40"),
    ((PLANE, TILES, 17, -40), "n must be at least 0 and k between 0 and 16777216, got n = 17, k = -40"),
    ((PLANE[0, 0], TILES, 17, 40), "(a|x) must have at least one dimension, got a scalar"),
    ((PLANE.long(), TILES, 17, 40), "a must be int32, got int64"),
    ((PLANE, TILES.to(torch.uint8), 17, 40), "weight must be int32, got uint8"),
    ((PLANE, TILES, 17, 40, PLANE[:2]), r"a_nonzero must have shape \[3, 2\], got \[2, 2\]"),
    ((PLANE, TILES, 17, 40, PLANE.bool()), "a_nonzero must be int32, got bool"),
    ((PLANE, TILES, 17, 40, None, TILES[:1]), r"weight_nonzero must have shape \[2, 2, 16\], got \[1, 2, 16\]"),
    ((PLANE, TILES, 17, 40, None, None, "ternary"), 'levels must be "sign", "plus" or "bool", got "ternary"'),
    ((PLANE, TILES, 17, 40, PLANE, None, "bool"), 'a_nonzero goes with levels="sign" only, got "bool"'),
    ((PLANE, TILES, 17, 40, PLANE, None, "plus"), 'a_nonzero goes with levels="sign" only, got "plus"'),
]


@pytest.mark.parametrize(("arguments", "message"), MATMUL_ERRORS, ids=lambda p: p[:30] if isinstance(p, str) else "")
def test_binary_matmul_errors(arguments: tuple[Any, ...], message: str) -> None:
    for kernel, inputs in (
        (ops.binary_matmul, arguments),
        (_binary_matmul_reference, arguments),
        (ops.binary_matmul, on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"binary_matmul: {message}"):
            kernel(*inputs)


def test_binary_ops_want_one_device() -> None:
    for name in ("weight", "scale", "bias", "weight_nonzero", "shift", "alpha"):
        place = ("x", "weight", "scale", "bias", "weight_nonzero", "shift", "alpha").index(name)
        moved = changed(LINEAR, **{name: LINEAR[place].to("meta")})
        with pytest.raises(ValueError, match=f"binary_linear: {name} must be on cpu, got meta"):
            ops.binary_linear(*moved)
    everything_but_x = (LINEAR[0], *on_meta(LINEAR[1:]))
    with pytest.raises(ValueError, match="must be on cpu, got meta"):
        ops.binary_linear(*everything_but_x)
    only_x = (LINEAR[0].to("meta"), *LINEAR[1:])
    with pytest.raises(ValueError, match=r"binary_linear: .* must be on meta, got cpu"):
        ops.binary_linear(*only_x)
    with pytest.raises(ValueError, match="binary_weight_linear: scale must be on meta, got cpu"):
        ops.binary_weight_linear(*only_x[:5])
    with pytest.raises(ValueError, match="binary_matmul: weight must be on cpu, got meta; move the layer or its input"):
        ops.binary_matmul(PLANE, TILES.to("meta"), 17, 40)
    with pytest.raises(ValueError, match="binary_matmul: weight must be on meta, got cpu"):
        ops.binary_matmul(PLANE.to("meta"), TILES, 17, 40)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("binary_matmul", (PLANE, TILES, 17, 40)),
        ("binary_matmul", (PLANE + 3, TILES, 17, 40, PLANE + 7, TILES + 1, "sign")),
        ("binary_matmul", (PLANE.T.contiguous().T, TILES, 17, 40, None, None, "bool")),
        ("binary_matmul", (PLANE[:0], TILES, 17, 40)),
        ("binary_linear", linear_arguments(3, 17, 40)),
        ("binary_linear", with_gradients(linear_arguments(3, 17, 40, bias=True, shift=True), (0, 2, 3, 5))),
        (
            "binary_linear",
            with_gradients(linear_arguments(3, 17, 40, "bool", torch.float32, *(True,) * 5, 32, "unit"), (0, 2, 3, 5)),
        ),
        ("binary_linear", with_gradients(linear_arguments(3, 17, 40, "plus", FLOATS[1], surrogate="identity"), (0,))),
        ("binary_linear", (values(40, 3).T, *LINEAR[1:])),
    ],
)
def test_binary_ops_opcheck(op: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.bitmill, op).default, arguments)


@pytest.mark.skipif(failure("_ops_cpu") is not None, reason="no compiled kernels")
def test_bits_past_k_are_refused() -> None:
    """Kernels count whole words: a bit past k would be a silent wrong number."""
    k = 40
    sign, nonzero, _, _ = ops.bitpack(torch.randn(3, k))
    tiles = ops.tile_pack(torch.ones(5, k, dtype=torch.uint8), 1)
    dirty, dirty_nonzero, dirty_tiles = sign.clone(), nonzero.clone(), tiles.clone()
    dirty[2, 1] |= 1 << 8
    dirty_nonzero[0, 1] |= -(1 << 31)
    dirty_tiles[0, 1, 4] |= 1 << 20
    for arguments, name in (
        ((dirty, tiles, 5, k), "a"),
        ((sign, tiles, 5, k, dirty_nonzero), "a_nonzero"),
        ((sign, dirty_tiles, 5, k), "weight"),
    ):
        with pytest.raises(ValueError, match=f"bits of {name} past column k = 40 must be 0"):
            ops.binary_matmul(*arguments)
    for op in (ops.binary_linear, ops.binary_weight_linear):
        with pytest.raises(ValueError, match="bits of weight past column"):
            op(torch.randn(3, k), dirty_tiles, torch.ones(5, 1))
