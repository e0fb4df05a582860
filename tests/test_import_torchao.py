# SPDX-License-Identifier: Apache-2.0
"""Models that torchao quantised to NVFP4 or MXFP4: its logits from packed layers, and the swizzled scales."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn

from bitmill import FP4Config
from bitmill.integrations.torchao import from_tensor, import_, unswizzle
from fp4_file_inputs import model


def swizzle(scale: Tensor) -> Tensor:
    """Byte by byte."""
    n, groups = scale.shape
    rows, columns = -(-n // 128), -(-groups // 4)
    out = torch.zeros(rows * columns * 512, dtype=scale.dtype)
    for r in range(n):
        for c in range(groups):
            tile = r // 128 * columns + c // 4
            out[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scale[r, c]
    return out


def test_unswizzle() -> None:
    for n, groups in ((1, 1), (128, 4), (130, 5), (33, 9)):
        scale = torch.randint(256, (n, groups), dtype=torch.uint8)
        assert torch.equal(unswizzle(swizzle(scale), n, groups), scale)
    with pytest.raises(
        ValueError, match=r"scale must have 1024 elements, tiles of 128 x 4 for \[130, 3\], got \[512\]"
    ):
        unswizzle(torch.zeros(512), 130, 3)


def test_what_is_no_weight_of_torchao() -> None:
    with pytest.raises(ValueError, match="t must be an NVFP4Tensor or an MXTensor of torchao, got Tensor"):
        from_tensor(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="there must be a layer in this format that filter_fn accepts, got none"):
        import_(model())
    MXTensor = type("MXTensor", (types.SimpleNamespace,), {})
    t = MXTensor(elem_dtype=torch.float8_e4m3fn, block_size=32, qdata=torch.zeros(2, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"t must have elements float4_e2m1fn_x2, got torch\.float8_e4m3fn"):
        from_tensor(t)
    t.elem_dtype, t.block_size = torch.float4_e2m1fn_x2, 16
    with pytest.raises(ValueError, match="t must have blocks of 32 for 'mxfp4', got 16"):
        from_tensor(t)
    t.block_size, t.qdata, t.shape = 32, t.qdata.T, (32, 16)
    with pytest.raises(ValueError, match=r"t must be a weight \[n, k\], got \[32, 16\], or a transposed one"):
        from_tensor(t)


def quantised(kind: str, dtype: torch.dtype) -> nn.Sequential:
    """A model that torchao quantised."""
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization import quantize_

    theirs = nn.Sequential(nn.Linear(128, 160), nn.GELU(), nn.Linear(160, 32, False)).to(dtype).eval()
    if kind == "mxfp4":
        for module in (theirs[0], theirs[2]):
            weight = MXTensor.to_mx(module.weight.detach(), torch.float4_e2m1fn_x2, 32)
            module.weight = nn.Parameter(weight, requires_grad=False)
    else:
        quantize_(theirs, NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=kind == "nvfp4"))
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nvfp4", "nvfp4-without-global-scale", "mxfp4"])
def test_torchao_gives_the_same_logits(kind: str, dtype: torch.dtype) -> None:
    theirs, x = quantised(kind, dtype), torch.randn(16, 128).to(dtype)
    dense = [theirs[i].weight.dequantize(dtype) for i in (0, 2)]
    with torch.no_grad():  # as torchao does with NVFP4; its MXFP4 takes quantised activations only
        wanted = nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, dense[0], theirs[0].bias)), dense[1])
        if kind != "mxfp4":
            assert torch.equal(theirs(x), wanted)
    exact = [theirs[i].weight.dequantize(torch.float32) for i in (0, 2)]
    assert import_(theirs) == ["0", "2"]
    assert theirs[0].config == FP4Config(kind.partition("-")[0])
    for i, weight in zip((0, 2), exact, strict=True):  # torchao rounds the product of both scales too
        torch.testing.assert_close(theirs[i].dequantize().weight, weight, rtol=2e-7 if kind == "nvfp4" else 0, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(theirs(x), wanted, rtol=tolerance, atol=tolerance)
