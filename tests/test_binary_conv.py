# SPDX-License-Identifier: Apache-2.0
"""The binary convolution op: every kernel against the default kernel bit for bit, the default kernel against
conv2d in float64 with its zeros, and gradients against the straight-through formula written with plain autograd.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from binary_inputs import FLOATS, leaves, on_meta, with_gradients
from bitmill import ops
from bitmill.ops._library import failure
from bitmill.ops._surrogates import SURROGATES, surrogate_slope
from bitmill.ops.binary_conv import _binary_conv2d_reference, conv_kernels
from bitmill.ops.binary_matmul import unpack_signs
from bitmill.ops.bitpack import LEVELS, binarized
from conv_inputs import SHAPES, Shape, conv_arguments, outputs_of
from problems import assert_same_bits, on_every_machine

op = torch.ops.bitmill.binary_conv2d.default
by_name = {shape.name: shape for shape in SHAPES}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
FLAGS = ("zeros", "bias", "shift", "alpha", "row_scale")


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_alike(arguments: tuple[Any, ...], what: object = "") -> None:
    want = _binary_conv2d_reference(*arguments)
    for machine, got in on_every_machine(lambda: ops.binary_conv2d(*arguments)):
        assert_same_bits(got, want, f"binary_conv2d on {machine}, {what}")
        layouts = torch.contiguous_format, torch.channels_last
        assert [got.is_contiguous(memory_format=layout) for layout in layouts] == [
            want.is_contiguous(memory_format=layout) for layout in layouts
        ], f"binary_conv2d on {machine}, {what}"


def kernels_of(arguments: tuple[Any, ...]) -> Tensor:
    x, weight, scale, _, nonzero, *_, kernel_size, _, _, _, groups, _, _ = arguments
    k = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    return conv_kernels(unpack_signs(weight, nonzero, scale.shape[0], k), kernel_size)


def with_plain_autograd(arguments: tuple[Any, ...]) -> Tensor:
    """The same function in plain torch, in the dtype of its tensors, with the straight-through gradient."""
    x, _, scale, bias, _, shift, alpha, row_scale, _, stride, padding, dilation, groups, levels, surrogate = arguments
    z = x if shift is None else x + shift.view(-1, 1, 1)
    level = binarized(z.detach(), None, levels, 0.5 if alpha is None else alpha / 2).to(z.dtype)
    slope = surrogate_slope(z.detach() / (1 if alpha is None else alpha), surrogate) / (1 if alpha is None else alpha)
    level = level + (z - z.detach()) * slope
    top, bottom, left, right = padding
    kernels = kernels_of(arguments).to(z.dtype)
    y = conv2d(pad(level, (left, right, top, bottom)), kernels, None, stride, 0, dilation, groups)
    y = y * scale.view(-1, 1, 1) if row_scale is None else y * scale.view(-1, 1, 1) * row_scale.unsqueeze(1)
    return y if bias is None else y + bias.view(-1, 1, 1)


@each_shape
@pytest.mark.parametrize("levels", LEVELS)
def test_binary_conv2d_equals_default_with_every_option(shape: Shape, levels: str) -> None:
    for i, flags in enumerate(itertools.product((False, True), repeat=5)):
        arguments = conv_arguments(shape, levels, FLOATS[i % 3], *flags)
        assert_alike(arguments, (levels, FLOATS[i % 3], flags))


@pytest.mark.parametrize("kernel", ((1, 1), (2, 3), (3, 3), (4, 1)))
@pytest.mark.parametrize("channels", (1, 3, 32, 40))
def test_binary_conv2d_equals_default_on_a_grid(kernel: tuple[int, int], channels: int) -> None:
    """Strides, dilations and paddings of both axes in all combinations; levels and options take turns."""
    turns = itertools.cycle(itertools.product(LEVELS, FLOATS, (False, True)))
    for sy, sx, dy, dx, before, after in itertools.product((1, 2), (1, 3), (1, 2), (1, 3), (0, 2), (0, 1)):
        levels, dtype, flag = next(itertools.islice(turns, 4, None))
        padding = (before, after, after, before)
        shape = Shape("grid", (2, channels, 9, 10), 6, kernel, (sy, sx), padding, (dy, dx))
        assert_alike(conv_arguments(shape, levels, dtype, flag, bias=flag, shift=not flag), shape)


@each_shape
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_padded_position_contributes_zero(shape: Shape, dtype: torch.dtype) -> None:
    """Against float64 conv2d of the levels, zeros around them: whole numbers are equal, floats within one rounding."""
    for levels in LEVELS:
        arguments = conv_arguments(shape, levels, dtype, shift=True)
        arguments = (*arguments[:2], torch.ones(shape.n), *arguments[3:])
        exact = with_plain_autograd(tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                                          for a in arguments))  # fmt: skip
        shifted = arguments[0].float() + arguments[5].view(-1, 1, 1)  # the sum is float32, and so is its sign
        same = (torch.sign(shifted) == torch.sign(arguments[0].double() + arguments[5].double().view(-1, 1, 1))).all()
        assert bool(same), "an input for which float32 rounds the shifted value to 0"
        assert torch.equal(ops.binary_conv2d(*arguments), exact.to(dtype)), levels


@pytest.mark.parametrize("levels", LEVELS)
def test_binary_conv2d_without_a_zero_in_the_image(levels: str) -> None:
    """Then one plane of bits is enough, and the padding is the only zero."""
    for shape in SHAPES:
        arguments = conv_arguments(shape, levels)
        x = arguments[0]
        for value in (torch.where(x == 0, 1.0, x), torch.full_like(x, -1.0), torch.zeros_like(x)):
            assert_alike((value, *arguments[1:]), shape)


def test_binary_conv2d_of_special_values() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3e38])
    for dtype, levels in itertools.product(FLOATS, LEVELS):
        arguments = conv_arguments(by_name["3x3"], levels, dtype)
        x = special[torch.randint(8, (2, 5, 6, 7))].to(dtype)
        assert_alike((x, *arguments[1:]), (dtype, levels))


IMAGES = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second pixel": lambda x: torch.stack((x, -x), -1).flatten(-2)[..., ::2],
    "every second channel": lambda x: torch.stack((x, -x), 2).flatten(1, 2)[:, ::2],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd offset": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "lazily negated": lambda x: torch._neg_view(-x),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", IMAGES)
@each_shape
def test_binary_conv2d_of_any_memory_layout(layout: str, shape: Shape) -> None:
    for levels, dtype in zip(LEVELS, FLOATS, strict=True):
        arguments = conv_arguments(shape, levels, dtype, bias=True, shift=True, row_scale=True)
        x = IMAGES[layout](arguments[0])
        assert_alike((x, *arguments[1:]), (layout, shape.name))
        got = ops.binary_conv2d(x, *arguments[1:])
        if layout == "channels_last" and shape.groups == 1 and x.numel():
            assert got.is_contiguous(memory_format=torch.channels_last)
        assert_same_bits(got.contiguous(), ops.binary_conv2d(x.contiguous(), *arguments[1:]), layout)


@pytest.mark.parametrize("levels", LEVELS)
def test_binary_conv2d_in_parallel(levels: str) -> None:
    shape = Shape("large", (3, 40, 30, 31), 70)
    assert_alike(conv_arguments(shape, levels, bias=True, shift=True, row_scale=True))
    last = conv_arguments(shape, levels, torch.bfloat16, zeros=True)
    assert_alike((last[0].contiguous(memory_format=torch.channels_last), *last[1:]))


@each_shape
@pytest.mark.parametrize("levels", LEVELS)
def test_gradients_equal_the_straight_through_formula(shape: Shape, levels: str) -> None:
    for i, (surrogate, flag) in enumerate(itertools.product(SURROGATES, (False, True))):
        dtype = FLOATS[i % 3]
        arguments = conv_arguments(shape, levels, dtype, flag, True, flag, flag, not flag, surrogate)
        places = (0, 2, 3, 5, 7)  # x, scale, bias, shift, row_scale
        (mine, inputs), (plain, same) = leaves(arguments, places), leaves(arguments, places)
        got, want = ops.binary_conv2d(*mine), with_plain_autograd((plain[0].float(), *plain[1:]))
        g = torch.randn(want.shape).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        gradients = zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, same, g.float()), strict=True)
        for a, b in gradients:
            assert a.dtype == b.dtype
            scale = b.float().abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + scale))


@pytest.mark.parametrize("name", ("3x3", "groups", "empty batch", "dilated", "one side padded"))
@pytest.mark.parametrize("flag", (False, True))
def test_opcheck(name: str, flag: bool) -> None:
    for levels in LEVELS:
        arguments = conv_arguments(by_name[name], levels, torch.float32, flag, flag, flag, flag, not flag)
        torch.library.opcheck(op, with_gradients(arguments, (0, 2, 3, 5, 7)))
        last = arguments[0].contiguous(memory_format=torch.channels_last)
        torch.library.opcheck(op, (last, *arguments[1:]), test_utils="test_faketensor")


def test_compiled_with_any_batch_and_size() -> None:
    shape = Shape("no two sizes alike", (4, 5, 6, 11), 9)  # torch takes equal ones for one and the same
    arguments = conv_arguments(shape, bias=True, shift=True)

    @torch.compile(
        fullgraph=True, dynamic=True, backend="aot_eager"
    )  # inductor fixes the sizes of torch's own gradient
    def convolve(x: Tensor) -> Tensor:
        return ops.binary_conv2d(x, *arguments[1:]) * 2

    for size in ((4, 5, 6, 11), (3, 5, 9, 7), (7, 5, 12, 6)):
        x = torch.randn(size, requires_grad=True)
        same = x.detach().clone().requires_grad_()
        with torch.compiler.set_stance("default" if size[0] == 4 else "fail_on_recompile"):
            got = convolve(x)
        want = ops.binary_conv2d(same, *arguments[1:]) * 2
        assert torch.equal(got, want)
        got.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(x.grad, same.grad)


def test_on_the_meta_device() -> None:
    for shape in SHAPES:
        arguments = on_meta(conv_arguments(shape, row_scale=True))
        assert ops.binary_conv2d(*arguments).shape == (shape.x[0], shape.n, *outputs_of(shape))


BAD = {
    "x must have shape [batch, channels, height, width], got [5, 6, 7]": {"x": torch.zeros(5, 6, 7)},
    "height, width], got [2, 0, 6, 7]": {"x": torch.zeros(2, 0, 6, 7)},
    "scale must have shape [n], n at least 1, got [0]": {"scale": torch.zeros(0)},
    "x must be float32, bfloat16 or float16, got float64": {"x": torch.zeros(2, 5, 6, 7, dtype=torch.float64)},
    "weight must have shape [1, 2, 16], got [1, 2, 8]; pack the weight": {"weight": torch.zeros(1, 2, 8).int()},
    "weight must be int32, got float32": {"weight": torch.zeros(1, 2, 16)},
    "scale must have shape [7], got [7, 1]": {"scale": torch.zeros(7, 1)},
    "bias must have shape [7], got [6]": {"bias": torch.zeros(6)},
    "weight_nonzero must be int32, got uint8": {"weight_nonzero": torch.zeros(1, 2, 16, dtype=torch.uint8)},
    "shift must have shape [5], got [7]": {"shift": torch.zeros(7)},
    "alpha must have shape [], got [1]": {"alpha": torch.ones(1)},
    "row_scale must have shape [2, 6, 7], got [2, 7, 6]": {"row_scale": torch.zeros(2, 7, 6)},
    "kernel_size must be 2 numbers between 1 and 16777216, got [3]": {"kernel_size": [3]},
    "stride must be 2 numbers between 1 and 16777216, got [1, 0]": {"stride": [1, 0]},
    "padding must be 4 numbers between 0 and 16777216, got [1, 1]": {"padding": [1, 1]},
    "dilation must be 2 numbers between 1 and 16777216, got [1, 16777217]": {"dilation": [1, 16777217]},
    "dilation must be 2 numbers between 1 and 16777216, got [1, -1]": {"dilation": [1, -1]},
    "groups must divide the channels of x and of the output, got groups = 2 for 5 and 7": {"groups": 2},
    "got groups = 0 for 5 and 7": {"groups": 0},
    "x must be at least as high as the kernel with its dilation (9), padding included, got 6 + 2": {"dilation": [4, 1]},
    "x must be at least as wide as the kernel with its dilation (11), padding included, got 7 + 2": {
        "dilation": [1, 5]
    },
    'levels must be "sign", "plus" or "bool", got "round"': {"levels": "round"},
    'surrogate must be "identity"': {"surrogate": "step"},
}
NAMES = ("x", "weight", "scale", "bias", "weight_nonzero", "shift", "alpha", "row_scale", "kernel_size", "stride")
NAMES += ("padding", "dilation", "groups", "levels", "surrogate")


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_one_sentence_for_bad_input(message: str, device: str) -> None:
    arguments = conv_arguments(by_name["3x3"], bias=True)
    arguments = tuple(BAD[message].get(name, a) for name, a in zip(NAMES, arguments, strict=True))
    with pytest.raises(ValueError) as error:
        ops.binary_conv2d(*(on_meta(arguments) if device == "meta" else arguments))
    text = str(error.value)
    assert message in text and text.startswith("binary_conv2d: ") and len(text) < 200


def test_weight_bits_past_the_last_column_are_refused() -> None:
    if failure("_ops_cpu") is not None:
        pytest.skip("the default kernel never reads them")
    arguments = conv_arguments(by_name["3x3"])
    weight = arguments[1].clone()
    weight[0, -1, 0] |= 1 << 20  # k = 45
    with pytest.raises(ValueError, match="past column k = 45 must be 0"):
        ops.binary_conv2d(arguments[0], weight, *arguments[2:])
