# SPDX-License-Identifier: Apache-2.0
"""Every op with a compiled kernel for the CPU has one for CUDA, or a composition that is said to be one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bitmill.ops import _cuda, _library
from bitmill.ops.bitpack import _bitunpack_reference, _tile_pack_reference, _tile_unpack_reference
from bitmill.ops.fp4_linear import _fp4_weight_reference
from bitmill.ops.int8 import _int8_quantize_reference

BINDINGS = Path(__file__).parent.parent / "cpp" / "bindings"


def bound(key: str) -> set[str]:
    """Ops with a row in a table of the C++ bindings."""
    rows = set()
    for file in BINDINGS.glob("*.cpp"):
        for table in re.findall(
            rf"STABLE_TORCH_LIBRARY_IMPL\(bitmill, {key}, m\) \{{(.*?)\n?\}}", file.read_text(), re.S
        ):
            rows |= set(re.findall(r'm\.impl\("(\w+)"', table))
            if "BITMILL_FP4_CASTS" in table:
                rows |= set(re.findall(r'library\.impl\("(\w+)"', (BINDINGS / "fp4_casts.h").read_text()))
    return rows


@pytest.mark.skipif(not BINDINGS.is_dir(), reason="the bindings' sources are not here")
def test_every_op_has_a_kernel_or_a_composition_on_cuda() -> None:
    on_cpu, on_cuda = bound("CPU"), bound("CUDA")
    assert {"bitpack", "fp4_cast", "nvfp4_quantize", "fp4_linear"} <= on_cuda <= on_cpu <= set(_library.op_names())
    assert sorted([*on_cuda, *_cuda.COMPOSED]) == sorted(on_cpu), "each op is in exactly one of the two"


def test_conversions_compose_on_one_device() -> None:
    """No tensor of a default kernel lies on the CPU where the arguments do not: a meta tensor meets none of those."""
    x, codes = torch.empty(20, 70, device="meta"), torch.empty(20, 70, dtype=torch.uint8, device="meta")
    tiles = _tile_pack_reference(codes, 4)
    results = [
        tiles,
        _tile_unpack_reference(tiles, 20, 70, 4),
        _bitunpack_reference(torch.empty(20, 3, dtype=torch.int32, device="meta"), None, 70),
        _fp4_weight_reference(tiles, x[:, :1], 20, 70, "e2m1", 0, None),
        *_int8_quantize_reference(x),
    ]
    assert all(t.device.type == "meta" for t in results)


def test_what_runs_an_op_on_cuda() -> None:
    assert _cuda.kernel_on_cuda("bitunpack") == "torch"
    assert set(_cuda.COMPOSED) <= set(_library.op_names())
