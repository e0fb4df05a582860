# SPDX-License-Identifier: Apache-2.0
"""Products with a zoned weight (BiLLM, ARB-LLM): signs whose scales depend on the zone of a weight within its block.

w[r, c] = v[c] (mu_z + alpha_z b1)                 c not salient; z = concentrated or sparse, as a bit of its own says
w[r, c] = v[c] ((mu_z + alpha_z b1) + beta_z b2)   c salient, which is so for all rows; z = salient, or one of its two
                                                   parts where salient columns are split into the two zones too
with b1, b2 = -1, +1, and mu, alpha and beta of the row, the block of columns and the zone.
zoned_linear: y = x w^T + bias, float32 accumulation, one rounding to x's dtype.  zoned_weight: w as float32 [n, k].
Arrays (cpp/core/layout.h): sign, zone and salient_zone hold tiles of bits, the columns of a block in stored order: the
salient ones first; salient is a row of bits; scale [ceil(n / 16), blocks, s, 16] holds s numbers a row
and block: 7 with means, 4 without, or 10 and 6 where salient columns are split.
The compiled product is sums of +-x by b1, by the zone and by their product, scaled once a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _library as library
from ._checks import MAX_COLUMNS, TILE_ROWS, ceil_div, check_rows, check_tensor, require, tile_shape
from ._groups import columns_of_groups
from .bitpack import _pack_bits, _unpack_bits, tile_pack, tile_unpack

REMEDY = "; pack the weight with bitmill.ops.zoned.pack"
SCALES = (torch.float16, torch.float32)

Arrays = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]
"""sign, zone, salient_zone, salient, scale, column_scale."""

library.define(
    "zoned_linear",
    "(Tensor x, Tensor sign, Tensor zone, Tensor? salient_zone, Tensor salient, Tensor scale, Tensor? column_scale,"
    " Tensor? bias, int n, int block) -> Tensor",
)
library.define(
    "zoned_weight",
    "(Tensor sign, Tensor zone, Tensor? salient_zone, Tensor salient, Tensor scale, Tensor? column_scale, int n, int k,"
    " int block) -> Tensor",
)


def scale_count(centred: bool, split: bool) -> int:
    """Numbers a row and block: zone after zone (mu), alpha and, for salient columns, beta."""
    zones = 4 if split else 3
    return zones * (2 if centred else 1) + zones - 2


class ZonedWeight(NamedTuple):
    """A zoned weight [n, k], its columns in the layer's order.

    first, second: bool [n, k], where b1 and b2 are +1; b2 counts in salient columns only. sparse: bool [n, k], where
    the zone is the sparse one. salient: bool [k]. scale: float32 [n, blocks, s]. column_scale: float32 [k] or None.
    """

    first: Tensor
    second: Tensor
    sparse: Tensor
    salient: Tensor
    scale: Tensor
    column_scale: Tensor | None = None

    def value(self, block: int) -> Tensor:
        """The weight, float32 [n, k], by the expressions of the module's docstring, in their order."""
        k, s = self.first.shape[1], self.scale.shape[2]
        centred, split = s in (7, 10), s in (6, 10)
        scales = iter(columns_of_groups(self.scale[..., i], k, block) for i in range(s))
        first, second = (torch.where(bits, 1.0, -1.0) for bits in (self.first, self.second))

        def of_zone(salient: bool) -> Tensor:
            mu = next(scales) if centred else None
            value = next(scales) * first
            value = value if mu is None else mu + value
            return value + next(scales) * second if salient else value

        concentrated, sparse, salient = of_zone(False), of_zone(False), of_zone(True)
        if split:
            salient = torch.where(self.sparse, of_zone(True), salient)
        dense = torch.where(self.salient, salient, torch.where(self.sparse, sparse, concentrated))
        return dense if self.column_scale is None else dense * self.column_scale


def stored_order(salient: Tensor, block: int) -> Tensor:
    """int64 [k]: the layer's column at every stored place; within a block the salient ones come first."""
    return (torch.arange(len(salient), device=salient.device) // block * 2 + ~salient).argsort(stable=True)


def _split_places(salient: Tensor, block: int) -> tuple[Tensor, Tensor, int]:
    """Stored places of salient columns, where each lies in salient_zone, and the columns of that plane."""
    k = len(salient)
    blocks = ceil_div(k, block)
    counts = pad(salient, (0, blocks * block - k)).view(blocks, block).sum(1)
    end = ((counts + 7) // 8 * 8).cumsum(0)
    place = torch.arange(k, device=salient.device)
    place = place[place % block < counts[place // block]]
    before = pad(end, (1, 0))[place // block]
    return place, before + place % block, int(end[-1]) if blocks else 0


def split_columns(salient: Tensor, block: int) -> int:
    """The columns of salient_zone."""
    return _split_places(salient, block)[2]


def pack(weight: ZonedWeight, block: int, dtype: torch.dtype = torch.float16) -> Arrays:
    """The arrays of a zoned weight; scales become `dtype`, float16 or float32."""
    order = stored_order(weight.salient, block)
    second = torch.where(weight.salient, weight.second, weight.sparse)[:, order]
    salient_zone = None
    if weight.scale.shape[2] in (6, 10):
        place, column, width = _split_places(weight.salient, block)
        bits = torch.zeros(len(weight.first), width, dtype=torch.bool, device=order.device)
        bits[:, column] = weight.sparse[:, order[place]]
        salient_zone = _tiles(bits)
    n = len(weight.first)
    scale = pad(weight.scale, (0, 0, 0, 0, 0, -n % TILE_ROWS)).unflatten(0, (ceil_div(n, TILE_ROWS), TILE_ROWS))
    column_scale = weight.column_scale
    return (
        _tiles(weight.first[:, order]),
        _tiles(second),
        salient_zone,
        _pack_bits(weight.salient),
        scale.permute(0, 2, 3, 1).to(dtype).contiguous(),
        None if column_scale is None else column_scale.to(dtype).contiguous(),
    )


def unpack(op: str, arrays: Arrays, n: int, k: int, block: int) -> ZonedWeight:
    """Undo `pack`; scales are float32.

    Raises:
        ValueError: for a salient_zone that is not as wide as the salient columns need.
    """
    sign, zone, salient_zone, bits, scale, column_scale = arrays
    salient = _unpack_bits(bits, k)
    order = stored_order(salient, block)
    back, second = order.argsort(), tile_unpack(zone, n, k, 1).bool()
    sparse = second & ~salient[order]
    if salient_zone is not None:
        place, column, width = _split_places(salient, block)
        agrees = salient_zone.shape[1] == ceil_div(width, 32)
        require(agrees, f"{op}: the packed arrays contradict each other")
        sparse[:, place] = tile_unpack(salient_zone, n, width, 1).bool()[:, column]
    return ZonedWeight(
        tile_unpack(sign, n, k, 1).bool()[:, back],
        second[:, back],
        sparse[:, back],
        salient,
        scale.float().permute(0, 3, 1, 2).flatten(0, 1)[:n],
        None if column_scale is None else column_scale.float(),
    )


def _tiles(bits: Tensor) -> Tensor:
    return tile_pack(bits.to(torch.uint8), 1)


@library.default("zoned_linear")
def _zoned_linear_reference(
    x: Tensor,
    sign: Tensor,
    zone: Tensor,
    salient_zone: Tensor | None,
    salient: Tensor,
    scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    block: int,
) -> Tensor:
    arrays = (sign, zone, salient_zone, salient, scale, column_scale)
    _check_linear(x, arrays, bias, n, block)
    out = x.float() @ unpack("zoned_linear", arrays, n, x.shape[-1], block).value(block).T
    return (out if bias is None else out + bias).to(x.dtype)


@library.default("zoned_weight")
def _zoned_weight_reference(
    sign: Tensor,
    zone: Tensor,
    salient_zone: Tensor | None,
    salient: Tensor,
    scale: Tensor,
    column_scale: Tensor | None,
    n: int,
    k: int,
    block: int,
) -> Tensor:
    arrays = (sign, zone, salient_zone, salient, scale, column_scale)
    _check_arrays("zoned_weight", arrays, n, k, block, sign)
    return unpack("zoned_weight", arrays, n, k, block).value(block)


def _check_arrays(op: str, arrays: Arrays, n: int, k: int, block: int, like: Tensor) -> None:
    sign, zone, salient_zone, salient, scale, column_scale = arrays
    require(
        n >= 0 and 0 <= k <= MAX_COLUMNS,
        f"{op}: n must be at least 0 and k between 0 and {MAX_COLUMNS}, got n = {n}, k = {k}",
    )
    require(
        0 < block <= MAX_COLUMNS and block % 32 == 0,
        f"{op}: block must be a positive multiple of 32 up to {MAX_COLUMNS}, got {block}",
    )
    require(scale.dtype in SCALES, f"{op}: scale must be float16 or float32, got {scale.dtype}".replace("torch.", ""))
    split = salient_zone is not None
    plain = scale_count(False, split)
    s = plain if scale.dim() == 4 and scale.shape[2] == plain else scale_count(True, split)
    check_tensor(op, "sign", sign, torch.int32, tile_shape(n, k), like, REMEDY)
    check_tensor(op, "zone", zone, torch.int32, tile_shape(n, k), like, REMEDY)
    check_tensor(op, "salient", salient, torch.int32, [ceil_div(k, 32)], like, REMEDY)
    tiles = ceil_div(n, TILE_ROWS)
    check_tensor(op, "scale", scale, scale.dtype, [tiles, ceil_div(k, block), s, TILE_ROWS], like, REMEDY)
    if salient_zone is not None:
        words = salient_zone.shape[1] if salient_zone.dim() == 3 else 0
        check_tensor(op, "salient_zone", salient_zone, torch.int32, [tiles, words, TILE_ROWS], like, REMEDY)
    check_tensor(op, "column_scale", column_scale, scale.dtype, [k], like)


def _check_linear(x: Tensor, arrays: Arrays, bias: Tensor | None, n: int, block: int) -> None:
    _check_arrays("zoned_linear", arrays, n, check_rows("zoned_linear", x), block, x)
    check_tensor("zoned_linear", "bias", bias, torch.float32, [n], x)


@torch.library.register_fake("bitmill::zoned_linear")
def _(x: Tensor, *arguments: Any) -> Tensor:
    *arrays, bias, n, block = arguments
    _check_linear(x, tuple(arrays), bias, n, block)
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("bitmill::zoned_weight")
def _(*arguments: Any) -> Tensor:
    *arrays, n, k, block = arguments
    _check_arrays("zoned_weight", tuple(arrays), n, k, block, arrays[0])
    return arrays[0].new_empty((n, k), dtype=torch.float32)


def _setup_zoned_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *arrays, _, ctx.n, ctx.block = inputs
    ctx.save_for_backward(*arrays)
    ctx.k, ctx.dtype = x.shape[-1], x.dtype


def _backward_zoned_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g = grad.float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.bitmill.zoned_weight.default(*ctx.saved_tensors, ctx.n, ctx.k, ctx.block)
        with library.without_autocast(g):
            grad_x = (g @ dense).to(ctx.dtype)
    if ctx.needs_input_grad[7]:
        grad_bias = g.sum_to_size(g.shape[-1:])
    return grad_x, None, None, None, None, None, None, grad_bias, None, None


torch.library.register_autograd("bitmill::zoned_linear", _backward_zoned_linear, setup_context=_setup_zoned_linear)


def zoned_linear(
    x: Tensor,
    sign: Tensor,
    zone: Tensor,
    salient_zone: Tensor | None,
    salient: Tensor,
    scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    block: int = 128,
) -> Tensor:
    """A linear layer with a zoned weight; formulas and arrays are in the module's docstring, `zoned.pack` makes them.

    Args:
        x: float32, bfloat16 or float16 [..., k].
        sign, zone: int32 tiles of n x k bits.
        salient_zone: int32 tiles, or None where salient columns are not split.
        salient: int32 [ceil(k / 32)].
        scale: float16 or float32 [ceil(n / 16), ceil(k / block), s, 16]; s tells whether there are means.
        column_scale: [k] of the same dtype, or None for 1.
        bias: float32 [n] or None.
        n: out_features.
        block: columns of a block, a multiple of 32.
    Returns:
        [..., n] of x's dtype. Gradients flow to x and bias.
    Raises:
        ValueError: for wrong shapes, dtypes or devices, or a salient_zone that is not as wide as the salient columns
            need.
    """
    return torch.ops.bitmill.zoned_linear.default(
        x, sign, zone, salient_zone, salient, scale, column_scale, bias, n, block
    )


def zoned_weight(
    sign: Tensor,
    zone: Tensor,
    salient_zone: Tensor | None,
    salient: Tensor,
    scale: Tensor,
    column_scale: Tensor | None,
    n: int,
    k: int,
    block: int = 128,
) -> Tensor:
    """The dense float32 weight [n, k]. Arguments and errors as `zoned_linear`."""
    return torch.ops.bitmill.zoned_weight.default(sign, zone, salient_zone, salient, scale, column_scale, n, k, block)
