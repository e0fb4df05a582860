# SPDX-License-Identifier: Apache-2.0
"""Other engines on the same problems: one function each, verified like our own. See requirements.txt.

A peer that is not installed raises Missing; whatever else it raises is shown as its failure, and the run goes on.
Peers that quantise by their own rule are compared with their own dequantised weight where they give it, otherwise with
the unquantised product, within what their number of bits can cost (`ROUNDING`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .runner import Case, Missing, Prepared, Unfit, Variant, layer_copies

REQUIREMENTS = "benchmarks/requirements.txt"

# Relative error that rounding to 4 or 8 bits in groups of 32 may cost, activations included.
ROUNDING = {4: 0.16, 8: 0.05}


def load(module: str) -> Any:
    """Import a peer without its greetings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:  # the peer is there, and something that it needs is not
            raise
        raise Missing(f"see {REQUIREMENTS}") from None
    finally:
        logging.disable(logging.NOTSET)


def dense(case: Case) -> Tensor:
    return linear(case.x, case.linear.weight, case.linear.bias)


# What builds one instance of a peer: the call, what it must answer, the tolerance, and the bytes of its weight.
Built = tuple[Callable[[], Any], Tensor, float, int]


def repeatable(build: Callable[[], Built], bound: str, input_bytes: int) -> Prepared:
    """A peer whose copies are built from scratch."""
    call, expected, tolerance, weight_bytes = build()

    def again() -> Prepared:
        return repeatable(build, bound, input_bytes)

    return Prepared(call, expected, tolerance, input_bytes, weight_bytes, again, bound)


def bits_of(x: Tensor) -> np.ndarray:
    return np.packbits(x.numpy() >= 0, axis=1, bitorder="little")


def sign_product(case: Case) -> Tensor:
    """Integer product of the signs, with sign(0) = +1."""
    one = torch.ones(())
    return torch.where(case.x >= 0, one, -one) @ torch.where(case.linear.weight >= 0, one, -one).T


def numkong_product(case: Case) -> Prepared:
    """Hamming distances; k - 2 distance is the product, a step that is not timed. One thread only."""
    nk = load("numkong")
    if case.threads > 1:
        raise Unfit("it has no threads of its own")
    a, b = bits_of(case.x), bits_of(case.linear.weight)
    padded = 8 * a.shape[1]  # the padding bits agree
    expected = ((padded - sign_product(case) - (padded - case.k)) / 2).to(torch.int64)

    def build() -> Built:
        packed = nk.hammings_pack(b)
        return lambda: np.asarray(nk.hammings_packed(a, packed)).view(np.int32), expected, 0.0, b.nbytes

    return repeatable(build, "popcount", a.nbytes)


def bnn_product(case: Case) -> Prepared:
    """The native GEMM of bnn-lab on packed operands; its float32 output holds integers."""
    packed, operands = load("bnn.kernels.packed"), (case.x, case.linear.weight)
    packed.set_num_threads(case.threads)
    words, signs = (packed.pack_binary_pm1((t >= 0).float().numpy() * 2 - 1, axis=1)[0] for t in operands)

    def build() -> Built:
        own = signs.copy()
        call = lambda: packed.binary_gemm_native_prepacked(words, own, case.k)  # noqa: E731
        return call, sign_product(case), 0.0, own.nbytes

    return repeatable(build, "popcount", words.nbytes)


def bnn_layer(case: Case) -> Prepared:
    """bnn-lab's packed layer, float32 in and out; its scale is read from it, its signs are checked exactly."""
    load("bnn.kernels.packed").set_num_threads(case.threads)
    layers = load("bnn.wrap.packed_linear")
    if not load("bnn.kernels.packed").native_kernel_available():
        raise RuntimeError("its native kernel did not load")

    module = layers.PackedBinaryXNORLinear(case.linear.weight, case.linear.bias)
    expected = sign_product(case) * module.alpha + case.linear.bias
    return layer_copies(module, case.x, expected, 1e-6, module.packed_weight_bytes(), "popcount")


def bitsandbytes_linear(quant_type: str, dtype: torch.dtype) -> Callable[[Case], Prepared]:
    """Linear4bit, blocks of 64, against its own dequantised weight; its fused CPU kernel computes in bfloat16."""

    def prepare(case: Case) -> Prepared:
        bnb = load("bitsandbytes")
        module = bnb.nn.Linear4bit(case.k, case.n, quant_type=quant_type, compute_dtype=dtype)
        weight = case.linear.weight.clone()
        module.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=quant_type)
        module.bias = nn.Parameter(case.linear.bias.clone(), requires_grad=False)
        module = module.to(case.device).eval()
        state = module.weight.quant_state
        values = bnb.functional.dequantize_4bit(module.weight.data, state).float().cpu()
        expected = linear(case.x, values, case.linear.bias)
        size = module.weight.nbytes + state.absmax.nbytes
        return layer_copies(module, case.x.to(case.device, dtype), expected, 2e-2, size, "bf16")

    return prepare


def openvino_int4(case: Case) -> Prepared:
    """A MatMul whose weight NNCF compresses to int4_sym, groups of 32; OpenVINO may quantise the activations itself."""
    os.environ.setdefault("NNCF_CI", "1")  # it would send usage statistics
    ov, nncf, opset = load("openvino"), load("nncf"), load("openvino.opset13")
    nncf.set_log_level(40)
    core, rows = ov.Core(), case.x.numpy()
    settings = {"INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}

    parameter = opset.parameter([-1, case.k], np.float32)
    product = opset.matmul(parameter, opset.constant(case.linear.weight.numpy()), False, True)
    biased = opset.add(product, opset.constant(case.linear.bias.numpy()))
    group = 32 if case.k % 32 == 0 else -1
    with contextlib.redirect_stdout(io.StringIO()):
        model = nncf.compress_weights(
            ov.Model([biased], [parameter]),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=group,
            ratio=1.0,
            all_layers=True,
        )
    size = case.n * case.k // 2 + 2 * case.n * case.k // max(group, 1)

    def build() -> Built:
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def call() -> np.ndarray:
            return request.infer([rows], share_inputs=True, share_outputs=True)[0]

        return call, dense(case), ROUNDING[4], size

    return repeatable(build, "int8", case.x.nbytes)


def round_to_int4(weight: Tensor, group: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Symmetric codes of groups of a row: uint8 [n, groups, group / 2], scales, the dequantised weight [n, k]."""
    k = weight.shape[1]
    blocks = nn.functional.pad(weight, (0, -k % group)).unflatten(1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    codes = (blocks / scale).round().clamp(-8, 7)
    unsigned = (codes + 8).to(torch.uint8).numpy()
    return unsigned[..., 0::2] | unsigned[..., 1::2] << 4, scale.squeeze(-1), (codes * scale).flatten(1)[:, :k]


def onnxruntime_int4(accuracy_level: int, group: int = 32) -> Callable[[Case], Prepared]:
    """MatMulNBits; accuracy_level 4 lets it quantise the activations to int8, 0 keeps float32."""

    def prepare(case: Case) -> Prepared:
        ort, onnx = load("onnxruntime"), load("onnx")
        helper, kinds = load("onnx.helper"), onnx.TensorProto
        codes, scale, values = round_to_int4(case.linear.weight, group)
        attributes = {"K": case.k, "N": case.n, "bits": 4, "block_size": group, "accuracy_level": accuracy_level}
        inputs = ["x", "codes", "scale", "", "", "bias"]
        node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes)
        constants = {"codes": codes, "scale": scale.numpy().ravel(), "bias": case.linear.bias.numpy()}
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", kinds.FLOAT, [None, case.k])],
            [helper.make_tensor_value_info("y", kinds.FLOAT, [None, case.n])],
            [
                helper.make_tensor(
                    name, kinds.UINT8 if a.dtype == np.uint8 else kinds.FLOAT, a.shape, a.tobytes(), raw=True
                )
                for name, a in constants.items()
            ],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = case.threads, 1
        feed = {"x": case.x.numpy()}
        expected = linear(case.x, values, case.linear.bias)
        size = codes.nbytes + scale.nbytes

        def build() -> Built:
            session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
            return lambda: session.run(None, feed)[0], expected, 2e-2 if accuracy_level == 4 else 1e-4, size

        return repeatable(build, "int8" if accuracy_level == 4 else "fp32", case.x.nbytes)

    return prepare


def torch_int4(case: Case) -> Prepared:
    """torch's own int4 kernel (what torchao calls on a CPU), bfloat16 in and out, groups of 32, no bias."""
    group = 32
    if case.k % group or case.n % 16:
        raise Unfit("k must be a multiple of 32 and n of 16")
    x = case.x.bfloat16()
    codes, scale, values = round_to_int4(case.linear.weight, group)
    plain = np.stack([codes & 15, codes >> 4], -1).reshape(case.n, case.k).astype(np.int32)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()

    def build() -> Built:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(plain), 1)
        call = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)  # noqa: E731
        return call, linear(case.x, values), 2e-2, packed.nbytes + scales.nbytes

    return repeatable(build, "bf16", x.nbytes)


def torch_dynamic_int8(case: Case) -> Prepared:
    """torch.ao.quantization.quantize_dynamic: 8-bit weights, activations quantised in the call."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(nn.Sequential(case.linear), {nn.Linear}, dtype=torch.qint8)
    return layer_copies(model, case.x, dense(case), ROUNDING[8], case.n * case.k, "int8")


def torchao_int8(case: Case) -> Prepared:
    """torchao's Int8DynamicActivationInt8Weight, eager."""
    quantization = load("torchao.quantization")

    model = nn.Sequential(copy.deepcopy(case.linear))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return layer_copies(model, case.x, dense(case), ROUNDING[8], case.n * case.k, "int8")


def bitsandbytes_cast(case: Case) -> Prepared:
    """quantize_4bit to FP4 in blocks of 64, against its own round trip within what rounding costs."""
    bnb = load("bitsandbytes")
    flat = bnb.functional.quantize_4bit(case.x, quant_type="fp4", blocksize=64)
    back = bnb.functional.dequantize_4bit(*flat)
    if (back - case.x).norm() > ROUNDING[4] * case.x.norm():
        raise RuntimeError("its codes do not stand for x")

    def call() -> Tensor:
        return bnb.functional.quantize_4bit(case.x, quant_type="fp4", blocksize=64)[0]

    return Prepared(call, flat[0], 0.0, case.x.nbytes, 0)


def ml_dtypes_cast(case: Case) -> Prepared:
    """A NumPy cast to float4_e2m1fn, one code a byte."""
    ml_dtypes = load("ml_dtypes")
    x = case.x.numpy()
    values = np.array([0, 1, 2, 4, 0.5, 1.5, 3, 6], np.float32)  # even codes first: of two as near, they are it
    expected = np.copysign(values[np.abs(np.abs(x)[..., None] - values).argmin(-1)], x).astype(ml_dtypes.float4_e2m1fn)
    codes = torch.from_numpy(expected.view(np.uint8))
    return Prepared(lambda: x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8), codes, 0.0, x.nbytes, 0)


PRODUCT = (
    Variant("NumKong hammings_packed", numkong_product, "peer"),
    Variant("bnn-lab native GEMM", bnn_product, "peer"),
)
W1A1 = (Variant("bnn-lab layer", bnn_layer, "peer"),)
FOUR_BIT = (
    Variant("bitsandbytes FP4", bitsandbytes_linear("fp4", torch.float32), "peer"),
    Variant("bitsandbytes NF4, bfloat16", bitsandbytes_linear("nf4", torch.bfloat16), "peer"),
    Variant("OpenVINO int4_sym", openvino_int4, "peer"),
    Variant("ONNX Runtime int4, level 4", onnxruntime_int4(4), "peer"),
    Variant("ONNX Runtime int4, level 0", onnxruntime_int4(0), "peer"),
    Variant("torch int4, bfloat16", torch_int4, "peer"),
    Variant("torch dynamic int8", torch_dynamic_int8, "peer"),
    Variant("torchao dynamic int8", torchao_int8, "peer"),
)
CAST = (
    Variant("bitsandbytes quantize_4bit", bitsandbytes_cast, "peer"),
    Variant("ml_dtypes astype", ml_dtypes_cast, "peer"),
)
