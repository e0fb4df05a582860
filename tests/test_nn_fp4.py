# SPDX-License-Identifier: Apache-2.0
"""FP4Linear and PackedFP4Linear: the same weight in both forms, and what a drop-in for nn.Linear must withstand."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from bitmill import ops, summary
from bitmill.config import BinaryConfig, FP4Config
from bitmill.nn.fp4 import FP4Linear, PackedFP4Linear

CONFIGS = [
    *(FP4Config(f) for f in ("e2m1", "e1m2", "e3m0")),
    *(FP4Config("mxfp4", r) for r in FP4Config.SCALE_RULES),
    FP4Config("nvfp4"),
    *(FP4Config("nf4", group_size=size) for size in (64, 16, 0)),
    FP4Config("bnb-fp4", group_size=32),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.format}-{c.scale_rule}-{c.group_size}")
KINDS = [
    *(FP4Config("e2m1"), FP4Config("mxfp4"), FP4Config("mxfp4", "even"), FP4Config("nf4")),
    *(FP4Config(f, activations="int8") for f in ("e1m2", "mxfp4", "nvfp4")),
]
FOUR_BITS = [
    *(FP4Config("e2m1", activations="e2m1"), FP4Config("e3m0", activations="e1m2")),
    *(FP4Config("e1m2", activations="e3m0"), FP4Config("nvfp4", activations="nvfp4")),
    FP4Config("mxfp4", "rceil", activations="mxfp4"),
]


def name_of(config: FP4Config) -> str:
    return f"{config.format}-{config.scale_rule}-{config.activations}"


each_kind = pytest.mark.parametrize("config", [*KINDS, *FOUR_BITS], ids=name_of)


def training_layer(config: FP4Config, n: int = 21, k: int = 77, bias: bool = True) -> FP4Linear:
    layer = FP4Linear.from_linear(nn.Linear(k, n, bias), config)
    if config.static_activations:
        layer.calibrate(torch.rand(k) * 3 + 0.1)
    return layer


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


@each_config
@pytest.mark.parametrize("bias", [True, False])
def test_training_and_packed_form_hold_the_same_weight(config: FP4Config, bias: bool) -> None:
    for n, k in ((21, 77), (16, 64), (1, 1), (33, 31)):
        layer = training_layer(config, n, k, bias).eval()
        with torch.no_grad():
            layer.weight[0, : k // 2] = 0.0
            layer.weight[-1, 0] = -0.0
        packed = layer.pack()
        packed.validate()
        assert same_bits(layer.dequantize().weight, packed.dequantize().weight)
        assert same_bits(layer.quantised_weight(), packed.dequantize().weight)
        x = torch.randn(2, 3, k)
        assert_close(packed(x), layer(x))
        assert_close(packed.dequantize()(x), layer(x))
        assert (packed.bias is None) == (not bias) and not list(packed.parameters())
        words = packed.weight.numel()
        assert words == -(-n // 16) * -(-k // 8) * 16 and packed.weight.dtype == torch.int32


def test_weight_is_the_definition() -> None:
    weight = torch.randn(5, 40)
    layer = training_layer(FP4Config("e3m0"), 5, 40)
    layer.weight.data = weight
    scale = weight.abs().amax(1, keepdim=True) / 16
    codes = ops.fp4_cast(weight / scale, "e3m0")
    assert torch.equal(layer.quantised_weight(), ops.fp4_uncast(codes, 40, "e3m0") * scale)
    blocks = FP4Linear.from_linear(layer.to_linear(weight), FP4Config("mxfp4", "even"))
    expected = ops.mxfp4_dequantize(*ops.mxfp4_quantize(weight, "even"), 40)
    assert torch.equal(blocks.quantised_weight(), expected)
    assert torch.equal(blocks.pack().scale, ops.mxfp4_quantize(weight, "even")[1])
    blocks = FP4Linear.from_linear(layer.to_linear(weight), FP4Config("nvfp4"))
    g = ops.nvfp4_global_scale(weight)
    codes, scale = ops.nvfp4_quantize(weight, g)
    assert torch.equal(blocks.quantised_weight(), ops.nvfp4_dequantize(codes, scale, 40, g))
    assert torch.equal(blocks.pack().scale, scale) and torch.equal(blocks.pack().global_scale, g)
    groups = FP4Linear.from_linear(layer.to_linear(weight), FP4Config("bnb-fp4", group_size=16))
    codes, scale = ops.codebook4_quantize(weight, "bnb-fp4", 16)
    assert torch.equal(groups.quantised_weight(), ops.codebook4_dequantize(codes, scale, "bnb-fp4", 40, 16))
    assert torch.equal(groups.pack().scale, scale)


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (FP4Config("mxfp4"), 4.25),
        (FP4Config("nvfp4"), 4.5 + 32 / (64 * 256)),
        (FP4Config("nf4"), 4.5),
        (FP4Config("nf4", group_size=128), 4.25),
        (FP4Config("bnb-fp4", group_size=0), 4.125),
    ],
    ids=lambda value: getattr(value, "format", ""),
)
def test_bits_of_a_weight(config: FP4Config, bits: float) -> None:
    model = nn.Sequential(PackedFP4Linear.from_linear(nn.Linear(256, 64), config))
    assert summary(model).bits_per_weight == bits


@each_config
def test_from_linear_keeps_the_parameters_and_they_learn(config: FP4Config) -> None:
    linear = nn.Linear(40, 8)
    layer = FP4Linear.from_linear(linear.eval(), config)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert set(layer.state_dict()) == {"weight", "bias"}
    x, upstream = torch.randn(6, 40), torch.randn(6, 8)
    layer.train()(x).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x)  # straight through, the largest weights included
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    target = torch.randn(6, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(layer(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@each_kind
def test_rows_of_zeros_and_empty_layers(config: FP4Config) -> None:
    layer = training_layer(config)
    with torch.no_grad():
        layer.weight[3] = 0.0
        layer.weight[4] = 1e-45  # its scale would underflow to 0
    assert layer.pack().dequantize().weight[3].eq(0).all()
    assert same_bits(layer.pack().dequantize().weight, layer.dequantize().weight)
    x = torch.randn(3, 77)
    assert layer(x).isfinite().all() and layer.pack()(x).isfinite().all()
    for n, k in ((0, 9), (5, 0)):
        empty = FP4Linear(k, n, config=config, device="meta").to_empty(device="cpu")
        nn.init.ones_(empty.bias)
        if config.static_activations:
            empty.calibrate(torch.ones(k))
        for form in (empty, empty.pack()):
            assert torch.equal(form(torch.randn(2, k)), torch.ones(2, n))


@each_config
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pack_refuses_what_is_not_finite(config: FP4Config, value: float) -> None:
    layer = training_layer(config)
    with torch.no_grad():
        layer.weight[2, 5] = value
    with pytest.raises(ValueError, match="FP4Linear: weight must be finite to be packed"):
        layer.pack()
    assert layer(torch.randn(77))[2].isnan() and layer(torch.randn(77))[3].isfinite()


def test_pack_refuses_a_block_scale_that_overflows() -> None:
    layer = training_layer(FP4Config("mxfp4", "even"))
    with torch.no_grad():
        layer.weight[2, 5] = 3.4e38
    with pytest.raises(ValueError, match=r"weight must be below 2\^127 for scale_rule 'even', got .* 3\.4e"):
        layer.pack()


@each_kind
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(config: FP4Config, dtype: torch.dtype) -> None:
    layer = training_layer(config).to(dtype)
    x = torch.randn(4, 77).to(dtype).requires_grad_()
    packed = layer.pack()
    out = layer(x)
    assert_close(packed(x), out)
    assert same_bits(packed.dequantize().weight.to(dtype).float(), layer.dequantize().weight.float())
    out.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == dtype
    (grad,) = torch.autograd.grad(packed(x).float().sum(), x)
    assert_close(grad, x.grad)
    moved = copy.deepcopy(packed).to(dtype)
    assert moved.scale.dtype == packed.scale.dtype
    assert torch.equal(moved(x), packed(x))
    moved.validate()
    assert moved.dequantize().weight.dtype == torch.float32


@each_kind
def test_autocast_changes_nothing(config: FP4Config) -> None:
    layer = training_layer(config)
    x = torch.randn(4, 77, requires_grad=True)
    for form in (layer, layer.pack()):
        with torch.autocast("cpu", torch.bfloat16):
            inside = form(x)
        assert torch.equal(inside, form(x)) and inside.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=form is not layer):  # torch's own backward would use bf16
            (grad,) = torch.autograd.grad(inside.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(form(x).sum(), x)[0])


@each_kind
@pytest.mark.parametrize("form", ["training", "packed"])
def test_any_shape_and_stride(config: FP4Config, form: str) -> None:
    layer = training_layer(config)
    layer = layer if form == "training" else layer.pack()
    for leading in ((), (0,), (1,), (5,), (2, 3), (2, 1, 3), (0, 4)):
        x = torch.randn(*leading, 77)
        assert layer(x).shape == (*leading, 21)
        strided = torch.stack([x, x], -1)[..., 0]
        assert_close(layer(strided), layer(x))
    with pytest.raises(ValueError, match=r"the last dimension of x must be in_features = 77, got shape \[2, 76\]"):
        layer(torch.randn(2, 76))
    with pytest.raises(ValueError, match="got shape"):
        layer(torch.tensor(1.0))


@each_kind
def test_copies(config: FP4Config) -> None:
    layer, x = training_layer(config), torch.randn(3, 77)
    for form in (layer, layer.pack()):
        for twin in (copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
            assert torch.equal(twin(x), form(x)) and twin.config == config
            assert repr(twin) == repr(form) and config.format in repr(form)
        file = io.BytesIO()
        torch.save(form.state_dict(), file)
        file.seek(0)
        fresh = type(form)(77, 21, config=config)
        fresh.load_state_dict(torch.load(file))
        assert torch.equal(fresh(x), form(x))


@each_kind
def test_packed_layer_is_built_from_its_arguments(config: FP4Config) -> None:
    packed = training_layer(config).pack()
    empty = PackedFP4Linear(**packed.arguments(), config=packed.config, device="meta")
    assert all(t.is_meta for t in empty.buffers()) and packed.weight_shape() == (21, 77)
    shapes = {name: (t.shape, t.dtype) for name, t in packed.state_dict().items()}
    assert shapes == {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()}
    empty.load_state_dict(packed.state_dict(), assign=True)
    x = torch.randn(3, 77)
    assert torch.equal(empty(x), packed(x))
    meta = packed.to("meta")
    assert meta(torch.empty(3, 77, device="meta")).shape == (3, 21)
    trained = FP4Linear(77, 21, config=config, device="meta")
    assert trained(torch.empty(3, 77, device="meta")).shape == (3, 21)


@each_kind
def test_validate_refuses_corrupt_buffers(config: FP4Config) -> None:
    def corrupt(name: str, change) -> PackedFP4Linear:
        packed = training_layer(config).pack()
        setattr(packed, name, change(getattr(packed, name)))
        return packed

    def past_the_end(tiles: Tensor) -> Tensor:
        tiles[0, -1, 0] |= 1 << 20  # column 77 of row 0
        return tiles

    def past_the_rows(tiles: Tensor) -> Tensor:
        tiles[1, 0, 5] = 1  # row 21
        return tiles

    bad_scale = {"mxfp4": 255, "nvfp4": 127}.get(config.format, torch.nan)
    for name, change, message in (
        ("weight", past_the_end, "weight: bits past the last row or column must be 0"),
        ("weight", past_the_rows, "weight: bits past the last row or column must be 0"),
        ("scale", lambda t: t[:, :0], "scale must have shape"),
        ("scale", lambda t: torch.full_like(t, bad_scale), "scale: every scale must be finite"),
        ("bias", lambda t: t[:-1], "bias must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            corrupt(name, change).validate()
    if config.static_activations:
        for name, change, message in (
            ("input_scale", lambda t: t * 0, "input_scale: it must be positive and finite, got 0"),
            ("input_scale", lambda t: t * torch.nan, "input_scale: it must be positive and finite, got nan"),
            ("input_scale", lambda t: t.view(1), r"input_scale must have shape \[\], got \[1\]"),
            ("input_shift", lambda t: t + 8, "input_shift(: every shift)? must be at most"),
        ):
            with pytest.raises(ValueError, match=message):
                corrupt(name, change).validate()


@pytest.mark.parametrize("config", FOUR_BITS, ids=name_of)
def test_four_bit_activations(config: FP4Config) -> None:
    """The layer is the product of what both sides are cast to; what saturates has no gradient."""
    layer, x = training_layer(config), (4 * torch.randn(5, 77)).requires_grad_()
    how = (config.activations, layer.input_scale, layer.input_shift, config.scale_rule)
    values = ops.fp4_activations_fake_quant(x.detach(), *how)
    want = nn.functional.linear(values, layer.dequantize().weight, layer.bias)
    packed = layer.pack()
    for form in (layer, packed):
        assert_close(form(x), want)
    assert summary(nn.Sequential(packed)).layers[0].kernel == ops._machine.kernel_of(packed.kernel)
    assert packed.kernel == ("fp4_linear" if config.activations == "e3m0" else "fp4_fp4_linear")
    layer(x).sum().backward()
    if config.static_activations:
        largest = max(ops.code_values(config.activations)) * layer.input_scale * torch.exp2(-layer.input_shift.float())
        assert torch.equal(x.grad == 0, x.abs() > largest * 1.000001) and (x.grad == 0).any()
    else:
        assert (x.grad != 0).all()
    state = set(packed.state_dict())
    packed.set_activations("float")
    assert_close(packed(x), nn.functional.linear(x, layer.dequantize().weight, layer.bias))
    assert state - set(packed.state_dict()) == ({"input_scale", "input_shift"} if config.static_activations else set())


@pytest.mark.parametrize("format", FP4Config.STATIC)
def test_calibrate(format: str) -> None:
    amax = torch.tensor([4.0, 2.0, 1.0, 0.3, 1e-9, 0.0])
    layer = FP4Linear(6, 3, config=FP4Config(activations=format))
    assert layer(torch.randn(2, 6)).isnan().all()
    with pytest.raises(ValueError, match="input_scale must be finite to be packed, got nan; call calibrate"):
        layer.pack()
    layer.calibrate(amax)
    assert layer.input_scale.item() == pytest.approx(4 / max(ops.code_values(format)))
    most = {"e1m2": 1, "e2m1": 3, "e3m0": 7}[format]
    assert layer.input_shift.tolist() == [min(shift, most) for shift in (0, 1, 2, 4, 32, 99)]
    layer.calibrate(torch.zeros(6))
    assert layer(torch.zeros(1, 6)).isfinite().all() and layer.pack()(torch.zeros(1, 6)).isfinite().all()
    for wrong in (amax[:5], amax * torch.nan, -amax):
        with pytest.raises(ValueError, match=r"amax must be finite magnitudes of shape \[6\]"):
            layer.calibrate(wrong)
    with pytest.raises(ValueError, match="activations must be one of e2m1, e1m2, e3m0 to be calibrated, got 'float'"):
        FP4Linear(6, 3).calibrate(amax)


def test_from_linear_refuses_other_modules_and_configs() -> None:
    with pytest.raises(ValueError, match=r"FP4Linear: linear must be a torch\.nn\.Linear, got Conv2d"):
        FP4Linear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="FP4Linear: config must be a FP4Config, got BinaryConfig"):
        FP4Linear.from_linear(nn.Linear(3, 3), BinaryConfig())


@pytest.mark.parametrize("config", KINDS, ids=name_of)
def test_compile_without_recompiling(config: FP4Config) -> None:
    layer = training_layer(config)
    for form in (layer, layer.pack()):
        torch._dynamo.reset()
        compiled = torch.compile(form, fullgraph=True)
        first, second = torch.randn(3, 77, requires_grad=True), torch.randn(3, 77)
        assert_close(compiled(first), form(first))
        got, expected = (torch.autograd.grad(f(first).square().sum(), first)[0] for f in (compiled, form))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert_close(compiled(second), form(second))
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert_close(compiled(second + 1), form(second + 1))


@each_kind
def test_compile_with_a_dynamic_batch_under_autocast(config: FP4Config) -> None:
    layer = training_layer(config)
    for form in (layer, layer.pack()):
        torch._dynamo.reset()
        compiled = torch.compile(form, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            for m in (2, 3, 9):
                x = torch.randn(m, 77)
                assert_close(compiled(x), form(x))


@each_kind
def test_export(config: FP4Config) -> None:
    layer = training_layer(config).eval()
    batch = {0: torch.export.Dim("batch")}
    for form in (layer, layer.pack()):
        program = torch.export.export(form, (torch.randn(4, 77),), dynamic_shapes=(batch,))
        x = torch.randn(7, 77)
        assert_close(program.module()(x), form(x))
