# SPDX-License-Identifier: Apache-2.0
"""The casts against other programs, where they are installed. cuda_fp4.h is in tests/cpp/test_fp4_cuda.cpp.

They differ in what a NaN becomes: ml_dtypes has code 8 for +NaN and 0 for -NaN, torchao no defined code.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bitmill import ops
from bitmill.ops.fp4 import unpack_nibbles
from fp4_cast_inputs import HALVES, every, finite_rows

KINDS = (*HALVES, "float32")
each_kind = pytest.mark.parametrize("kind", KINDS)


def peer(name: str) -> ModuleType:
    pytest.importorskip(name.split(".")[0], reason=f"{name.split('.')[0]} is not installed; pip install it to compare")
    return importlib.import_module(name)


def hard_rows(width: int) -> Tensor:
    """Rows of one block each, whose largest magnitudes lie around powers of two and what scale rules decide by."""
    factors = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.875]).unsqueeze(1).view(torch.int32)
    near = (factors + torch.arange(-2, 3, dtype=torch.int32)).view(torch.float32).flatten()
    amax = torch.cat([near * 2.0**exponent for exponent in range(-125, 127, 7)])
    x = torch.rand(amax.numel(), width) * 2 - 1
    x[:, width // 2] = 1
    return x * amax.unsqueeze(1)


@each_kind
def test_ml_dtypes_e2m1(kind: str) -> None:
    ml_dtypes = peer("ml_dtypes")
    x = every(kind)
    x = x[~x.isnan()]
    theirs = x.view(torch.int16).numpy().view(getattr(ml_dtypes, kind)) if kind == "bfloat16" else x.numpy()
    codes = torch.from_numpy(theirs.astype(ml_dtypes.float4_e2m1fn).view("uint8"))
    assert torch.equal(unpack_nibbles(ops.fp4_cast(x), x.numel()), codes)


def test_ml_dtypes_scales() -> None:
    ml_dtypes = peer("ml_dtypes")
    bytes = torch.arange(256, dtype=torch.uint8)
    for ours, dtype in ((ops.e8m0_uncast, ml_dtypes.float8_e8m0fnu), (ops.e4m3_uncast, ml_dtypes.float8_e4m3fn)):
        theirs = torch.from_numpy(bytes.numpy().view(dtype).astype("float32"))
        assert torch.equal(ours(bytes).nan_to_num(-7), theirs.nan_to_num(-7))
    x = every("float32")
    x = x[x.abs() <= 448]  # above, ml_dtypes has NaN from 464 on
    theirs = torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).view("uint8"))
    assert torch.equal(ops.e4m3_cast(x), theirs)


@each_kind
def test_torchao_e2m1(kind: str) -> None:
    kernels = peer("torchao.prototype.mx_formats.kernels")
    x = every(kind)
    x = x[~x.isnan()]
    assert torch.equal(unpack_nibbles(ops.fp4_cast(x), x.numel()), kernels.f32_to_f4_unpacked(x.float()))


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even"])
def test_torchao_mxfp4(rule: str) -> None:
    """torchao 0.18 gives infinite blocks a finite scale, divides by another power of two where the byte is 0, takes a
    float32 logarithm of amax / 6 for "rceil", a few units off at its powers of two, and "even" overflows to 253."""
    mx_tensor = peer("torchao.prototype.mx_formats.mx_tensor")
    mode = getattr(mx_tensor.ScaleCalculationMode, rule.upper())
    special = torch.zeros(4, 32)
    special[1:, 3] = torch.tensor([torch.nan, torch.inf, 1e-42])
    for x in (finite_rows("bfloat16", 128), finite_rows("float16", 128).float(), hard_rows(32), special):
        theirs, codes = mx_tensor.to_mx(x.contiguous(), torch.float4_e2m1fn_x2, 32, mode)
        packed, scale = ops.mxfp4_quantize(x, rule)
        amax = x.double().unflatten(-1, (-1, 32)).abs().amax(-1)
        differs = amax.isinf() | (scale == 0) & (amax > 0)
        if rule == "rceil":
            differs |= (amax / 6).frexp().mantissa.sub(0.5).abs() < 2.0**-21
        if rule == "even":
            differs |= amax >= 1.75 * 2.0**127
        assert torch.equal(scale[~differs], theirs.view(torch.uint8).view(scale.shape)[~differs])
        valid = (~differs & ~amax.isnan()).repeat_interleave(16, -1)
        assert torch.equal(packed[valid], codes.view(torch.uint8).view(packed.shape)[valid])
        assert differs.float().mean() < 0.2 or x is special


@pytest.mark.parametrize("with_global", [False, True])
def test_torchao_nvfp4(with_global: bool) -> None:
    nvfp4_tensor = peer("torchao.prototype.mx_formats.nvfp4_tensor")
    for x in (finite_rows("bfloat16", 64), finite_rows("float16", 64).float(), hard_rows(16), torch.zeros(2, 16)):
        g = ops.nvfp4_global_scale(x) if with_global else None
        theirs, codes = nvfp4_tensor.nvfp4_quantize(x.contiguous(), 16, g)
        packed, scale = ops.nvfp4_quantize(x, g)
        assert torch.equal(scale, theirs.view(torch.uint8).view(scale.shape))
        assert torch.equal(packed, codes.view(torch.uint8).view(packed.shape))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    """Values, not codes: their zero has the sign of what was rounded. Within 2 units of a middle either value will do,
    since their CPU and CUDA kernels have the middles to 7 digits."""
    functional = peer("bitsandbytes.functional")
    name = "nf4" if kind == "nf4" else "bnb-fp4"
    table = torch.tensor(ops.code_values(name))
    ordered = table.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    x = every("bfloat16")
    x = x[(x.abs() < 2.0**60) & (x.abs() > 2.0**-60)]  # so that a block's scale has a reciprocal
    x = x[torch.randperm(x.numel())][: x.numel() // 64 * 64].view(-1, 64)
    for rows in (x.to(dtype), torch.randn(500, 64).to(dtype)):
        bytes, state = functional.quantize_4bit(rows.contiguous(), blocksize=64, quant_type=kind)
        theirs = table[torch.stack([bytes >> 4, bytes & 15], -1).view(rows.shape).int()]
        packed, scale = ops.codebook4_quantize(rows, name, 64)
        assert torch.equal(scale.flatten(), state.absmax.flatten())
        ours = table[unpack_nibbles(packed, 64).int()]
        z = (rows.float() * (1 / scale)).unsqueeze(-1)
        near = ((z - middles).abs() <= middles.abs() * 2.0**-22).any(-1)
        assert torch.equal(torch.where(near, 0, ours), torch.where(near, 0, theirs)) and near.float().mean() < 0.01
        values = functional.dequantize_4bit(bytes, state).float()
        assert torch.equal(values, (theirs * scale).to(dtype).float())
