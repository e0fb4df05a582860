# SPDX-License-Identifier: Apache-2.0
"""Encoder layers as one op, and the normalisation in it: torch's bits on every kernel; shapes, errors, compile."""

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
from bitmill.ops.binary_encoder import NAMES, EncoderLayerArguments, _arguments, _binary_encoder_reference
from bitmill.ops.layer_norm import _layer_norm_reference
from problems import assert_same_bits, on_every_machine
from test_binary_attention_op import every_rule
from test_binary_blocks import assert_alike, attention_arguments, mlp_arguments

ENCODER = torch.ops.bitmill.binary_encoder.default
NORM = torch.ops.bitmill.layer_norm.default


def norm_arguments(n: int) -> tuple[Any, ...]:
    return torch.randn(n), torch.randn(n), 1e-5


def layer_of(
    k: int = 33, h: int = 50, inner_levels: str = "sign", **attention: Any
) -> tuple[Tensor, EncoderLayerArguments]:
    """An input and a layer for it."""
    x, _, *of_attention = attention_arguments(k=k, n_out=k, **attention)
    two_planes = inner_levels == "sign"
    _, _, *of_mlp = mlp_arguments((1, k), h, k, inner_levels=inner_levels, zeros=True, two_planes=two_planes)
    return x, EncoderLayerArguments(
        ops.SelfAttentionArguments(*of_attention),
        ops.LayerNormArguments(*norm_arguments(k)),
        ops.MlpArguments(*of_mlp),
        ops.LayerNormArguments(*norm_arguments(k)),
    )


def encoder_arguments(count: int = 1, norm_first: bool = False, **layer: Any) -> tuple[Any, ...]:
    """Of the op; every second layer has the attention's planes of nonzero bits and the shifts that are asked for."""
    layers = []
    for i in range(count):
        options = {**layer, "zeros": False, "shift": False} if i % 2 else layer
        x, made = layer_of(**options)
        layers.append(made)
    return (x, *_arguments(layers), norm_first)


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
def test_encoder_equals_the_ops_it_is_made_of(rule: str, norm_first: bool) -> None:
    options: dict[str, Any] = {"rule": rule, "norm_first": norm_first}
    for count, sequences, n, layers, zeros in (
        (1, 1, 1, 3, True),
        (3, 1, 70, 1, False),
        (1, 2, 33, 3, False),
        (3, 3, 50, 3, True),
    ):
        layer = {"sequences": sequences, "n": n, "layers": layers, "zeros": zeros, "shift": zeros}
        assert_alike(ENCODER, _binary_encoder_reference, encoder_arguments(count, **layer, **options), layer)
    for count, lengths in ((2, [5, 0, 70, 33]), (1, [])):
        arguments = encoder_arguments(count, n=70, lengths=lengths, inner_levels="bool", **options)
        assert_alike(ENCODER, _binary_encoder_reference, arguments, lengths)
    mask = torch.rand(2, 1, 1, 40) < 0.7
    assert_alike(ENCODER, _binary_encoder_reference, encoder_arguments(2, n=40, mask=mask, **options))


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_of_bert_base(norm_first: bool) -> None:
    arguments = encoder_arguments(2, k=768, h=3072, norm_first=norm_first, sequences=1, n=128, heads=12, d=64)
    assert_alike(ENCODER, _binary_encoder_reference, arguments)


def test_input_is_left_as_it_is() -> None:
    for norm_first in (False, True):
        x, *arguments = encoder_arguments(3, norm_first, n=70)
        before = x.clone()
        ENCODER(x, *arguments)
        assert_same_bits(x, before)


def assert_refused(arguments: tuple[Any, ...], message: str) -> None:
    for kernel, inputs in (
        (ENCODER, arguments),
        (_binary_encoder_reference, arguments),
        (ENCODER, on_meta(arguments)),
    ):
        with pytest.raises(ValueError, match=f"binary_encoder: ({message})"):
            kernel(*inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", torch.rand(32, 1), r"scale must have shape|out must have shape|scale must have as many rows"),
        ("norm_weight", torch.rand(32), r"norm_weight must have shape \[33\], got \[32\]"),
        ("norm_bias", torch.rand(33).double(), "norm_bias must be float32, got float64"),
        ("mlp_shift", torch.rand(32), r"mlp_shift must have shape \[33\], got \[32\]"),
        ("mlp_negative", torch.ones(1, dtype=torch.int32), r"mlp_negative must have shape \[2, 50\], got \[1\]"),
        ("mlp_single", torch.ones(1, dtype=torch.int32), r"mlp_single must have shape \[n, count\] and goes with"),
        ("mlp_scale", torch.rand(33), r"mlp_scale must have shape \[33, 1\], got \[33\]"),
        ("mlp_bias", torch.rand(32), r"mlp_bias must have shape \[33\], got \[32\]"),
        ("last_norm_weight", torch.rand(32), r"last_norm_weight must have shape \[33\], got \[32\]"),
        ("last_norm_bias", torch.rand(32), r"last_norm_bias must have shape \[33\], got \[32\]"),
    ],
)
def test_errors_of_a_layer(name: str, value: Any, message: str) -> None:
    x, *lists, norm_first = encoder_arguments(2)
    place = NAMES.index(name)
    entries = lists[place] or [torch.empty(0, dtype=value.dtype)] * 2
    lists[place] = [entries[0], value]
    assert_refused((x, *lists, norm_first), f"layer 1: ({message})")


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_lists(name: str) -> None:
    x, *lists, norm_first = encoder_arguments(2, zeros=True, shift=True, rule="elastic")
    place = NAMES.index(name)
    if not isinstance(lists[place], list):
        return  # the same for all layers
    lists[place] = lists[place][:-1] or [torch.ones(1, dtype=torch.int32)]
    whole = "weight must hold one or three entries for each of the"
    message = whole if name in ("weight", "positive") else rf"{name} must hold [26] entries( or none)?, got [15]"
    assert_refused((x, *lists, norm_first), message)


def test_errors_of_all() -> None:
    x, *lists = encoder_arguments()
    assert_refused((x.bfloat16(), *lists), "layer 0: x must be float32, got bfloat16")
    assert_refused((x[0], *lists), r"layer 0: x must have shape \[sequences, n, k\]")
    lists[NAMES.index("mlp_levels")] = "ternary"
    assert_refused((x, *lists), 'layer 0: (mlp_)?levels must be "sign", "plus" or "bool", got "ternary"')
    _, *nothing, norm_first = encoder_arguments()
    nothing = [[] if isinstance(entries, list) else entries for entries in nothing]
    assert_refused((x, *nothing, norm_first), "weight must hold one or three entries for each of the 0 layers")


def test_layers_must_have_the_width_of_x() -> None:
    x, layer = layer_of(k=40)
    _, _, *of_attention = attention_arguments(k=40, n_out=33)
    narrow = layer._replace(attention=ops.SelfAttentionArguments(*of_attention))
    assert_refused(
        (x, *_arguments([narrow]), False), "layer 0: scale must have as many rows as x has columns, 40, got 33"
    )


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
    arguments = encoder_arguments(2, rule=rule, zeros=True, norm_first=rule == "bool")
    torch.library.opcheck(ENCODER, arguments)
    compiled = torch.compile(lambda *inputs: ENCODER(*inputs), fullgraph=True)
    assert_same_bits(compiled(*arguments), ENCODER(*arguments))


def test_layer_norm_opcheck_and_a_transposed_input() -> None:
    x: Tensor = torch.randn(7, 5).t()
    arguments = (x, *norm_arguments(7))
    torch.library.opcheck(NORM, arguments)
    assert_same_bits(NORM(*arguments), torch.layer_norm(x, (7,), *arguments[1:]))
    assert NORM(*arguments).is_contiguous()


def test_public_functions() -> None:
    options: dict[str, Any] = {"rule": "elastic", "zeros": True, "shift": True, "lengths": [3, 4]}
    x, first = layer_of(**options)
    _, second = layer_of(**options)
    second = second._replace(attention=second.attention._replace(lengths=first.attention.lengths))
    for norm_first in (False, True):
        by_one = ops.binary_encoder(ops.binary_encoder(x, [first], norm_first), [second], norm_first)
        assert_same_bits(ops.binary_encoder(x, [first, second], norm_first), by_one)
    assert_same_bits(ops.layer_norm(x, *first.norm), NORM(x, *first.norm))
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        ops.binary_encoder(x, [])
    other = second._replace(mlp=second.mlp._replace(inner_levels="plus"))
    with pytest.raises(
        ValueError, match=r"layers must have the same number of weights.*give them to calls of their own"
    ):
        ops.binary_encoder(x, [first, other])
