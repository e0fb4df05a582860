# SPDX-License-Identifier: Apache-2.0
"""Random zoned weights in every form of their format."""

from __future__ import annotations

import torch

from bitmill.config import ZonedConfig
from bitmill.ops._checks import ceil_div
from bitmill.ops.zoned import ZonedWeight, scale_count

FORMS = (
    ZonedConfig(32, scale_bits=32),
    ZonedConfig(128),
    ZonedConfig(64, centre=False, column_scale=True),
    ZonedConfig(96, split_salient=True),
    ZonedConfig(128, centre=False, column_scale=True, split_salient=True, scale_bits=32),
)


def form_name(config: ZonedConfig) -> str:
    flags = (("centred", config.centre), ("columns", config.column_scale), ("split", config.split_salient))
    return "-".join([str(config.block), *(name for name, on in flags if on), str(config.scale_bits)])


def zoned_weight_of(config: ZonedConfig, n: int, k: int, share: float = 0.2) -> ZonedWeight:
    """A weight [n, k] with about this share of salient columns; its scales are what the config's bits hold."""
    salient = torch.rand(k) < share
    dtype = torch.float16 if config.scale_bits == 16 else torch.float32
    scale = torch.randn(n, ceil_div(k, config.block), scale_count(config.centre, config.split_salient))
    sparse = torch.rand(n, k) < 0.3
    return ZonedWeight(
        torch.rand(n, k) < 0.5,
        (torch.rand(n, k) < 0.5) & salient,
        sparse if config.split_salient else sparse & ~salient,
        salient,
        scale.to(dtype).float(),
        (torch.rand(k) + 0.5).to(dtype).float() if config.column_scale else None,
    )
