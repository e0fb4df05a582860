# SPDX-License-Identifier: Apache-2.0
"""BinaryLinear and its packed form: equal bit for bit where activations are whole numbers; drop-in for nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig
from bitmill.binarize import method_names, set_epoch
from bitmill.nn import BinaryLinear
from bitmill.ops._library import has_compiled_kernel
from nn_binary_inputs import FLOATS, K, N, assert_agree, assert_close, every_config, every_method, inputs, name, trained
from problems import LAYOUTS, assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not has_compiled_kernel("binary_weight_linear"), reason="the default kernel sums as torch does")
@pytest.mark.parametrize("group_size", [None, 32])
def test_float_activations_are_summed_alike_in_training_and_packed(group_size: int | None) -> None:
    layer = trained(BinaryConfig("bibert", act_bits=32, group_size=group_size))
    for m in (1, 3, 40):
        x = inputs(m, K)
        assert_same_bits(layer.pack()(x), layer(x))


def gradient(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    layer(x).backward(g)
    return x.grad


@every_config
@pytest.mark.parametrize("bias", [False, True])
def test_packed_equals_training_form(config: BinaryConfig, bias: bool) -> None:
    layer = trained(config, bias=bias)
    packed = layer.pack()
    for dtype in FLOATS:
        for shape in ((7, K), (K,), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)):
            x = inputs(*shape, dtype=dtype)
            want, got = layer(x), packed(x)
            assert got.dtype == dtype and got.shape == (*shape[:-1], N)
            assert_agree(got, want, config, f"{shape} {dtype}")


@every_config
def test_packed_gradient_equals_training_gradient(config: BinaryConfig) -> None:
    if config.method == "react_bibench" and config.act_bits == 1:
        pytest.skip("its shift moves the window of the training gradient only; the packed form does not hold it")
    layer = trained(config)
    packed = layer.pack()
    for dtype in FLOATS:
        x, g = inputs(2, 5, K, dtype=dtype) * 2, torch.randn(2, 5, N).to(dtype)
        got, want = gradient(packed, x, g), gradient(layer, x, g)
        assert_close(got, want)
        assert torch.equal(got == 0, want == 0), "the window of the gradient is the same"


@every_config
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_layers_of_16_bit_floats(config: BinaryConfig, dtype: torch.dtype) -> None:
    """The latent weight in a 16-bit float: its packed form agrees for every input dtype; and .half() and .bfloat16()
    leave a packed layer as it is: its dtypes are its format.
    """
    layer = trained(config, dtype=dtype)
    packed = layer.pack()
    for x in (inputs(5, K, dtype=dtype), inputs(5, K)):
        assert_agree(packed(x), layer(x), config)
    x = inputs(5, K)
    moved = copy.deepcopy(packed).to(dtype)
    assert moved.weight.dtype == torch.int32 and moved.scale.dtype == torch.float32
    assert_same_bits(moved(x), packed(x))


@pytest.mark.parametrize(
    "config", [BinaryConfig(), BinaryConfig("bit", act_bits=4), BinaryConfig("sign", 32)], ids=name
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_any_memory_layout(config: BinaryConfig, layout: str) -> None:
    layer = trained(config)
    packed = layer.pack()
    x = inputs(6, K)
    assert_same_bits(packed(LAYOUTS[layout](x)), packed(x))
    assert_agree(layer(LAYOUTS[layout](x)), layer(x), config)
    assert_same_bits(packed(x[:1].expand(6, K)), packed(x[:1].repeat(6, 1)))


@every_config
def test_autocast_changes_nothing(config: BinaryConfig) -> None:
    """The output dtype is the input's, the integers stay exact, and gradients taken under autocast are the same."""
    layer = trained(config)
    for module in (layer, layer.pack()):
        for dtype in (torch.float32, torch.bfloat16):
            x, g = inputs(5, K, dtype=dtype), torch.randn(5, N).to(dtype)
            want = module(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert_same_bits(module(x), want)
                if config.act_bits != 32:
                    inside = gradient(module, x, g)
            if config.act_bits != 32:
                assert_same_bits(inside, gradient(module, x, g))


@pytest.mark.parametrize("method", ["bibert", "bnn", "bit", "react"])
def test_second_derivatives(method: str) -> None:
    layer = BinaryLinear(70, 30, config=BinaryConfig(method))
    layer(torch.randn(9, 70))
    found = []
    for module in (layer.eval(), layer.pack()):
        torch.manual_seed(1)
        x = torch.randn(9, 70, requires_grad=True)
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)
    assert found[0].abs().sum() > 0


def test_autocast_does_not_change_weight_gradients() -> None:
    layer, x, g = trained(BinaryConfig()), inputs(5, K), torch.randn(5, N)
    answers = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(x).backward(g)
        answers.append((layer.weight.grad.clone(), layer.bias.grad.clone()))
    for a, b in zip(*answers, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("bit", {"shift", "alpha"}),
        ("bivit_pws", {"weight_scale"}),
        ("recu", {"weight_scale"}),
        ("n2uq", {"widths", "start", "in_scale", "out_scale"}),
        ("binarydm", {"weight_scale", "alpha"}),
        ("bibert", set()),
        ("xnor", set()),
    ],
)
def test_added_parameters_are_trained(name: str, added: set[str]) -> None:
    layer = BinaryLinear.from_linear(nn.Linear(K, N), BinaryConfig(name))
    assert {key for key, _ in layer.named_parameters()} == {"weight", "bias"} | added
    layer(inputs(8, K))
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(inputs(8, K)).square().sum().backward()
    optimizer.step()
    for key, p in layer.named_parameters():
        assert p.grad is not None and not torch.equal(p, before[key]), key


@every_config
def test_training_reduces_the_loss(config: BinaryConfig) -> None:
    """50 steps toward the layer of the same form that drew the targets."""
    x = torch.randn(64, 32)
    teacher = trained(config, 32, 4)
    target = teacher(x).detach()
    layer = BinaryLinear(32, 4, config=config)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(50):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.8 * losses[0], f"{losses[0]:.3g} to {losses[-1]:.3g}"


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1e-6, 1e-5, 0.3, 1.0, 1.9999999])
def test_alpha_of_any_size_packs_exactly(alpha: float, signed: bool) -> None:
    """Below its floor too, and with activations on the threshold alpha / 2 and one step beside it."""
    layer = trained(BinaryConfig("bit", signed=signed))
    with torch.no_grad():
        layer.alpha.fill_(alpha)
        layer.shift.zero_()
    half = torch.tensor(max(alpha, 1e-5)) / 2
    up, down = (torch.nextafter(half, torch.tensor(to)) for to in (9.0, -9.0))
    x = torch.stack((half, up, down, -half, torch.tensor(0.0), 3 * half, 2 * half)).repeat(30)[:K]
    assert_same_bits(layer.pack()(x), layer(x).detach())


@pytest.mark.parametrize("act_bits", [2, 4])
def test_unsigned_levels_of_an_empty_batch(act_bits: int) -> None:
    layer = trained(BinaryConfig("bit", act_bits=act_bits, signed=False))
    for module in (layer, layer.pack()):
        assert module(inputs(0, K)).shape == (0, N)


# Their scales are of the whole weight, learned, or of codes.
UNGROUPED = {"bit", "bivit_pws", "bnn", "xnorpp", "recu", "llmqat", "n2uq", "statsq", "binarydm"}
GROUPED = [BinaryConfig(m, group_size=32) for m in method_names() if m not in UNGROUPED]


@pytest.mark.parametrize("config", [*(BinaryConfig(m) for m in method_names()), *GROUPED], ids=name)
def test_constant_rows_and_scattered_zeros_pack_exactly(config: BinaryConfig) -> None:
    linear = nn.Linear(64, 20)
    with torch.no_grad():
        linear.weight[0] = 0
        linear.weight[1] = 0.25  # centred rows become 0
        linear.weight[2, :32] = 0
        linear.weight[3] = torch.tensor([-1.0, 0.0, 0.0, 1.0]).repeat(16)
        linear.weight[4] = -0.0
    layer = BinaryLinear.from_linear(linear, config)
    layer(inputs(8, 64))
    set_epoch(layer, 29, 30)
    packed = layer.eval().pack()
    zeros = bool((layer.binarized_weight().signs[3] == 0).any())
    assert packed.weight_zeros == (packed.weight_nonzero is not None) == zeros
    x = inputs(9, 64)
    assert torch.equal(packed(x), layer(x))
    assert_close(gradient(packed, x, torch.ones(9, 20)), gradient(layer, x, torch.ones(9, 20)))
    packed.validate()


def test_rows_of_zeros_alone_need_no_second_plane() -> None:
    linear = nn.Linear(64, 20)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = BinaryLinear.from_linear(linear, BinaryConfig("sign"))
    packed = layer.pack()
    assert packed.weight_nonzero is None and packed.scale[3].item() == 0
    assert torch.equal(packed(x := inputs(5, 64)), layer(x))


@every_config
@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 17), (33, 1)])
def test_layers_of_width_one(config: BinaryConfig, k: int, n: int) -> None:
    layer = trained(config, k, n)
    packed = layer.pack()
    x = inputs(4, k)
    assert torch.equal(packed(x), layer(x)) if config.act_bits != 32 else packed(x).allclose(layer(x), atol=1e-5)
    assert gradient(packed, x, torch.ones(4, n)).shape == (4, k)


@every_method
def test_one_row_without_leading_dimensions_trains(config: BinaryConfig) -> None:
    layer = BinaryLinear(K, N, config=config)
    x = inputs(K).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == (K,) and all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_refuse_to_pack(value: float) -> None:
    layer = trained(BinaryConfig())
    with torch.no_grad():
        layer.weight[3, 5] = value
    with pytest.raises(ValueError, match="BinaryLinear: weight must be finite to be packed, got NaN or infinity"):
        layer.pack()


@pytest.mark.parametrize("shape", [(4, K - 1), (4, K, 1), (), (0,)], ids=str)
def test_wrong_width_is_one_clear_error(shape: tuple[int, ...]) -> None:
    layer, x = trained(BinaryConfig()), torch.randn(shape)
    for module in (layer, layer.pack()):
        message = rf"{type(module).__name__}: the last dimension of x must be in_features = {K}, got shape \["
        with pytest.raises(ValueError, match=message):
            module(x)


def test_packed_refuses_another_dtype_or_device() -> None:
    packed = trained(BinaryConfig()).pack()
    with pytest.raises(ValueError, match="binary_linear: x must be float32, bfloat16 or float16, got float64"):
        packed(torch.randn(3, K).double())
    with pytest.raises(ValueError, match=r"binary_linear: .* must be on meta, got cpu; move the layer or its input"):
        packed(torch.randn(3, K, device="meta"))
