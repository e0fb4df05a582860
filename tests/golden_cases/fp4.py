# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of FP4 casts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitmill import ops
from bitmill.ops import fpq_bias
from bitmill.recipes.fpq_search import Search, bias_of, search_layer
from bitmill.recipes.llm_fp4 import pack_linear

from .common import Case, assert_exact, assert_relative


def fp4_cast_e2m1(case: Case) -> None:
    x = case["in_f32_bits"].view(torch.float32)
    if "out_table" in case:
        dtype = torch.float16 if case.number("hp_type") else torch.bfloat16
        every = torch.arange(65536).to(torch.int16).view(dtype)
        assert_exact(_codes(ops.fp4_cast(every)), case["out_table"], "codes of every 16-bit pattern")
    assert_exact(_codes(ops.fp4_cast(x), x.numel()), case["out_f32_cuda"], "codes of float32")
    numbers = ~x.isnan()
    assert_exact(_codes(ops.fp4_cast(x), x.numel())[numbers], case["out_f32_mldtypes"][numbers], "codes, ml_dtypes")
    assert_exact(_codes(ops.fp4_cast(x), x.numel())[numbers], case["out_f32_torchao"][numbers], "codes, torchao")
    values = ops.fp4_uncast(torch.arange(0, 256, 17, dtype=torch.uint8), 32)[::2]
    if "out_values" in case:
        assert_exact(values, case["out_values"], "values")
    if "out_values_half_bits" in case:
        assert_exact(values.half().view(torch.int16), case["out_values_half_bits"], "float16 values")


def _codes(packed: Tensor, k: int | None = None) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., : k or 2 * packed.shape[-1]]


def fp4_pack(case: Case) -> None:
    packed = ops.fp4_cast(case["in_x"])
    assert_exact(packed, case["out_packed"], "bytes")
    assert_exact(_codes(packed), case["out_codes"], "codes")


def fp4_e8m0(case: Case) -> None:
    x = case["in_f32_bits"].view(torch.float32)
    assert_exact(ops.e8m0_cast(x, "down"), case["out_rz"], "toward zero")
    assert_exact(ops.e8m0_cast(x, "up"), case["out_rp"], "toward infinity")
    every = ops.e8m0_uncast(torch.arange(256, dtype=torch.uint8))
    assert_exact(every, case["out_decode_bf16_bits"].view(torch.bfloat16).float(), "values")


def fp4_mxfp4(case: Case) -> None:
    x = case["in_x_bits"].view(torch.float32)
    rules = ("floor", "rceil", "ceil", "even")
    for i, mode in enumerate(case["hp_modes"].tolist()):
        packed, scale = ops.mxfp4_quantize(x, rules[mode])
        assert_exact(scale, case["out_scale"][i], f"scales of {rules[mode]}")
        valid = (scale != 255).repeat_interleave(16, -1)
        assert_exact(packed[valid], case["out_packed"][i][valid], f"bytes of {rules[mode]}")
        values = ops.mxfp4_dequantize(packed, scale, x.shape[-1])
        assert_exact(values, case["out_dequant"][i], f"values of {rules[mode]}")


def fp4_bnb_4bit(case: Case) -> None:
    """Blocks over the flattened tensor: rows here are blocks, a last one that is short is a row of its own."""
    name, width = "nf4" if case.number("hp_nf4") else "bnb-fp4", int(case.number("hp_blocksize"))
    table = case["out_codebook"]
    assert_exact(torch.tensor(ops.code_values(name)), table, "table")
    bytes, values = case["out_packed"].flatten(), case["out_dequant"].flatten()
    codes = torch.stack((bytes >> 4, bytes & 15), -1).flatten()[: values.numel()]
    for block, want, value, absmax in zip(
        case["in_x"].flatten().split(width), codes.split(width), values.split(width), case["out_absmax"], strict=True
    ):
        packed, scale = ops.codebook4_quantize(block, name, width)
        assert_exact(scale, absmax.view(1), "absmax")
        got = _codes(packed, block.numel())
        # bitsandbytes has both codes of 0, by the sign of what was rounded
        assert_exact(table[got.long()], table[want.long()], "values of codes")
        assert_exact(ops.codebook4_dequantize(packed, scale, name, block.numel(), width), value, "values")
        if name == "nf4":
            assert_exact(got, want, "codes")


def fp4_e4m3(case: Case) -> None:
    x = case["in_f32_bits"].view(torch.float32)
    dtype = torch.float16 if case.number("hp_type") else torch.bfloat16
    every = torch.arange(65536).to(torch.int16).view(dtype)
    assert_exact(ops.e4m3_cast(every), case["out_table"], "codes of every 16-bit pattern")
    assert_exact(ops.e4m3_cast(x), case["out_f32_cuda"], "codes of float32")
    within = every.abs() <= 448  # above, ml_dtypes has NaN from 464 on
    assert_exact(ops.e4m3_cast(every[within]), case["out_table_mldtypes"][within], "codes, ml_dtypes")
    assert_exact(ops.e4m3_uncast(torch.arange(256, dtype=torch.uint8)), case["out_values"], "values")


def fp4_nvfp4(case: Case) -> None:
    x, g = case["in_x"], case["in_g"].squeeze(0) if case.number("hp_has_global") else None
    packed, scale = ops.nvfp4_quantize(x, g)
    assert_exact(scale, case["out_scale"], "scales")
    assert_exact(packed, case["out_packed"], "bytes")
    assert_relative(ops.nvfp4_dequantize(packed, scale, x.shape[-1], g), case["out_dequant"], 1e-7, "values")


def fp4_llmfp4_quantizer(case: Case) -> None:
    x, bias = case["in_x"], case["in_bias"]
    format = ("e3m0", "e2m1", "e1m2")[int(case.number("hp_mantissa_bits"))]
    exact = bool((bias == bias.round()).all())

    def compare(got: Tensor, want: Tensor, what: str) -> None:
        if exact:
            assert_exact(got, want, what)
        else:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)

    packed, scale = ops.fpq_quantize(x, bias, format), ops.fpq_scale(bias, format)
    numbers = ~x.isnan()
    assert_exact(_codes(packed, x.shape[1])[numbers], case["out_code"][numbers], "codes")
    compare(ops.fpq_dequantize(packed, bias, x.shape[1], format)[numbers], case["out_q"][numbers], "values")
    compare(ops.fp4_fake_quant(x, format, scale), case["out_q"], "values, NaN too")
    largest = max(ops.code_values(format)) * scale
    compare(x.clamp(-largest, largest), case["out_clipped"], "clipped")


def fp4_llmfp4_calibration(case: Case) -> None:
    baseline, x, weight = bool(case.number("hp_baseline")), case["in_x"], case["par_weight"]
    search = Search(search="paper", shift=not baseline, candidates=int(case.number("hp_eq_n")))
    inputs = x.flatten(0, 1)
    found = search_layer(weight, inputs, None, search)
    assert found.activation is not None
    formats = ("e3m0", "e2m1", "e1m2")
    assert found.weight.format == formats[int(case.number("out_w_mbits"))]
    assert found.activation.format == formats[int(case.number("out_a_mbits"))]
    amax, row_amax = inputs.abs().max(), weight.abs().amax(1, keepdim=True)

    def gamma(scale: Tensor, amax: Tensor, format: str) -> Tensor:
        candidates = torch.stack(list(search.scales(amax, format)))
        return (candidates == scale).int().argmax(0)

    for i, format in enumerate(formats):
        scale, rho = found.weight_scales[format], found.activation_scales[format]
        assert_exact(gamma(scale, row_amax, format)[:, 0], case["out_w_gamma"][i], f"gamma of rows, {format}")
        assert_exact(gamma(rho, amax, format), case["out_a_gamma"][i], f"gamma of activations, {format}")
        assert_relative(bias_of(scale, format)[:, 0], case["out_w_bias_all"][i], 1e-5, f"biases, {format}")
        assert_relative(bias_of(rho, format), case["out_rho_all"][i], 1e-5, f"rho, {format}")
    assert_relative(bias_of(found.weight.scale, found.weight.format)[:, 0], case["out_w_bias"], 1e-5, "biases")
    if not baseline:
        channels = fpq_bias(inputs.abs().amax(0), found.activation.format)
        assert_relative(channels, case["out_bt"], 1e-5, "biases of channels")
        assert_exact(found.activation.shift, case["out_k"].to(torch.uint8), "shifts")
    assert_relative(found.weight(weight), case["out_wq"], 1e-5, "weight")
    assert_relative(found.activation(x), case["out_xq"], 1e-5, "activations")
    layer = nn.Linear(weight.shape[1], weight.shape[0], "par_bias" in case)
    layer.weight.data = weight
    if layer.bias is not None:
        layer.bias.data = case["par_bias"]
    assert_relative(pack_linear(layer, found)(x), case["out_y"], 1e-4, "output")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "fp4/cast-e2m1": fp4_cast_e2m1,
    "fp4/pack": fp4_pack,
    "fp4/e8m0": fp4_e8m0,
    "fp4/mxfp4": fp4_mxfp4,
    "fp4/bnb-4bit": fp4_bnb_4bit,
    "fp4/e4m3": fp4_e4m3,
    "fp4/nvfp4": fp4_nvfp4,
    "fp4/llmfp4-quantizer": fp4_llmfp4_quantizer,
    "fp4/llmfp4-calibration": fp4_llmfp4_calibration,
}
