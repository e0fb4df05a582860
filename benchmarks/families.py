# SPDX-License-Identifier: Apache-2.0
"""What is measured: one family a question, one declared line a variant.

Every variant is compared with its reference before it is timed: integers, and 1-bit weights with 1-bit or int8
activations, exactly with the training form in torch; the other layers within a stated relative error of the product of
the (quantised) activations with the dequantised weight in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from bitmill import _C, BinaryConfig, FP4Config, SalientConfig, arrays, ops
from bitmill.bench.layers import buffer_bytes
from bitmill.config import Config
from bitmill.convert import LAYERS
from bitmill.ops.fp4_activations import _fp4_activations_reference as fp4_activations_default
from bitmill.timing import SHORTEST

from . import convs, peers, shapes
from .attention import ATTENTION
from .runner import Case, Family, Prepared, Variant, layer_copies

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # a bfloat16 result is rounded by up to 2^-9


def layer(name: str, config: Config, bound: str | None, dtype: torch.dtype = torch.float32) -> Variant:
    """A packed layer from an nn.Linear, activations of `dtype` in and out."""

    def build(case: Case) -> Prepared:
        training: Any = LAYERS[type(config)].from_linear(case.linear, config).eval()
        packed = training.pack()
        x = case.x.to(dtype)
        exact = isinstance(config, BinaryConfig) and (config.act_bits == 1 or config.activations == "int8")
        if exact:
            return layer_copies(
                packed.to(case.device), x.to(case.device), training(x), 0.0, buffer_bytes(packed), bound
            )
        kind, activations = getattr(config, "activations", "float"), x.double()
        if kind == "int8":
            q, scale = ops.int8_quantize(x)
            activations = q.double() * scale.double().unsqueeze(-1)
        elif kind != "float":
            activations = ops.fp4_activations_fake_quant(x.float(), kind).double()
        dense = packed.dequantize()
        expected = linear(activations, dense.weight.double(), dense.bias.double())
        packed, x = packed.to(case.device), x.to(case.device)
        return layer_copies(packed, x, expected, TOLERANCE[dtype], buffer_bytes(packed), bound)

    return Variant(name, build)


def torch_linear(dtype: torch.dtype, baseline: str, bias: bool = True) -> Variant:
    def build(case: Case) -> Prepared:
        x, bias_values = (t.to(case.device, dtype) for t in (case.x, case.linear.bias))
        expected = linear(case.x, case.linear.weight, case.linear.bias if bias else None)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2

        def prepared() -> Prepared:
            weight = case.linear.weight.to(case.device, dtype, copy=True)
            call = lambda: linear(x, weight, bias_values if bias else None)  # noqa: E731
            return Prepared(call, expected, tolerance, x.nbytes, weight.nbytes, prepared, baseline)

        return prepared()

    return Variant(f"torch {baseline}", build, "torch", baseline)


def torch_int8() -> Variant:
    """torch._int_mm of int8 operands, the integer product alone: no quantisation, no scale, no bias."""

    def build(case: Case) -> Prepared:
        x = (case.x * 30).clamp(-127, 127).to(torch.int8)
        weight = (case.linear.weight * (30 * case.k**0.5)).clamp(-127, 127).to(torch.int8)
        expected = x.double() @ weight.double().T
        x = x.to(case.device)

        def prepared() -> Prepared:
            own = weight.to(case.device, copy=True)
            return Prepared(lambda: torch._int_mm(x, own.T), expected, 0.0, x.nbytes, own.nbytes, prepared, "int8")

        return prepared()

    return Variant("torch int8 (_int_mm)", build, "torch", "int8")


BASELINES = (torch_linear(torch.float32, "fp32"), torch_linear(torch.bfloat16, "bf16"), torch_int8())


def packed_operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of x (x >= 0), tiles of the weight's signs, and their integer product."""
    bits = ops.bitpack(case.x, levels="plus")[0]
    signs = case.linear.weight > 0
    expected = torch.where(case.x >= 0, 1.0, -1.0) @ torch.where(signs, 1.0, -1.0).T
    return bits, ops.tile_pack(signs.to(torch.uint8), 1), expected.to(torch.int32)


def product_op(case: Case) -> Prepared:
    bits, tiles, expected = packed_operands(case)

    def prepared(weight: Tensor) -> Prepared:
        def call() -> Tensor:
            return ops.binary_matmul(bits, weight, case.n, case.k)

        def again() -> Prepared:
            return prepared(weight.clone())

        return Prepared(call, expected, 0.0, bits.nbytes, weight.nbytes, again, "popcount")

    bits = bits.to(case.device)
    return prepared(tiles.to(case.device))


def product_kernel(case: Case) -> Prepared:
    """The kernel alone, without the cost of calling an op; it times itself on data of its own, in cache."""
    bits, tiles, expected = packed_operands(case)

    def call() -> np.ndarray:
        return arrays.binary_matmul(bits.numpy(), tiles.numpy(), case.n, case.k)

    once = _C.binary_matmul_seconds(case.m, case.n, case.k, 5)
    repeats = max(5, math.ceil(SHORTEST / once))  # as long as every other sample

    def sample() -> float:
        return _C.binary_matmul_seconds(case.m, case.n, case.k, repeats)

    return Prepared(call, expected, 0.0, bits.nbytes, tiles.nbytes, None, "popcount", sample)


def on_rows(
    name: str, run: Callable[[Tensor], Tensor], check: Callable[[Tensor], Tensor], origin: str = "bitmill"
) -> Variant:
    """A function of x alone, which must equal `check` of it."""

    def build(case: Case) -> Prepared:
        x = case.x.to(case.device)
        return Prepared(lambda: run(x), check(case.x), 0.0, x.nbytes, 0)

    return Variant(name, build, origin)


def pack_plus(x: Tensor) -> Tensor:
    return ops.bitpack(x, levels="plus")[0]


def pack_sign(x: Tensor) -> Tensor:
    return ops.bitpack(x)[0]


def numpy_bits(x: Tensor) -> Tensor:
    """Bits of x >= 0 in bitmill's row layout, by NumPy."""
    return numpy_rows(x.numpy() >= 0)


def numpy_signs(x: Tensor) -> Tensor:
    """The same of x > 0."""
    return numpy_rows(x.numpy() > 0)


def numpy_rows(bits: Any) -> Tensor:
    rows = np.packbits(bits, axis=1, bitorder="little")
    return torch.from_numpy(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).view(np.int32))


def fp4_codes(x: Tensor, values: Tensor) -> Tensor:
    """The packed codes of the nearest values, found by search; of two that are as near, the even code."""
    distance = (x.unsqueeze(-1) - values).abs()
    even_first = torch.tensor([2, 1], dtype=torch.int8).repeat(len(values))[: len(values)]
    codes = ((distance == distance.amin(-1, keepdim=True)) * even_first).argmax(-1)
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def cast_by_search(x: Tensor) -> Tensor:
    codes = fp4_codes(x, torch.tensor(ops.code_values("e2m1")))
    negative_zero = (x < 0) & (x >= -0.25)  # the search cannot tell the sign of zero
    return codes | fp4_codes(torch.where(negative_zero, -0.5, 0.0), torch.tensor([0.0, *[9.0] * 7, -0.5]))


def mxfp4_by_search(x: Tensor) -> Tensor:
    k = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -k % 32)).unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2)
    return cast_by_search((blocks / scale).flatten(-2)[..., :k])


def cast_alone(format: str) -> Variant:
    """What a layer with 4-bit activations does before the product."""

    def build(case: Case) -> Prepared:
        q, _ = fp4_activations_default(case.x, format, None, None, "floor")
        return Prepared(lambda: ops.fp4_activations(case.x, format)[0], q, 0.0, case.x.nbytes, 0, multiplies=False)

    return Variant(f"{format}: the cast alone", build)


def binary(**fields: object) -> BinaryConfig:
    return BinaryConfig("bibert", **fields)  # type: ignore[arg-type]


SALIENT = tuple(
    layer(
        f"salient {percent} %{' columns' * (structure == 'column')}{' int8' * (activations == 'int8')}",
        SalientConfig(percent / 100, structure=structure, activations=activations),
        "int8" if activations == "int8" else "fp32",
    )
    for percent in (5, 10, 30)
    for structure in ("element", "column")
    for activations in ("float", "int8")
)


FAMILIES = (
    Family(
        "product",
        "1-bit x 1-bit integer product, packed operands in, int32 out",
        (
            Variant("kernel alone, in cache", product_kernel, "kernel"),
            Variant("binary_matmul", product_op),
            torch_linear(torch.float32, "fp32", bias=False),
            torch_linear(torch.bfloat16, "bf16", bias=False),
            torch_int8(),
            *peers.PRODUCT,
        ),
    ),
    Family(
        "w1a1",
        "layer with 1-bit weights and activations, float in and out, packing of the activations included",
        (
            layer("binary", binary(), "popcount"),
            layer("binary, zero=plus", binary(zero="plus"), "popcount"),
            layer("binary, bfloat16", binary(), "popcount", torch.bfloat16),
            *BASELINES,
            *peers.W1A1,
        ),
    ),
    Family(
        "w1a8",
        "layer with 1-bit weights and int8 activations, float in and out, quantisation included",
        (
            layer("binary int8", binary(act_bits=32, activations="int8"), "int8"),
            layer("binary int8, bfloat16", binary(act_bits=32, activations="int8"), "int8", torch.bfloat16),
            *BASELINES,
        ),
    ),
    Family(
        "w1a32",
        "layer with 1-bit weights and float activations",
        (
            layer("binary weight", binary(act_bits=32), "fp32"),
            layer("binary weight, bfloat16", binary(act_bits=32), "bf16", torch.bfloat16),
            *BASELINES,
        ),
    ),
    Family(
        "salient",
        "layer with 1-bit weights of which a fraction keeps 8 bits, float in and out",
        (*SALIENT, *BASELINES),
    ),
    Family(
        "fp4",
        "layer with 4-bit weights, float in and out",
        (
            layer("e2m1", FP4Config("e2m1"), "fp32"),
            *(layer(format, FP4Config(format), "fp32") for format in ("mxfp4", "nvfp4")),
            layer("e2m1 int8", FP4Config("e2m1", activations="int8"), "int8"),
            layer("mxfp4 int8", FP4Config("mxfp4", activations="int8"), "int8"),
            layer("nvfp4 int8", FP4Config("nvfp4", activations="int8"), "int8"),
            layer("e2m1, bfloat16", FP4Config("e2m1"), "bf16", torch.bfloat16),
            *(layer(f"{format}, bfloat16", FP4Config(format), "bf16", torch.bfloat16) for format in ("mxfp4", "nvfp4")),
            *BASELINES,
            *peers.FOUR_BIT,
        ),
    ),
    Family(
        "w4a4",
        "layer with 4-bit weights and activations, float in and out, casting of the activations included",
        (
            *(
                variant
                for format in ("mxfp4", "nvfp4")
                for variant in (layer(format, FP4Config(format, activations=format), "int8"), cast_alone(format))
            ),
            *BASELINES,
        ),
    ),
    Family(
        "attention",
        "attention with 1-bit queries, keys, values and map, float in and out, packing included",
        ATTENTION,
        problems=shapes.ATTENTION,
    ),
    Family(
        "conv",
        "2-D convolution with 1-bit weights and activations, images in and out",
        convs.VARIANTS,
        problems=tuple(shapes.CONVS),
    ),
    Family(
        "bitpack",
        "float32 rows to bits",
        (
            on_rows("bitpack, one plane", pack_plus, numpy_bits),
            on_rows("bitpack, two planes", pack_sign, numpy_signs),
            on_rows("numpy packbits", numpy_bits, pack_plus, "peer"),
        ),
        macs=False,
        besides=(shapes.OUT_OF_CACHE,),
    ),
    Family(
        "cast",
        "float32 rows to FP4 codes",
        (
            on_rows("fp4_cast e2m1", ops.fp4_cast, cast_by_search),
            on_rows("mxfp4_quantize", lambda x: ops.mxfp4_quantize(x)[0], mxfp4_by_search),
            *peers.CAST,
        ),
        macs=False,
        besides=(shapes.OUT_OF_CACHE,),
    ),
)
