# SPDX-License-Identifier: Apache-2.0
"""OneBitLinear and its packed form: where they start, what they compute, how they are stored. Golden: onebit.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitmill import OneBitConfig, dequantize_, pack_, quantize_, summary
from bitmill.config import FP4Config
from bitmill.demo.model import Stories, StoriesConfig
from bitmill.nn import OneBitLinear, PackedOneBitLinear
from bitmill.nn.onebit import rank_one
from bitmill.recipes import onebit
from problems import LAYOUTS, assert_same_bits

CONFIGS = (OneBitConfig(), OneBitConfig("plus"), OneBitConfig(activations="int8"))
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.zero}-{c.activations}")


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def layer_of(config: OneBitConfig, k: int = 70, n: int = 19, bias: bool = True, zeros: bool = True) -> OneBitLinear:
    linear = nn.Linear(k, n, bias)
    if zeros:
        with torch.no_grad():
            linear.weight[torch.rand(n, k) < 0.1] = 0.0
    return OneBitLinear.from_linear(linear, config)


@pytest.mark.parametrize("n,k", [(1, 1), (1, 9), (40, 64), (96, 24)])
def test_rank_one_is_the_best_one(n: int, k: int) -> None:
    a = torch.randn(n, k).abs() * torch.rand(n, 1) ** 3 * torch.rand(k) ** 3
    for scale in (1.0, 1e-20, 1e20):
        h, g = rank_one(a * scale)
        u, s, v = torch.linalg.svd(a.double())
        best = (u[:, :1] * s[0]) @ v[:1]
        torch.testing.assert_close(torch.outer(h, g) / scale, best.float(), rtol=1e-4, atol=1e-6)
        assert (h >= 0).all() and (g >= 0).all()
        torch.testing.assert_close(h.norm(), g.norm())


def test_rank_one_of_zeros_and_of_nothing_is_zero() -> None:
    for n, k in ((3, 4), (0, 4), (3, 0)):
        h, g = rank_one(torch.zeros(n, k))
        assert h.shape == (n,) and g.shape == (k,) and not torch.outer(h, g).any()


def test_a_layer_without_data_computes_no_scales() -> None:
    """30 steps on tensors of the meta device took 0.14 s a layer of a file that was loaded."""
    with CountOps() as counted:
        layer = OneBitLinear(4096, 4096, device="meta")
    assert layer.in_scale.shape == layer.out_scale.shape == (4096,) and len(counted.names) < 30


def test_the_layer_starts_from_the_weight() -> None:
    linear = nn.Linear(70, 19).eval()
    layer = OneBitLinear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "in_scale", "out_scale"}
    dense = layer.dequantize()[0].weight
    assert torch.equal(dense.sign(), linear.weight.sign())
    plain = linear.weight.sign() * linear.weight.abs().mean(1, keepdim=True)
    assert (dense - linear.weight).norm() < (plain - linear.weight).norm()
    with pytest.raises(ValueError, match="config must be a OneBitConfig"):
        OneBitLinear(4, 4, config=FP4Config())


@configs
@pytest.mark.parametrize("bias", [True, False])
def test_packed_and_training_form_agree_bit_for_bit(config: OneBitConfig, bias: bool) -> None:
    layer = layer_of(config, bias=bias).eval()
    packed = layer.pack()
    packed.validate()
    assert (packed.weight_nonzero is None) == (config.zero == "plus") and not list(packed.parameters())
    for shape in ((70,), (0, 70), (3, 70), (2, 3, 70)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape, dtype=dtype)
            assert_same_bits(packed(x), layer(x))
    x = torch.randn(6, 70)
    for name, layout in LAYOUTS.items():
        assert torch.equal(packed(layout(x)), packed(x)), name


@configs
def test_output_is_the_formula(config: OneBitConfig) -> None:
    layer, x = layer_of(config), torch.randn(5, 70)
    signs = layer.weight.sign() if config.zero == "torch" else torch.where(layer.weight >= 0, 1.0, -1.0)
    scaled = x * layer.in_scale
    if config.activations == "int8":
        step = scaled.abs().amax(1, keepdim=True) / 127
        scaled = (scaled / step).round() * step
    z = scaled.double() @ signs.double().T * layer.out_scale
    expected = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt() + layer.bias
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_and_the_input_of_the_packed_form() -> None:
    layer, x = layer_of(OneBitConfig()), torch.randn(5, 70, requires_grad=True)
    g = torch.randn(5, 19)
    (layer(x) * g).sum().backward()
    signs = layer.weight.detach().sign().requires_grad_()
    again = [t.detach().clone().requires_grad_() for t in (x, layer.in_scale, layer.out_scale, layer.bias)]
    z = ((again[0] * again[1]) @ signs.T) * again[2]
    ((nn.functional.layer_norm(z, (19,)) + again[3]) * g).sum().backward()
    for got, want in zip((x, layer.in_scale, layer.out_scale, layer.bias), again, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)
    slope = 1.001 - torch.tanh(layer.weight.detach()) ** 2
    torch.testing.assert_close(layer.weight.grad, signs.grad * slope, rtol=1e-4, atol=1e-5)
    other = x.detach().clone().requires_grad_()
    (layer.pack()(other) * g).sum().backward()
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k,n", [(1, 1), (0, 3), (3, 0), (32, 16), (65, 33)])
def test_layers_of_odd_sizes(k: int, n: int) -> None:
    layer = OneBitLinear(k, n)
    packed, x = layer.pack(), torch.randn(2, k)
    packed.validate()
    assert_same_bits(packed(x), layer(x))
    assert torch.equal(packed.dequantize()[0].weight, layer.dequantize()[0].weight)


@configs
def test_layers_survive_copy_pickle_dtype_and_compilation(config: OneBitConfig) -> None:
    layer, x = layer_of(config), torch.randn(3, 70)
    packed = layer.pack()
    for module in (layer, packed):
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), module(x.float())) and module(x).dtype == torch.float32
    twin = PackedOneBitLinear(**packed.arguments(), config=config)
    twin.load_state_dict(packed.state_dict())
    assert torch.equal(twin(x), packed(x))
    half = copy.deepcopy(packed).bfloat16()
    assert half.in_scale.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(packed, (x,), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(torch.ones(7, 70)), packed(torch.ones(7, 70)))


def test_dequantised_layers_compute_the_same() -> None:
    for bias in (True, False):
        for config in CONFIGS[:2]:
            model = nn.Sequential(nn.Linear(70, 19, bias))
            quantize_(model, config)
            twin, x = copy.deepcopy(model), torch.randn(4, 70)
            assert pack_(twin) == ["0"]
            expected = model(x)
            for m in (model, twin):
                assert dequantize_(m) == ["0"] and [type(p) for p in m[0]] == [nn.Linear, nn.LayerNorm]
                torch.testing.assert_close(m(x), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_takes_one_bit_and_a_little() -> None:
    model = nn.Sequential(nn.Linear(1024, 512))
    quantize_(model, OneBitConfig())
    pack_(model)
    (layer,) = summary(model).layers
    assert layer.bits_per_weight == 1 + 32 * (1024 + 512) / (1024 * 512) and layer.operations == layer.macs / 2


def test_what_is_not_finite_is_refused() -> None:
    for name in ("weight", "in_scale", "out_scale"):
        layer = layer_of(OneBitConfig())
        with torch.no_grad():
            getattr(layer, name).view(-1)[3] = torch.nan
        with pytest.raises(ValueError, match="OneBitLinear: weight must be finite"):
            layer.pack()
    packed = layer_of(OneBitConfig()).pack()
    packed.out_scale[2] = torch.inf
    with pytest.raises(ValueError, match="out_scale: every scale must be finite"):
        packed.validate()
    packed.out_scale[2] = 1
    packed.weight[1, 2, 9] = 1
    with pytest.raises(ValueError, match="weight: bits past the last row or column must be 0"):
        packed.validate()
    for module in (layer_of(OneBitConfig()), layer_of(OneBitConfig()).pack()):
        with pytest.raises(ValueError, match="in_features = 70"):
            module(torch.randn(3, 71))


def test_a_language_model_is_binarised_and_learns_from_its_teacher() -> None:
    torch.manual_seed(0)
    config = StoriesConfig(dim=32, hidden=48, layers=2, heads=4, kv_heads=2, vocab=50, context=24)
    teacher, ids = Stories(config).eval(), torch.randint(50, (8, 16))
    student = copy.deepcopy(teacher)
    embedding, names = student.embedding.weight.clone(), onebit.binarize_(student)
    assert len(names) == 14 and all(type(student.get_submodule(name)) is OneBitLinear for name in names)
    assert student.layers[0].w1.weight.abs().unique().numel() == 1 and torch.equal(student.embedding.weight, embedding)

    def outputs(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden: list[torch.Tensor] = []
        handles = [layer.register_forward_hook(lambda *call: hidden.append(call[2])) for layer in model.layers]
        logits = model(ids)
        for handle in handles:
            handle.remove()
        return logits, hidden

    with torch.no_grad():
        target = outputs(teacher)
        assert onebit.distillation_loss(target[0], target[0], target[1], target[1]).abs() < 1e-6
    optimizer, losses = torch.optim.AdamW(student.parameters(), 4e-3, (0.9, 0.98)), []
    for _ in range(30):
        logits, hidden = outputs(student)
        loss = onebit.distillation_loss(logits, target[0], hidden, target[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    student.eval()
    expected = student(ids)
    pack_(student)
    assert torch.equal(student(ids), expected)
