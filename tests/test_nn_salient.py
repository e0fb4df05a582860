# SPDX-License-Identifier: Apache-2.0
"""SalientLinear and its packed form, and the rules by which a weight becomes partially binary."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bitmill.config import BinaryConfig, SalientConfig
from bitmill.nn import PackedSalientLinear, SalientLinear
from bitmill.ops import int8_fake_quant
from bitmill.ops._groups import columns_of_groups
from bitmill.ops._salient_encoding import decode
from bitmill.ops.salient_scatter import (
    binary_statistics,
    salient_mask,
)
from salient_inputs import CONFIGS, configs, layer_of


def test_salient_linear_keeps_the_parameters() -> None:
    linear = nn.Linear(70, 19).eval()
    layer = SalientLinear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.mask.dtype == torch.bool and torch.equal(layer.mask, salient_mask(linear.weight, 0.1))
    assert set(layer.state_dict()) == {"weight", "bias", "mask", "value_scale", "value_zero"}
    state = {name: t.clone() for name, t in layer.named_buffers()}
    with torch.no_grad():
        linear.weight.mul_(-torch.rand_like(linear.weight))
    layer(torch.randn(2, 70))
    assert all(torch.equal(t, state[name]) for name, t in layer.named_buffers())


def test_salient_linear_takes_a_mask() -> None:
    linear, mask = nn.Linear(70, 19), torch.rand(19, 70) < 0.2
    layer = SalientLinear.from_linear(linear, SalientConfig(metric="hessian"), mask)
    kept = mask.clone()
    mask.logical_not_()
    assert torch.equal(layer.mask, kept) and torch.equal(layer.pack().mask(), kept)
    for wrong in (mask[1:], mask.float()):
        with pytest.raises(ValueError, match=r"mask must be bool \[19, 70\], got (bool|float32) \[1"):
            SalientLinear.from_linear(linear, SalientConfig(), wrong)


def test_salient_linear_built_directly_has_a_mask() -> None:
    layer = SalientLinear(70, 19, config=SalientConfig(fraction=0.25))
    assert int(layer.mask.sum()) == layer.weight.numel() - int(0.75 * layer.weight.numel()) - 1
    with pytest.raises(ValueError, match="SalientConfig"):
        SalientLinear(4, 4, config=BinaryConfig())
    with pytest.raises(ValueError, match=r"torch\.nn\.Linear"):
        SalientLinear.from_linear(layer)
    with pytest.raises(ValueError, match=r"config\.metric must be 'magnitude' or .* got 'hessian'; give .* pb_llm_qat"):
        SalientLinear(4, 4, config=SalientConfig(metric="hessian"))


@configs
def test_salient_weight_follows_the_rules(config: SalientConfig) -> None:
    layer = layer_of(config)
    weight, mask, w = layer.quantised_weight(), layer.mask, layer.weight.detach()
    if config.bits == 16:
        assert torch.equal(weight[mask], w.half().float()[mask])
    else:
        step = (w.amax(1).clamp_min(0) - w.amin(1).clamp_max(0)) / (2**config.bits - 1)
        assert ((weight - w).abs() <= 0.501 * step.unsqueeze(1))[mask].all()
    if config.granularity == "layer":
        alpha, mu = binary_statistics(w.view(1, -1), mask.view(1, -1), 0, config.scale, config.centre)
        alpha, mu = (None if t is None else t.expand(w.shape[0], 1) for t in (alpha, mu))
    else:
        alpha, mu = binary_statistics(w, mask, config.group_size or 0, config.scale, config.centre)
    for r in range(w.shape[0]):
        for c in range(w.shape[1]):
            if not mask[r, c]:
                g = c // config.group_size if config.group_size else 0
                m = 0.0 if mu is None else mu[r, g]
                assert weight[r, c] == m + (alpha[r, g] if w[r, c] - m >= 0 else -alpha[r, g])


@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_salient_linear_gradients(config: SalientConfig, dtype: torch.dtype) -> None:
    layer = layer_of(config)
    with torch.no_grad():
        layer.weight[:, ::9] += 1.5  # outside of the windows
    layer.to(dtype)
    x = torch.randn(2, 3, 70, dtype=dtype, requires_grad=True)
    out = layer(x)
    g = torch.randn_like(out)
    out.backward(g)
    rows = x.detach().float().flatten(0, 1)
    expected = g.float().flatten(0, 1).T @ (int8_fake_quant(rows) if config.activations == "int8" else rows)
    got, scales, w = layer.weight.grad, layer.scales(), layer.weight.detach().float()
    centred = w - (0 if scales.mu is None else columns_of_groups(scales.mu, 70, config.group_size))
    window = {"identity": 1.0, "clip": (centred.abs() <= 1).float(), "ede": 1 - torch.tanh(0.1 * centred) ** 2}
    expected = expected * columns_of_groups(scales.alpha, 70, config.group_size) * window[config.surrogate]
    assert got is not None and got.dtype == dtype
    assert (got[layer.mask] == 0).all()
    torch.testing.assert_close(got[~layer.mask], expected.to(dtype)[~layer.mask])
    torch.testing.assert_close(x.grad, (g.float() @ layer.quantised_weight().detach()).to(dtype))
    torch.testing.assert_close(layer.bias.grad, g.float().sum((0, 1)).to(dtype))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_salient_weights_stay_where_they_are_while_training(bits: int) -> None:
    layer = layer_of(SalientConfig(fraction=0.2, bits=bits))
    frozen = layer.quantised_weight()[layer.mask].detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), 0.02, weight_decay=0.0)
    x = torch.randn(64, 70)
    target = x @ torch.randn(70, 19)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # Binarised weights have left the range of the codes, which does not follow them.
    assert (layer.weight.abs().amax(1) > layer.weight.abs().masked_fill(~layer.mask, 0).amax(1)).all()
    assert torch.equal(layer.quantised_weight()[layer.mask], frozen)
    packed = layer.pack().dequantize().weight
    assert torch.equal(packed[layer.mask], frozen) and torch.equal(packed, layer.quantised_weight())


def test_scales_of_codes_keep_their_dtype() -> None:
    layer = layer_of(SalientConfig())
    scale, zero = layer.value_scale.clone(), layer.value_zero.clone()
    moved = copy.deepcopy(layer).bfloat16().half()
    assert moved.weight.dtype == torch.float16
    assert torch.equal(moved.value_scale, scale) and torch.equal(moved.value_zero, zero)
    assert layer.to("meta").value_scale.is_meta


@configs
@pytest.mark.parametrize("bias", [True, False])
def test_pack_keeps_weight_and_output(config: SalientConfig, bias: bool) -> None:
    layer = layer_of(config, bias=bias).eval()
    packed = layer.pack()
    assert not packed.training and not list(packed.parameters())
    assert torch.equal(packed.dequantize().weight, layer.quantised_weight())
    assert torch.equal(packed.dequantize().weight, layer.dequantize().weight)
    encoded = packed.index, packed.value, packed.start
    assert torch.equal(decode("test", encoded, 19, 70, config.bits)[0], layer.mask)
    assert packed.weight_shape() == (19, 70)
    packed.validate()
    for shape in ((70,), (0, 70), (3, 70), (2, 3, 70), (2, 1, 2, 70)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape, dtype=dtype)
            a, b = packed(x), layer(x)
            assert a.dtype == b.dtype == dtype and a.shape == b.shape == (*shape[:-1], 19)
            atol, rtol = (2e-6, 1e-5) if dtype == torch.float32 else (1e-2, 1e-2)
            torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("k", [1, 7, 33, 63, 100, 197, 601])
def test_packed_forward_is_the_product_with_the_dequantised_weight(k: int, bits: int) -> None:
    n = 37
    some = torch.rand(n, k) < 0.2
    full, empty = some.clone(), torch.ones_like(some)
    full[5], empty[5] = True, False
    for i, mask in enumerate((torch.zeros_like(some), torch.ones_like(some), some, full, empty, some[:1].expand(n, k))):
        config = SalientConfig(bits=bits, group_size=(None, 32)[i % 2], structure=("element", "column")[i == 5])
        packed = SalientLinear.from_linear(nn.Linear(k, n, bias=False), config, mask).pack()
        assert torch.equal(packed.mask(), mask)
        for m in (1, 3, 50):
            x = torch.randn(m, k)
            want = x.double() @ packed.dequantize().weight.double().T
            assert (packed(x) - want).abs().max() <= 1e-5 * want.abs().max(), (i, m)


def test_pack_of_extreme_fractions() -> None:
    nothing, everything = (layer_of(SalientConfig(fraction=f)).pack() for f in (0.0, 1.0))
    assert nothing.value.numel() == 0 and nothing.index.numel() == 0 and not nothing.start.any()
    assert everything.value.numel() == 19 * 70 and not everything.weight.any() and int(everything.start[-1]) == 1330


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pack_of_a_low_precision_layer(dtype: torch.dtype) -> None:
    for config in CONFIGS:
        layer = layer_of(config).to(dtype)
        packed = layer.pack()
        assert packed.alpha.dtype == torch.float32
        assert torch.equal(packed.dequantize().weight, layer.quantised_weight())
        assert layer.dequantize().weight.dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pack_refuses_what_is_not_finite(value: float) -> None:
    for config in CONFIGS:
        layer = layer_of(config)
        with torch.no_grad():
            layer.weight[3, 5] = value
        with pytest.raises(ValueError, match="finite"):
            layer.pack()


@pytest.mark.parametrize("config,value", [(SalientConfig(bits=16), 1e5), (SalientConfig(), 3e38)])
def test_pack_refuses_what_is_too_large(config: SalientConfig, value: float) -> None:
    linear = nn.Linear(70, 19)
    with torch.no_grad():
        linear.weight[3, 5], linear.weight[3, 6] = value, -value
    with pytest.raises(ValueError, match="small enough"):
        PackedSalientLinear.from_linear(linear, config)


@configs
def test_layers_survive_copy_pickle_and_state_dict(config: SalientConfig) -> None:
    layer, x = layer_of(config), torch.randn(3, 70)
    packed = layer.pack()
    for module in (layer, packed):
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        state = torch.load(file)
        if isinstance(module, PackedSalientLinear):
            twin = PackedSalientLinear(**module.arguments(), config=config)
            on_meta = PackedSalientLinear(**module.arguments(), config=config, device="meta")
        else:
            twin, on_meta = (SalientLinear(70, 19, config=config, device=device) for device in ("cpu", "meta"))
            assert on_meta.mask.is_meta
        assert all(b.dtype == state[name].dtype for name, b in twin.state_dict().items())
        twin.load_state_dict(state)
        on_meta.load_state_dict(state, assign=True)
        assert torch.equal(twin(x), module(x)) and torch.equal(on_meta(x), module(x))


@pytest.mark.parametrize("k,n,bits", [(33, 1, 8), (70, 19, 16), (40, 2, 8)])
def test_compiled_weight_equals_the_weight(k: int, n: int, bits: int) -> None:
    layer = layer_of(SalientConfig(fraction=0.3, bits=bits, group_size=32), k, n)
    compiled = torch.compile(layer.quantised_weight, fullgraph=True)
    torch.testing.assert_close(compiled(), layer.quantised_weight(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[3]], ids=["8", "16", "uncentred"])
def test_layers_compile_once(config: SalientConfig) -> None:
    layer = layer_of(config)
    for module in (layer, layer.pack()):
        torch._dynamo.reset()
        compiled, x = torch.compile(module, fullgraph=True), torch.randn(3, 70, requires_grad=True)
        expected = module(x)
        torch.testing.assert_close(compiled(x), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(x)
        wanted = (x, layer.weight) if module is layer else (x,)
        got, grads = (torch.autograd.grad(y.sum(), wanted) for y in (out, expected))
        torch.testing.assert_close(got, grads)


def test_layers_export() -> None:
    for config in CONFIGS[:2]:
        layer, x = layer_of(config).eval(), torch.randn(3, 70)
        for module in (layer, layer.pack()):
            shapes = ({0: torch.export.Dim("batch")},)
            exported = torch.export.export(module, (x,), dynamic_shapes=shapes).module()
            for m in (3, 8):
                x = torch.randn(m, 70)
                torch.testing.assert_close(exported(x), module(x))


def test_layers_under_autocast() -> None:
    layer, x = layer_of(SalientConfig()), torch.randn(3, 70)
    for module in (layer, layer.pack()):
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
            chained = module(nn.functional.linear(x, torch.eye(70)))
        assert torch.equal(out, expected) and chained.dtype == torch.bfloat16


@configs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_layer_survives_a_change_of_dtype(config: SalientConfig, dtype: torch.dtype) -> None:
    packed = layer_of(config).pack()
    x = torch.randn(4, 70)
    expected = packed(x)
    moved = copy.deepcopy(packed).to(dtype)
    out = moved(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() <= 0.03 * expected.norm()
    moved.validate()
    assert moved.float().dequantize().weight.shape == (19, 70)


def test_layers_name_a_wrong_width() -> None:
    layer = layer_of(SalientConfig())
    for module in (layer, layer.pack()):
        for x in (torch.randn(3, 71), torch.tensor(1.0)):
            with pytest.raises(ValueError, match="in_features = 70"):
                module(x)


@pytest.mark.parametrize("k,n", [(1, 1), (0, 3), (3, 0), (32, 16), (65, 33)])
def test_layers_of_odd_sizes(k: int, n: int) -> None:
    layer = SalientLinear(k, n, config=SalientConfig(fraction=0.5))
    packed, x = layer.pack(), torch.randn(2, k)
    packed.validate()
    torch.testing.assert_close(packed(x), layer(x))
    assert torch.equal(packed.dequantize().weight, layer.quantised_weight())
