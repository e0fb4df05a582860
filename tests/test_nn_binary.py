# SPDX-License-Identifier: Apache-2.0
"""BinaryLinear and its packed form: equal bit for bit where activations are whole numbers; drop-in for nn.Linear."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig
from bitmill.binarize import method, method_names, set_epoch
from bitmill.nn import BinaryLinear, PackedBinaryLinear
from bitmill.ops._library import has_compiled_kernel
from problems import LAYOUTS, assert_same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
K, N = 200, 19  # two groups of 128 columns and two tiles, neither full

INTEGER = (
    *(BinaryConfig(m) for m in method_names()),
    *(BinaryConfig(m, zero="plus") for m in method_names() if method(m).act_bits[0] == 1),
    BinaryConfig("bit", signed=False),
    *(BinaryConfig("bit", act_bits=bits, signed=signed) for bits in (2, 4) for signed in (True, False)),
    *(BinaryConfig("tbt", act_bits=a, weight_bits=w, signed=a < 8) for a in (1, 2, 8) for w in (1, 2)),
    *(BinaryConfig("tbt", act_bits=a, signed=a == 8) for a in (2, 8)),
    *(BinaryConfig("llmqat", weight_bits=w, signed=s) for w in (1, 2) for s in (True, False)),
    *(BinaryConfig("n2uq", act_bits=a, weight_bits=w) for a, w in ((2, 1), (1, 2), (4, 3))),
    BinaryConfig("statsq", act_bits=4, weight_bits=4, signed=False),
    BinaryConfig("binarydm", act_bits=4, weight_bits=2),
    *(BinaryConfig(m, group_size=g) for m in ("bibert", "bivit", "xnor", "sign") for g in (32, 128)),
)
FLOAT = (
    *(BinaryConfig(m, act_bits=32) for m in method_names()),
    BinaryConfig("tbt", act_bits=32, weight_bits=2),
    BinaryConfig("binarydm", act_bits=32, weight_bits=2),
    BinaryConfig("statsq", act_bits=32, weight_bits=4),
    BinaryConfig("bibert", act_bits=32, group_size=32),
    BinaryConfig("xnor", act_bits=32, group_size=128),
)
INT8 = (
    *(BinaryConfig(m, act_bits=32, activations="int8") for m in ("bibert", "bit", "bivit")),
    BinaryConfig("bibert", act_bits=32, activations="int8", group_size=128),
)
CONFIGS = tuple(dict.fromkeys(INTEGER + FLOAT + INT8))


def name(config: BinaryConfig) -> str:
    fields = config.to_dict()
    default = BinaryConfig().to_dict()
    changes = [f"{key}={value}" for key, value in fields.items() if key != "method" and value != default[key]]
    return "-".join((config.method, *changes))


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name)
# One of each graph: zero="plus", more planes, codes or groups of the same kind change a constant only.
graphs = {
    (
        c.method,
        min(c.act_bits, 2),
        c.act_bits == 32,
        c.weight_rule.levels,
        c.signed,
        c.activations,
        c.group_size is None,
    ): c
    for c in CONFIGS
    if c.zero == "torch" and c.group_size in (None, 128)
}
every_graph = pytest.mark.parametrize("config", graphs.values(), ids=name)
every_method = pytest.mark.parametrize("config", [BinaryConfig(m) for m in method_names()], ids=name)


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with exact zeros among them."""
    return (torch.randn(shape) * (torch.rand(shape) < 0.9)).to(dtype)


def trained(config: BinaryConfig, k: int = K, n: int = N, bias: bool = True, dtype: torch.dtype = torch.float32):
    """A layer in eval mode whose learned parts are not where they start."""
    layer = BinaryLinear(k, n, bias, config, dtype=dtype)
    layer(inputs(8, k, dtype=dtype))
    with torch.no_grad():
        if layer.shift is not None:
            layer.shift.normal_(0, 0.1)
        if layer.weight_scale is not None:
            layer.weight_scale.mul_(1.5)
        if layer.widths is not None:
            layer.widths.copy_(torch.rand_like(layer.widths).float() + 0.1)
            layer.start.fill_(-1.0)
            layer.in_scale.fill_(0.75)
    set_epoch(layer, 29, 30)  # the packed form's gradient is that of the last epoch
    return layer.eval()


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == want.dtype
    if got.dtype != torch.float32:
        tolerance = max(tolerance, 2 * torch.finfo(got.dtype).eps)
    limit = tolerance * max(want.abs().max().item(), 1e-2) if want.numel() else 0.0  # alpha's gradient is a long sum
    torch.testing.assert_close(got, want, rtol=0, atol=limit)


def assert_agree(got: Tensor, want: Tensor, config: BinaryConfig, what: str = "") -> None:
    """The promise of training against packed form: every bit with integer activations, else the order of summation."""
    if config.act_bits != 32 or config.activations == "int8":
        assert_same_bits(got, want, what)
    else:
        assert_close(got, want)


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


def train_step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one batch, for x and for every parameter."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def check_compiled(layer: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = inputs(6, K)
    for got, want in zip(train_step(compiled, x), train_step(plain, x), strict=True):
        assert_close(got, want)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (6, 11):
            x = inputs(batch, K)
            for got, want in zip(train_step(compiled, x), train_step(plain, x), strict=True):
                assert_close(got, want)


@every_graph
def test_layers_compile_without_graph_break_or_recompile(config: BinaryConfig) -> None:
    layer = trained(config)
    check_compiled(layer.train(), "aot_eager")
    check_compiled(layer.eval().pack(), "aot_eager")


@pytest.mark.parametrize("config", [BinaryConfig("xnor", group_size=32), BinaryConfig("bit")], ids=name)
def test_layers_compile_with_inductor(config: BinaryConfig) -> None:
    layer = trained(config)
    check_compiled(layer.train(), "inductor")
    check_compiled(layer.eval().pack(), "inductor")


def test_compiled_inference_does_not_recompile() -> None:
    torch._dynamo.reset()
    packed = trained(BinaryConfig()).pack()
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        assert_same_bits(compiled(x := inputs(4, K)), packed(x))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_bits(compiled(x := inputs(9, K)), packed(x))


@every_graph
def test_layers_export(config: BinaryConfig) -> None:
    layer = trained(config)
    for module in (layer, layer.pack()):
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(module, (inputs(4, K),), dynamic_shapes=({0: batch},))
        for m in (4, 9):
            x = inputs(m, K)
            assert_agree(program.module()(x), module(x), config)
    calls = [node.target for node in program.graph.nodes if "bitmill" in str(node.target)]
    planes = config.weight_rule.planes if module.kernel == "binary_weight_linear" else 1
    assert [str(call).split(".")[1] for call in calls] == [module.kernel] * planes, "the op stays one node"


@every_config
def test_copies_and_state(config: BinaryConfig) -> None:
    layer = trained(config)
    packed = layer.pack()
    x = inputs(5, K)
    for module in (layer, packed):
        want = module(x)
        assert_same_bits(copy.deepcopy(module)(x), want)
        assert_same_bits(pickle.loads(pickle.dumps(module))(x), want)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        for assign, device in ((True, "meta"), (False, "cpu")):
            if module is layer:
                fresh = BinaryLinear(K, N, config=config, device=device)
            else:
                fresh = PackedBinaryLinear(**packed.arguments(), config=config, device=device)
            fresh.load_state_dict(state, assign=assign)
            assert fresh.state_dict().keys() == state.keys()
            assert_same_bits(fresh.eval()(x), want)


@every_config
def test_meta_layers_answer_the_shape(config: BinaryConfig) -> None:
    x = torch.randn(2, 3, K, device="meta", dtype=torch.bfloat16)
    for cls in (BinaryLinear, PackedBinaryLinear):
        y = cls(K, N, config=config, device="meta")(x)
        assert y.is_meta and y.shape == (2, 3, N) and y.dtype == torch.bfloat16


def test_meta_layers_can_be_filled_in_place() -> None:
    packed = trained(BinaryConfig()).pack()
    empty = PackedBinaryLinear(**packed.arguments(), device="meta").to_empty(device="cpu")
    empty.load_state_dict(packed.state_dict())
    assert_same_bits(empty(x := inputs(3, K)), packed(x))


@every_config
def test_from_linear_shares_parameters_and_leaves_the_random_state(config: BinaryConfig) -> None:
    linear = nn.Linear(K, N).eval()
    state = torch.get_rng_state()
    layer = BinaryLinear.from_linear(linear, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert all(t.device == linear.weight.device for t in (*layer.parameters(), *layer.buffers()))
    if layer.alpha is None:  # which a training batch sets
        layer.pack()
    assert torch.equal(torch.get_rng_state(), state)
    assert BinaryLinear.from_linear(nn.Linear(K, N, bias=False), config).bias is None


def test_from_linear_keeps_dtype_and_requires_grad() -> None:
    linear = nn.Linear(K, N).bfloat16()
    linear.weight.requires_grad_(False)
    for config in (BinaryConfig("bit"), BinaryConfig("bivit_pws")):
        layer = BinaryLinear.from_linear(linear, config)
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert not layer.weight.requires_grad


def test_from_linear_refuses_a_subclass() -> None:
    class Other(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"BinaryLinear: linear must be a torch.nn.Linear, got Other"):
        BinaryLinear.from_linear(Other(3, 4))


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


def test_alpha_is_set_by_the_first_training_batch_only() -> None:
    layer = BinaryLinear(K, N, config=BinaryConfig("bit"))
    x = inputs(8, K)
    want = 2 * x.abs().mean()
    layer.eval()
    y = layer(x)
    assert layer.alpha.item() == 1 and not layer.alpha_ready, "eval mode sets nothing"
    layer.train()
    layer(inputs(0, K))
    assert layer.alpha.item() == 1 and not layer.alpha_ready, "an empty batch sets nothing"
    assert_same_bits(layer(x).detach(), y.detach(), "eval used the step that the first batch then set")
    torch.testing.assert_close(layer.alpha.detach(), want)
    layer(x * 5)
    torch.testing.assert_close(layer.alpha.detach(), want)
    with torch.no_grad():
        layer.alpha.fill_(1.0)
    layer(x)
    assert layer.alpha.item() == 1, "a step that training moved to exactly 1 stays"
    fresh = BinaryLinear(K, N, config=BinaryConfig("bit"))
    fresh.load_state_dict(layer.state_dict())
    fresh(x * 3)
    assert fresh.alpha.item() == 1, "the state carries that the step is set"


def test_alpha_must_be_set_to_pack() -> None:
    layer = BinaryLinear(K, N, config=BinaryConfig("bit"))
    with pytest.raises(ValueError, match="alpha is not set, so it cannot be packed; run one batch"):
        layer.pack()
    BinaryLinear(K, N, config=BinaryConfig("bit", act_bits=32)).pack()


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


@every_method
@pytest.mark.parametrize("group_size", [None, 32])
def test_constant_rows_and_scattered_zeros_pack_exactly(config: BinaryConfig, group_size: int | None) -> None:
    if group_size:
        try:
            config = BinaryConfig(config.method, group_size=group_size)
        except ValueError:
            pytest.skip("this method has no groups")
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


@pytest.mark.parametrize("x", [torch.randn(4, K - 1), torch.randn(4, K, 1), torch.randn(()), torch.randn(0)], ids=str)
def test_wrong_width_is_one_clear_error(x: Tensor) -> None:
    layer = trained(BinaryConfig())
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


def test_config_of_another_layer_is_refused() -> None:
    from bitmill import FP4Config

    with pytest.raises(ValueError, match="BinaryLinear: config must be a BinaryConfig, got FP4Config"):
        BinaryLinear(3, 4, config=FP4Config())


@every_config
def test_dequantize_is_the_linear_of_the_binarised_weight(config: BinaryConfig) -> None:
    layer = trained(config)
    x = inputs(5, K)
    want, got = layer.dequantize(), layer.pack().dequantize()
    assert type(want) is type(got) is nn.Linear
    assert_close(got.weight.detach(), want.weight.detach())
    if config.act_bits == 32:
        assert_close(want(x).detach(), layer(x).detach(), 0.05 if config.activations == "int8" else 1e-5)


@every_config
def test_packed_is_small_and_owns_its_state(config: BinaryConfig) -> None:
    layer = trained(config)
    packed = layer.pack()
    assert not list(packed.parameters())
    assert packed.weight.numel() == config.weight_rule.planes * 2 * 16 * 7, "a bit a weight and plane, in whole tiles"
    x = inputs(5, K)
    want = packed(x)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.zero_()
    assert_same_bits(packed(x), want, "the training form's tensors are not shared")
    assert str(N) in repr(packed) and config.method in repr(packed)


def test_validate_finds_bits_past_the_edge() -> None:
    packed = trained(BinaryConfig()).pack()
    packed.validate()
    for place in ((0, 6, 0), (1, 0, 3)):  # columns 200 ... 223, and row 19
        broken = copy.deepcopy(packed)
        broken.weight[place] |= -(1 << 31) if place[1] == 6 else 1
        with pytest.raises(ValueError, match="weight: bits past the last row or column must be 0, got 1"):
            broken.validate()
