# SPDX-License-Identifier: Apache-2.0
"""Salient weights: random ones for the ops, the bound that their products keep, and layers of every configuration."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from bitmill import SalientConfig
from bitmill.nn import SalientLinear
from bitmill.ops import _salient_encoding as encoding
from bitmill.ops import int8_quantize, tile_pack
from bitmill.ops.salient_scatter import _salient_linear_reference, _salient_weight_reference
from problems import on_every_machine

OP, WEIGHT_OP = torch.ops.bitmill.salient_linear.default, torch.ops.bitmill.salient_weight.default
ENCODINGS = ("bitmap", "list", "columns")
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}

every_encoding = pytest.mark.parametrize("kind", ENCODINGS)
every_activation = pytest.mark.parametrize("activations", ["float", "int8"])


@dataclasses.dataclass
class Case:
    n: int
    k: int
    fraction: float = 0.1
    codes: bool = True
    centred: bool = True
    group_size: int = 0
    kind: str = "bitmap"

    def arrays(self) -> list[Tensor | None]:
        """weight, index, value, start, alpha, mu, value_scale, value_zero: random, none of them a default."""
        groups = -(-self.k // self.group_size) if self.group_size else 1
        salient = torch.rand(self.n, self.k) < self.fraction
        if self.kind == "columns":
            salient = (torch.rand(self.k) < self.fraction).expand(self.n, self.k)
        plus = torch.rand(self.n, self.k) < 0.5
        value = torch.randint(0, 256, (self.n, self.k), dtype=torch.uint8)
        if not self.codes:
            value = torch.randn(self.n, self.k).half()
        bits = 8 if self.codes else 16
        if self.kind == "columns":
            index, stored, start = encoding.encode_columns(salient.any(0), value, bits)
        else:
            encode = encoding.encode_list if self.kind == "list" else encoding.encode_bitmap
            index, stored, start = encode(salient, value, bits)
        return [
            tile_pack((plus & ~salient).to(torch.uint8), 1),
            index,
            stored,
            start,
            torch.rand(self.n, groups),
            torch.randn(self.n, groups) * 0.1 if self.centred else None,
            torch.rand(self.n) * 0.02 + 0.01 if self.codes else None,
            torch.randint(0, 256, (self.n,)).float() if self.codes else None,
        ]


def assert_agrees(
    x: Tensor, arrays: list, bias: Tensor | None, group_size: int, activations: str = "float", everywhere: bool = True
) -> None:
    """Results are within float32 summation error of a float64 product with the default kernel's weight."""
    reference = _salient_linear_reference(x, *arrays, bias, group_size, activations)
    dense = _salient_weight_reference(*arrays, x.shape[-1], group_size).double()
    rows = x.double()
    if activations == "int8":
        q, scale = int8_quantize(x)
        rows = q.double() * scale.double().unsqueeze(-1)
    exact = rows @ dense.T + (0 if bias is None else bias)
    # Codes count from their zero only at the end of a sum, so the terms are as large as codes and zeros.
    magnitude = dense.abs()
    if arrays[6] is not None:
        magnitude = magnitude + (arrays[6] * 255).unsqueeze(1) / 4
    allowed = rows.abs() @ magnitude.T * 2e-6 + exact.abs() * TOLERANCE[x.dtype] + 1e-6
    call = lambda: OP(x, *arrays, bias, group_size, activations)  # noqa: E731
    for machine, out in [*(on_every_machine(call) if everywhere else [("", call())]), ("reference", reference)]:
        assert out.dtype == x.dtype and out.shape == reference.shape and out.is_contiguous(), machine
        assert ((out.double() - exact).abs() <= allowed).all(), machine


CONFIGS = (
    SalientConfig(),
    SalientConfig(fraction=0.3, bits=16, group_size=32),
    SalientConfig(fraction=0.2, scale="official", group_size=64),
    SalientConfig(fraction=0.05, centre=False, bits=4),
    SalientConfig(fraction=0.0),
    SalientConfig(fraction=1.0, bits=16, centre=False),
    SalientConfig(fraction=0.2, structure="column"),
    SalientConfig(fraction=0.1, structure="column", bits=16, group_size=32, activations="int8"),
    SalientConfig(fraction=0.05, activations="int8"),
    SalientConfig(fraction=0.3, group_size=64, activations="int8"),
    SalientConfig(metric="quantile", granularity="layer", surrogate="clip"),
    SalientConfig(fraction=0.2, granularity="layer", centre=False, scale="official", surrogate="ede"),
    SalientConfig(fraction=0.2, group_size=32, surrogate="clip"),
)
configs = pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda c: f"{c.fraction}-{c.bits}-{c.group_size}-{c.structure}-{c.activations}-{c.granularity}-{c.surrogate}",
)


def layer_of(config: SalientConfig, k: int = 70, n: int = 19, bias: bool = True) -> SalientLinear:
    return SalientLinear.from_linear(nn.Linear(k, n, bias), config)
