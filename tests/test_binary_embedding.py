# SPDX-License-Identifier: Apache-2.0
"""binary_embedding and binary_embedding_norm: every kernel equal to the default, any ids, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from binary_inputs import FLOATS, on_meta, tiles
from bitmill.ops import LayerNormArguments, binary_embedding_norm
from bitmill.ops.binary_embedding import _binary_embedding_norm_reference, _binary_embedding_reference
from problems import assert_same_bits, on_every_machine

OP = torch.ops.bitmill.binary_embedding.default
NORM = torch.ops.bitmill.binary_embedding_norm.default


def arguments_of(
    k: int = 70, zeros: bool = False, dtype: torch.dtype = torch.float32, group_size: int = 0, shape: Any = (3, 5)
) -> tuple[Any, ...]:
    weight, nonzero, _ = tiles(40, k, zeros)
    scale = torch.randn(40, -(-k // group_size) if group_size else 1)
    scale[5:9] = torch.tensor([[0.0], [-0.0], [float("inf")], [float("nan")]])
    return torch.randint(40, shape), weight, nonzero, scale.to(dtype), k, group_size


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("zeros", [False, True])
def test_equal_default(dtype: torch.dtype, group_size: int, zeros: bool) -> None:
    for k in (1, 15, 16, 17, 31, 32, 33, 64, 100, 768):
        for shape in ((40,), (), (0, 4), (2, 3)):
            arguments = arguments_of(k, zeros, dtype, group_size, shape)
            want = _binary_embedding_reference(*arguments)
            for machine, got in on_every_machine(lambda arguments=arguments: OP(*arguments)):
                assert_same_bits(got, want, f"{machine}, {k}, {shape}")


def test_many_ids_on_two_threads() -> None:
    arguments = arguments_of(768, shape=(4, 512))
    want = _binary_embedding_reference(*arguments)
    for machine, got in on_every_machine(lambda: OP(*arguments)):
        assert_same_bits(got, want, machine)


@pytest.mark.parametrize("bad", [40, -1, 2**62])
def test_ids_outside(bad: int) -> None:
    arguments = (torch.tensor([0, bad]), *arguments_of()[1:])
    for kernel in (OP, _binary_embedding_reference):
        with pytest.raises(IndexError, match=rf"binary_embedding: ids must lie in \[0, 40\), got {bad}"):
            kernel(*arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, dtype=torch.int32), "ids must be int64, got int32"),
        (1, torch.zeros(2, 3, 16, dtype=torch.int32), r"weight must have shape \[3, 3, 16\], got \[2, 3, 16\]"),
        (2, torch.zeros(3, 2, 16, dtype=torch.int32), r"weight_nonzero must have shape \[3, 3, 16\]"),
        (3, torch.zeros(40, 2), r"scale must have shape \[40, 1\], got \[40, 2\]"),
        (3, torch.zeros(40, 1).double(), "scale must be float32, bfloat16 or float16, got float64"),
        (4, -1, "k must be between 0 and 16777216, got -1"),
        (5, 33, "group_size must be 0 or a positive multiple of 32 up to 16777216, got 33"),
    ],
)
def test_errors(place: int, value: Any, message: str) -> None:
    arguments = arguments_of()
    arguments = (*arguments[:place], value, *arguments[place + 1 :])
    for kernel, inputs in ((OP, arguments), (_binary_embedding_reference, arguments), (OP, on_meta(arguments))):
        with pytest.raises(ValueError, match=f"binary_embedding: {message}"):
            kernel(*inputs)


@pytest.mark.parametrize("zeros", [False, True])
def test_opcheck_and_compile(zeros: bool) -> None:
    arguments = arguments_of(zeros=zeros, group_size=32)
    arguments = (arguments[0] % 5, *arguments[1:])  # opcheck does not take NaN for equal
    torch.library.opcheck(OP, arguments)
    assert_same_bits(torch.compile(lambda *inputs: OP(*inputs), fullgraph=True)(*arguments), OP(*arguments))


def norm_arguments_of(
    k: int = 70, zeros: bool = False, group_size: int = 0, shape: Any = (3, 5), typed: bool = True, first: int = 2
) -> tuple[Any, ...]:
    words = arguments_of(k, zeros, torch.float32, group_size, shape)
    words[3].nan_to_num_(0.5, 2.0)
    n, norm = shape[-1], (torch.randn(k), torch.randn(k), 1e-3)
    types, type_ids = torch.randn(3, k), torch.randint(3, shape) if typed else None
    return *words, types, type_ids, torch.randn(first + n + 1, k), first, *norm


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("typed", [False, True])
def test_norm_equal_default(typed: bool, zeros: bool) -> None:
    for k, group_size in ((1, 0), (17, 0), (100, 32), (768, 0)):
        for shape, first in (((5,), 0), ((0, 4), 1), ((2, 0), 0), ((2, 3), 7), ((3, 1, 30), 2), ((2, 150), 3)):
            arguments = norm_arguments_of(k, zeros, group_size, shape, typed, first)
            want = _binary_embedding_norm_reference(*arguments)
            for machine, got in on_every_machine(lambda arguments=arguments: NORM(*arguments)):
                assert_same_bits(got, want, f"{machine}, {k}, {shape}")


def test_norm_is_its_parts() -> None:
    *arguments, types, type_ids, positions, first, weight, bias, eps = norm_arguments_of(shape=(2, 40))
    words = OP(*arguments) + torch.nn.functional.embedding(type_ids, types)
    want = torch.layer_norm(words + positions[first : first + 40], (70,), weight, bias, eps)
    norm = LayerNormArguments(weight, bias, eps)
    assert_same_bits(binary_embedding_norm(*arguments, types, type_ids, positions, first, norm), want)
    transposed = [t.t().contiguous().t() for t in (arguments[0], types, type_ids, positions)]
    assert_same_bits(
        NORM(transposed[0], *arguments[1:], *transposed[1:], first, weight.repeat_interleave(2)[::2], bias, eps), want
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.tensor(3), "ids must have at least one dimension, got a scalar"),
        (3, torch.zeros(40, 1).half(), "scale must be float32, got float16"),
        (4, 2**24 + 1, "k must be between 0 and 16777216, got 16777217"),
        (6, torch.zeros(3, 69), r"types must have shape \[3, 70\], got \[3, 69\]"),
        (6, torch.zeros(0, 70), "types must have at least one row, got none"),
        (7, torch.zeros(3, 4, dtype=torch.int64), r"type_ids must have shape \[3, 5\], got \[3, 4\]"),
        (7, torch.zeros(3, 5, dtype=torch.int32), "type_ids must be int64, got int32"),
        (8, torch.zeros(6, 70), "positions must have rows for 5 ids from 2 on, got 6 rows"),
        (8, torch.zeros(70), r"positions must have shape \[70, 70\], got \[70\]"),
        (9, -1, "first must be at least 0, got -1"),
        (9, 2**63 - 1, "positions must have rows for 5 ids from 9223372036854775807 on, got 8 rows"),
        (10, torch.zeros(1), r"norm_weight must have shape \[70\], got \[1\]"),
        (11, torch.zeros(70).double(), "norm_bias must be float32, got float64"),
    ],
)
def test_norm_errors(place: int, value: Any, message: str) -> None:
    arguments = norm_arguments_of()
    arguments = (*arguments[:place], value, *arguments[place + 1 :])
    for kernel, inputs in (
        (NORM, arguments),
        (_binary_embedding_norm_reference, arguments),
        (NORM, on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"binary_embedding_norm: {message}"):
            kernel(*inputs)


@pytest.mark.parametrize(("place", "name", "rows"), [(0, "ids", 40), (7, "type_ids", 3)])
def test_norm_ids_outside(place: int, name: str, rows: int) -> None:
    for bad in (rows, -1):
        arguments = norm_arguments_of(shape=(2,))
        arguments = (*arguments[:place], torch.tensor([0, bad]), *arguments[place + 1 :])
        for kernel in (NORM, _binary_embedding_norm_reference):
            with pytest.raises(
                IndexError, match=rf"^binary_embedding_norm: {name} must lie in \[0, {rows}\), got {bad}"
            ):
                kernel(*arguments)


def test_norm_opcheck_and_compile() -> None:
    for typed in (False, True):
        torch.library.opcheck(NORM, norm_arguments_of(typed=typed, zeros=typed, group_size=32))
    arguments = norm_arguments_of()
    assert_same_bits(torch.compile(lambda *inputs: NORM(*inputs), fullgraph=True)(*arguments), NORM(*arguments))
