# SPDX-License-Identifier: Apache-2.0
"""Calls of ops leave nothing behind in the C heap."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch

from bitmill import ops

CALLS = 500


class MallInfo(ctypes.Structure):
    _fields_ = (("before", ctypes.c_size_t * 7), ("uordblks", ctypes.c_size_t), ("after", ctypes.c_size_t * 2))


def heap_in_use() -> int:
    """Bytes that this thread's heap has handed out."""
    info = ctypes.CDLL(None).mallinfo2
    info.restype = MallInfo
    return info().uordblks


def calls() -> dict[str, Callable[[], object]]:
    x, scale = torch.randn(4, 64), torch.rand(32, 1)
    sign, _, _, _ = ops.bitpack(x)
    weight = ops.tile_pack(torch.randint(0, 2, (32, 64), dtype=torch.uint8), 1)
    ranges = ops.bit_ranges(lambda dot: torch.sign(scale[:, 0] * dot + 0.5), 32, 64)
    heads = torch.randn(3, 1, 2, 8, 32)
    return {
        "bitpack": lambda: ops.bitpack(x),
        "binary_matmul": lambda: ops.binary_matmul(sign, weight, 32, 64),
        "binary_matmul_bits": lambda: ops.binary_matmul_bits(sign, weight, ranges, 32, 64),
        "binary_linear": lambda: ops.binary_linear(x, weight, scale),
        "binary_attention": lambda: ops.binary_attention(*heads),
        "fp4_cast": lambda: ops.fp4_cast(x, "e2m1"),
        "int8_quantize": lambda: ops.int8_quantize(x),
    }


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc counts its heap")
@pytest.mark.usefixtures("one_thread")
@torch.inference_mode()
def test_a_call_leaves_nothing_in_the_heap() -> None:
    """A str argument used to (`cpp/bindings/boxing.h`): 48 bytes a call."""
    for name, call in calls().items():
        for _ in range(20):
            call()
        gc.collect()
        before = heap_in_use()
        for _ in range(CALLS):
            call()
        gc.collect()
        assert heap_in_use() - before < 8 * CALLS, name
