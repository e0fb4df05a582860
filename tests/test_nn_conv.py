# SPDX-License-Identifier: Apache-2.0
"""BinaryConv2d: training form and packed form agree, gradients, shapes, and what a model does with them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import bitmill
from binary_inputs import FLOATS, values
from bitmill import BinaryConfig, dequantize_, pack_, quantize_
from bitmill.binarize import method, method_names, sign
from bitmill.nn import BinaryConv2d, PackedBinaryConv2d
from problems import assert_same_bits

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": (2, 5), "padding": "same", "dilation": (3, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "patches": {"kernel_size": (4, 2), "stride": (4, 2)},
    "groups": {"kernel_size": 3, "stride": 2, "padding": (2, 1), "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "one pixel": {"kernel_size": 1},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "dilation": 2},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def signs_of(name: str) -> bool:
    """Whether the method's usual activations are 1-bit signs, which a convolution can have."""
    return method(name).conv_activation_rule(1).scale in ("none", "learned") and 1 in method(name).act_bits


ONE_BIT = [name for name in method_names() if signs_of(name)]


def trained(config: BinaryConfig, **geometry: Any) -> BinaryConv2d:
    """A layer whose parameters have all left their start, after one batch in training mode."""
    layer = BinaryConv2d(4, 8, **geometry, config=config)
    layer(values(2, 4, 11, 12))
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name in ("row_scale", "column_scale"):
                p[:6] = torch.rand(6) + 0.5
            elif name not in ("weight", "alpha"):
                p.copy_(torch.rand(p.shape) - 0.3)
        layer.weight.view(-1)[::7] = 0.0
    return layer.eval()


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("binarizer", ONE_BIT)
def test_training_form_in_eval_mode_equals_packed_form(binarizer: str, name: str) -> None:
    for zero in ("torch", "plus"):
        layer = trained(BinaryConfig(binarizer, act_bits=1, zero=zero), **GEOMETRIES[name])
        packed = layer.pack()
        for dtype in FLOATS:
            x = values(2, 4, 11, 12, dtype=dtype)
            want = layer(x).detach()
            assert_same_bits(packed(x), want, f"{binarizer}, {zero}, {dtype}")
            last = packed(x.contiguous(memory_format=torch.channels_last))
            assert_same_bits(last.contiguous(), want.contiguous(), f"channels_last, {binarizer}, {zero}, {dtype}")


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("binarizer", ("sign", "bit", "xnorpp", "binarydm", "n2uq", "statsq"))
def test_float_images(binarizer: str, name: str) -> None:
    for weight_bits in method(binarizer).weight_bits[:2]:
        layer = trained(BinaryConfig(binarizer, act_bits=32, weight_bits=weight_bits), **GEOMETRIES[name])
        packed, x = layer.pack(), values(2, 4, 11, 12)
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
        half = x.bfloat16()
        torch.testing.assert_close(packed(half), layer(half), rtol=2e-2, atol=2e-2)
        assert packed(half).dtype == torch.bfloat16


def test_unsigned_levels() -> None:
    for name, geometry in GEOMETRIES.items():
        layer = trained(BinaryConfig("bit", signed=False), **geometry)
        x = values(2, 4, 11, 12).relu()
        assert_same_bits(layer.pack()(x), layer(x).detach(), name)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_are_those_of_a_float_convolution(name: str) -> None:
    """Of the signs, with the straight-through windows: what plain torch computes."""
    conv = nn.Conv2d(4, 8, **GEOMETRIES[name])
    layer = BinaryConv2d.from_conv(conv, BinaryConfig("sign"))
    x = values(2, 4, 11, 12).requires_grad_()
    scale = conv.weight.detach().abs().mean((1, 2, 3), keepdim=True)
    level, signs = sign(x), sign(conv.weight)
    filters = signs + (scale * signs - signs).detach()  # the gradient does not carry the scale
    if conv.padding_mode == "zeros":
        want = conv2d(level, filters, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    else:
        bordered = nn.functional.pad(level, conv._reversed_padding_repeated_twice, conv.padding_mode)
        want = conv2d(bordered, filters, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    g = torch.randn(want.shape)
    leaves = (x, conv.weight, conv.bias)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for mine, plain in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    seen = x.detach().clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(layer.pack()(seen), seen, g)[0],
        torch.autograd.grad(layer(x), x, g)[0],
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_training_keeps_is_bits() -> None:
    layer, x = BinaryConv2d(32, 8, 3, padding=1, config=BinaryConfig("sign")), torch.randn(4, 32, 16, 16)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x.requires_grad_())
    kept.pop(x.data_ptr(), None)  # the caller's own
    assert sum(kept.values()) < x.nbytes / 8 + 4 * layer.weight.nbytes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 4, 4)
        self.mix = nn.Sequential(nn.Conv2d(24, 24, 3, padding="same", groups=4), nn.BatchNorm2d(24))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.mix(x)).mean((2, 3)))


@pytest.mark.parametrize("binarizer", ("bibert", "bit", "xnorpp", "recu"))
def test_a_model_is_swapped_packed_saved_and_loaded(binarizer: str, tmp_path: Path) -> None:
    config, x = BinaryConfig(binarizer, convs=True), torch.randn(2, 3, 16, 16)
    model = Net()
    assert quantize_(model, config) == ["embed", "mix.0", "head"]
    assert isinstance(model.embed, BinaryConv2d) and not isinstance(model.mix[1], BinaryConv2d)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    want = model(x).detach()
    bitmill.save(model, tmp_path / "training.safetensors")
    fresh = Net().eval()
    assert sorted(bitmill.load(fresh, tmp_path / "training.safetensors")) == ["embed", "head", "mix.0"]
    assert torch.equal(fresh(x), want)
    assert pack_(model) == ["embed", "mix.0", "head"]
    assert torch.equal(model(x), want)
    path = tmp_path / "packed.safetensors"
    bitmill.save(model, path)
    with torch.device("meta"):
        empty = Net().eval()
    for loaded in (Net().eval(), empty):
        bitmill.load(loaded, path)
        assert isinstance(loaded.embed, PackedBinaryConv2d)
        assert torch.equal(loaded(x), want)
    report = bitmill.summary(model)
    assert [layer.shape for layer in report.layers] == [(24, 48), (24, 54), (5, 24)]
    assert report.file_bytes == path.stat().st_size
    assert report.layers[0].kernel != "torch" or not bitmill.ops._machine.instruction_sets()


def test_only_asked_for_convolutions_are_swapped() -> None:
    model = Net()
    assert quantize_(model, BinaryConfig()) == ["head"]
    with pytest.raises(ValueError, match=r"must contain nn.Linear or nn.Conv2d that the filter accepts"):
        quantize_(nn.Sequential(nn.ReLU()), BinaryConfig(convs=True))


def test_dequantized_it_is_a_convolution_with_the_binarised_filters() -> None:
    for packed in (False, True):
        model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), 2, (1, 0), groups=2), nn.Conv2d(6, 3, 1, bias=False))
        quantize_(model, BinaryConfig("bit", convs=True))
        x = torch.randn(2, 4, 9, 9)
        model(x)
        first = model[0]
        value = first.binarized_weight().value.detach().view_as(first.weight)
        if packed:
            pack_(model)
        assert dequantize_(model) == ["0", "1"]
        assert type(model[0]) is nn.Conv2d and model[1].bias is None
        torch.testing.assert_close(model[0].weight, nn.Parameter(value), rtol=1e-6, atol=1e-7)
        assert model(x).shape == (2, 3, 5, 4)
    with pytest.raises(ValueError, match="have no place in an nn"):
        BinaryConv2d(3, 4, 1, config=BinaryConfig("xnorpp")).dequantize()


def test_parameters_are_shared_with_the_convolution() -> None:
    conv = nn.Conv2d(3, 4, 3)
    layer = BinaryConv2d.from_conv(conv.eval(), BinaryConfig("xnorpp"))
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    torch.testing.assert_close(layer.weight_scale[:, 0], conv.weight.abs().mean((1, 2, 3)))


def test_one_image_without_a_batch_and_an_empty_batch() -> None:
    for act_bits in (1, 32):
        layer = trained(BinaryConfig("sign", act_bits=act_bits), kernel_size=3, padding=1)
        for module in (layer, layer.pack()):
            x = values(4, 6, 7)
            torch.testing.assert_close(module(x), module(x[None])[0], rtol=0, atol=0)
            assert module(values(0, 4, 6, 7)).shape == (0, 8, 6, 7)


@pytest.mark.parametrize("act_bits", (1, 32))
def test_compiled_exported_copied_and_pickled(act_bits: int) -> None:
    layer = trained(BinaryConfig("sign", act_bits=act_bits), kernel_size=3, padding=1)
    packed, x = layer.pack(), values(2, 4, 9, 10)
    want = packed(x)
    torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), want)
    exported = torch.export.export(packed, (x,)).module()
    torch.testing.assert_close(exported(x), want)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), want)
    layer.train()
    compiled, same = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager"), copy.deepcopy(layer)
    compiled(x).sum().backward()
    same(x).sum().backward()
    torch.testing.assert_close(compiled.weight.grad, same.weight.grad)


def test_dtypes_of_layer_and_autocast() -> None:
    layer = trained(BinaryConfig("react"), kernel_size=3)
    x = values(2, 4, 8, 8)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), want) and torch.equal(layer.pack()(x), want)
    assert layer.pack().bfloat16().scale.dtype == torch.float32
    halved = layer.bfloat16()
    assert_same_bits(halved.pack()(x.bfloat16()), halved(x.bfloat16()).detach())


BAD = {
    "config must be a BinaryConfig, got FP4Config": {"config": bitmill.FP4Config()},
    "group_size must be None for a convolution, got 32": {"config": BinaryConfig(group_size=32)},
    "activations must be 'float' for a convolution": {"config": BinaryConfig(act_bits=32, activations="int8")},
    "act_bits must be 1 or 32 for a convolution, got 2": {"config": BinaryConfig("bit", act_bits=2)},
    "method must be one whose 1-bit images are signs": {"config": BinaryConfig("n2uq", act_bits=1)},
}


@pytest.mark.parametrize("message", BAD)
def test_one_sentence_for_a_configuration_that_does_not_fit(message: str) -> None:
    with pytest.raises(ValueError) as error:
        BinaryConv2d(3, 4, 3, **BAD[message])
    assert message in str(error.value)
    with pytest.raises(ValueError, match="quantize_: 0: BinaryConv2d: group_size"):
        quantize_(nn.Sequential(nn.Conv2d(3, 4, 3)), BinaryConfig(group_size=32, convs=True))


def test_one_sentence_for_bad_input() -> None:
    layer = trained(BinaryConfig("xnor"), kernel_size=3)
    for module in (layer, layer.pack()):
        with pytest.raises(ValueError, match=r"x must have shape \[batch, 4, height, width\] or .*got \[2, 3, 8, 8\]"):
            module(torch.zeros(2, 3, 8, 8))
        with pytest.raises(ValueError, match="at least as wide as the kernel with its dilation"):
            module(torch.zeros(2, 4, 8, 2))
    with pytest.raises(ValueError, match="got ConvTranspose2d, whose forward may differ"):
        BinaryConv2d.from_conv(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(ValueError, match="alpha is not set"):
        BinaryConv2d(3, 4, 3, config=BinaryConfig("bit")).pack()
    with pytest.raises(ValueError, match="must be finite to be packed"):
        layer.weight.data[0, 0, 0, 0] = float("nan")
        layer.pack()


def test_a_file_for_another_convolution_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "conv.safetensors"
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    quantize_(model, BinaryConfig(convs=True))
    pack_(model)
    bitmill.save(model, path)
    for other, reason in (
        (nn.Conv2d(3, 4, 3), r"padding is \[1, 1\] in the file and \[0, 0\] in the model"),
        (nn.Conv2d(3, 4, 3, 2, 1), "stride is"),
        (nn.Conv2d(3, 4, 3, padding="same"), "padding is"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode is 'zeros' in the file"),
        (nn.Linear(3, 4), "cannot take the place of a Linear"),
    ):
        with pytest.raises(ValueError, match=reason):
            bitmill.load(nn.Sequential(other), path)
