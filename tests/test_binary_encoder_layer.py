# SPDX-License-Identifier: Apache-2.0
"""An encoder layer as one op, and the normalisation in it: torch's bits on every kernel; shapes, errors, compile."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from binary_inputs import on_meta
from bitmill import ops
from bitmill.ops.binary_encoder_layer import _binary_encoder_layer_reference
from bitmill.ops.layer_norm import _layer_norm_reference
from problems import assert_same_bits, on_every_machine
from test_binary_attention_op import every_rule
from test_binary_blocks import assert_alike, attention_arguments, mlp_arguments

LAYER = torch.ops.bitmill.binary_encoder_layer.default
NORM = torch.ops.bitmill.layer_norm.default


def norm_arguments(n: int) -> tuple[Any, ...]:
    return torch.randn(n), torch.randn(n), 1e-5


def layer_arguments(
    k: int = 33, h: int = 50, inner_levels: str = "sign", norm_first: bool = False, **attention: Any
) -> tuple[Any, ...]:
    x, _, *of_attention = attention_arguments(k=k, n_out=k, **attention)
    two_planes = inner_levels == "sign"
    _, _, *of_mlp = mlp_arguments((1, k), h, k, inner_levels=inner_levels, zeros=True, two_planes=two_planes)
    return (x, *of_attention, *norm_arguments(k), *of_mlp, *norm_arguments(k), norm_first)


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 100, 255, 256, 312, 384, 768, 1403, 4096])
def test_layer_norm_has_the_bits_of_torch(n: int) -> None:
    for shape in ((n,), (0, n), (1, n), (3, 5, n), (70, n)):
        weight, bias, eps = norm_arguments(n)
        x = 3 * torch.randn(shape) + torch.randn(n)
        assert_alike(NORM, _layer_norm_reference, (x, weight, bias, eps), shape)
    assert_alike(NORM, _layer_norm_reference, (torch.full((2, n), 7.0), weight, bias, eps))
    broken = torch.randn(3, n)
    broken[0, 0], broken[1, -1] = torch.inf, torch.nan
    for machine, got in on_every_machine(lambda: NORM(broken, weight, bias, eps)):
        torch.testing.assert_close(got, NORM(broken, weight, bias, eps), equal_nan=True, msg=machine)
        assert got.isfinite().all(-1).tolist() == [False, False, True]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_layer_norm_follows_the_kernel_that_torch_has(capability: str) -> None:
    program = """
import torch, bitmill
torch.manual_seed(0)
for n in (5, 100, 768, 1403):
    x, weight, bias = torch.randn(70, n), torch.randn(n), torch.randn(n)
    want = torch.layer_norm(x, (n,), weight, bias, 1e-5)
    assert torch.equal(bitmill.ops.layer_norm(x, weight, bias, 1e-5), want), n
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("norm_first", [False, True])
@every_rule
def test_layer_equals_the_ops_it_is_made_of(rule: str, norm_first: bool) -> None:
    options: dict[str, Any] = {"rule": rule, "norm_first": norm_first}
    for sequences, n, layers, zeros in ((1, 1, 3, True), (1, 70, 1, False), (2, 33, 3, False), (3, 50, 3, True)):
        arguments = layer_arguments(sequences=sequences, n=n, layers=layers, zeros=zeros, shift=zeros, **options)
        assert_alike(LAYER, _binary_encoder_layer_reference, arguments, (sequences, n))
    for lengths in ([5, 0, 70, 33], []):
        arguments = layer_arguments(n=70, lengths=lengths, inner_levels="bool", **options)
        assert_alike(LAYER, _binary_encoder_layer_reference, arguments, lengths)
    mask = torch.rand(2, 1, 1, 40) < 0.7
    assert_alike(LAYER, _binary_encoder_layer_reference, layer_arguments(n=40, mask=mask, **options))


@pytest.mark.parametrize("norm_first", [False, True])
def test_layer_of_bert_base(norm_first: bool) -> None:
    arguments = layer_arguments(768, 3072, norm_first=norm_first, sequences=1, n=128, heads=12, d=64)
    assert_alike(LAYER, _binary_encoder_layer_reference, arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.rand(2, 5, 33).bfloat16(), "x must be float32, got bfloat16"),
        (23, torch.rand(32, 1), r"scale must have shape|out must have shape|scale must have as many rows"),
        (25, torch.rand(32), r"norm_weight must have shape \[33\], got \[32\]"),
        (26, torch.rand(33).double(), "norm_bias must be float32, got float64"),
        (28, torch.rand(32), r"mlp_shift must have shape \[33\], got \[32\]"),
        (30, "ternary", '(mlp_)?levels must be "sign", "plus" or "bool", got "ternary"'),
        (34, torch.zeros(1, dtype=torch.int32), r"mlp_negative must have shape \[2, 50\], got \[1\]"),
        (35, torch.zeros(1, dtype=torch.int32), r"mlp_single must have shape \[n, count\] and goes with negative"),
        (39, torch.rand(33), r"mlp_scale must have shape \[33, 1\], got \[33\]"),
        (40, torch.rand(32), r"mlp_bias must have shape \[33\], got \[32\]"),
        (41, torch.rand(32), r"last_norm_weight must have shape \[33\], got \[32\]"),
        (42, torch.rand(32), r"last_norm_bias must have shape \[33\], got \[32\]"),
    ],
)
def test_layer_errors(place: int, value: Any, message: str) -> None:
    arguments = layer_arguments()
    arguments = (*arguments[:place], value, *arguments[place + 1 :])
    for kernel, inputs in (
        (LAYER, arguments),
        (_binary_encoder_layer_reference, arguments),
        (LAYER, on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"binary_encoder_layer: ({message})"):
            kernel(*inputs)


def test_layers_must_have_the_width_of_x() -> None:
    x, _, *of_attention = attention_arguments(k=40, n_out=33)
    _, _, *of_mlp = mlp_arguments((1, 40), 50, 40)
    arguments = (x, *of_attention, *norm_arguments(40), *of_mlp, *norm_arguments(40), False)
    for kernel, inputs in ((LAYER, arguments), (LAYER, on_meta(arguments))):
        with pytest.raises(ValueError, match="scale must have as many rows as x has columns, 40, got 33"):
            kernel(*inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2, 5).half(), *norm_arguments(5)), "x must be float32, got float16"),
        ((torch.tensor(1.0), *norm_arguments(1)), "x must have at least one dimension, got a scalar"),
        ((torch.rand(2, 5), *norm_arguments(4)), r"weight must have shape \[5\], got \[4\]"),
        ((torch.rand(2, 5), torch.rand(5), torch.rand(5).half(), 0.0), "bias must be float32, got float16"),
    ],
)
def test_layer_norm_errors(arguments: tuple[Any, ...], message: str) -> None:
    for kernel, inputs in ((NORM, arguments), (_layer_norm_reference, arguments), (NORM, on_meta(arguments))):
        with pytest.raises(ValueError, match=f"layer_norm: {message}"):
            kernel(*inputs)


@every_rule
def test_opcheck_and_compile(rule: str) -> None:
    arguments = layer_arguments(rule=rule, zeros=True, norm_first=rule == "bool")
    torch.library.opcheck(LAYER, arguments)
    compiled = torch.compile(lambda *inputs: LAYER(*inputs), fullgraph=True)
    assert_same_bits(compiled(*arguments), LAYER(*arguments))


def test_layer_norm_opcheck_and_a_transposed_input() -> None:
    x: Tensor = torch.randn(7, 5).t()
    arguments = (x, *norm_arguments(7))
    torch.library.opcheck(NORM, arguments)
    assert_same_bits(NORM(*arguments), torch.layer_norm(x, (7,), *arguments[1:]))
    assert NORM(*arguments).is_contiguous()


def test_public_functions_pass_every_argument_on() -> None:
    arguments = layer_arguments(rule="elastic", zeros=True, shift=True, lengths=[3, 4], norm_first=True)
    x, rest = arguments[0], arguments[1:]
    got = ops.binary_encoder_layer(
        x,
        ops.SelfAttentionArguments(*rest[:24]),
        ops.LayerNormArguments(*rest[24:27]),
        ops.MlpArguments(*rest[27:40]),
        ops.LayerNormArguments(*rest[40:43]),
        rest[43],
    )
    assert_same_bits(got, LAYER(*arguments))
    assert_same_bits(ops.layer_norm(x, *rest[24:27]), NORM(x, *rest[24:27]))
