# SPDX-License-Identifier: Apache-2.0
"""binary_embedding: every kernel equal to the default, any ids, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from binary_inputs import FLOATS, on_meta, tiles
from bitmill.ops.binary_embedding import _binary_embedding_reference
from problems import assert_same_bits, on_every_machine

OP = torch.ops.bitmill.binary_embedding.default


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
        (5, 33, "group_size must be 0 or a positive multiple of 32, got 33"),
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
