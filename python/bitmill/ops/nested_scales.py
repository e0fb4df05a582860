# SPDX-License-Identifier: Apache-2.0
"""Double quantisation: the scales of `codebook4_quantize` as 8-bit codes, 256 of which share a float32 scale.

offset = the mean of all,  group_scale = the largest magnitude of a group's differences from it,
code = the nearest value of the map to difference / group_scale,  scale ~ fl(fl(map[code] group_scale) + offset).
The map has 0, 1, and with both signs 10^(i - 6) (0.1 + 0.9 (j + 1/2) / 2^i) for i = 0 ... 6, j = 0 ... 2^i - 1.
Source: bitsandbytes, quantize_4bit with compress_statistics; Dettmers, 8-bit approximations, ICLR 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import ceil_div, check_tensor, require
from .codebook4 import nearest

NESTED_GROUP = 256


def nested_map(device: torch.device | str | None = None) -> Tensor:
    """The 256 values of the codes, ascending, float32, rounded as bitsandbytes rounds them."""
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        positive = 10.0 ** (i - 6) * ((ends[1:] + ends[:-1]) / 2)
        values += [positive, -positive]
    return torch.cat(values).sort().values.to(device)


def nested_quantize(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise scales to 8 bits.

    Args:
        scale: float32 of any shape, finite; groups of 256 run over the flattened tensor.
    Returns:
        codes: uint8 of scale's shape.
        group_scale: float32 [ceil(numel / 256)].
        offset: float32 [].
    Raises:
        ValueError: for another dtype, or a scale that is not finite.
    """
    check_tensor("nested_quantize", "scale", scale, torch.float32, scale.shape, scale)
    require(bool(scale.isfinite().all()), "nested_quantize: scale must be finite, got NaN or infinity")
    offset = scale.mean() if scale.numel() else scale.new_zeros(())
    groups = ceil_div(scale.numel(), NESTED_GROUP)
    differences = torch.nn.functional.pad(scale.flatten() - offset, (0, groups * NESTED_GROUP - scale.numel()))
    blocks = differences.view(groups, NESTED_GROUP)
    group_scale = blocks.abs().amax(1)
    inverse = (1 / group_scale).clamp_max(torch.finfo(torch.float32).max)
    codes = nearest(blocks * inverse.unsqueeze(1), nested_map(scale.device))
    return codes.flatten()[: scale.numel()].view(scale.shape), group_scale, offset


def nested_dequantize(codes: Tensor, group_scale: Tensor, offset: Tensor) -> Tensor:
    """Undo `nested_quantize`: float32 of the codes' shape."""
    op = "nested_dequantize"
    check_tensor(op, "codes", codes, torch.uint8, codes.shape, codes)
    check_tensor(op, "group_scale", group_scale, torch.float32, [ceil_div(codes.numel(), NESTED_GROUP)], codes)
    check_tensor(op, "offset", offset, torch.float32, [], codes)
    columns = group_scale.repeat_interleave(NESTED_GROUP)[: codes.numel()].view(codes.shape)
    return nested_map(codes.device)[codes.int()] * columns + offset
