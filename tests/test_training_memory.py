# SPDX-License-Identifier: Apache-2.0
"""What a training step keeps: a binary BERT layer against the plain straight-through version, and equal gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bitmill import BinaryConfig, binarize
from bitmill.nn import BinaryLinear

BATCH, TOKENS, WIDTH, HEADS = 16, 128, 768, 12


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those made inside."""

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in outside}
        self.live = self.peak = 0

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out


class Clip(torch.autograd.Function):
    """Any value; the gradient passes where |x| <= 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1), None


class PlainLinear(nn.Linear):
    """BiBERT's linear layer, written with autograd and float products."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(-1, keepdim=True)
        scale = self.weight.detach().abs().mean(1, keepdim=True)
        weight = Clip.apply(centred, scale * torch.sign(centred.detach()))
        return functional.linear(Clip.apply(x, torch.sign(x.detach())), weight, self.bias)


class OpenSign(torch.autograd.Function):
    """sgn or [x > 0]; the gradient passes where |x| < 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_bool: bool) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float() if to_bool else torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1), None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (OpenSign.apply(t, False) for t in (q, k, v))
    return OpenSign.apply(q @ k.mT / q.shape[-1] ** 0.5 + mask, True) @ v


class Layer(nn.Module):
    """A BERT layer with the linears and the attention given."""

    def __init__(self, linear: Callable[[int, int], nn.Module], attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = linear(WIDTH, WIDTH), linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = attention

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in self.qkv)
        return self.out(self.attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norms[0](x + self.attend(x, mask))
        return self.norms[1](x + self.down(functional.gelu(self.up(x))))


def training_step(layer: nn.Module, x: Tensor, upstream: Tensor, *rest: Tensor) -> tuple[int, list[Tensor]]:
    """Peak bytes above parameters and inputs, and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    with PeakMemory([x, upstream, *rest, *layer.parameters()]) as memory:
        layer(x, *rest).backward(upstream)
    return memory.peak, [x.grad, *(p.grad for p in layer.parameters())]


def test_a_training_step_of_a_binary_bert_layer_takes_at_most_half_the_memory() -> None:
    plain = Layer(PlainLinear, plain_attention)
    light = Layer(lambda k, n: BinaryLinear(k, n, config=BinaryConfig("bibert")), binarize.bool_attention)
    light.load_state_dict(plain.state_dict())
    x, upstream = torch.randn(2, BATCH, TOKENS, WIDTH)
    mask = torch.zeros(BATCH, 1, 1, TOKENS)
    mask[:, ..., -20:] = -10000.0
    plain_peak, plain_gradients = training_step(plain, x, upstream, mask)
    light_peak, gradients = training_step(light, x, upstream, mask)
    assert light_peak <= plain_peak / 2, f"{light_peak / 2**20:.0f} MiB, plain {plain_peak / 2**20:.0f} MiB"
    for got, want in zip(gradients, plain_gradients, strict=True):  # the forward's roundings may turn a few signs
        assert (got - want).norm() <= 1e-2 * want.norm()


def test_gradients_of_a_linear_layer_are_those_of_float_products_bit_for_bit() -> None:
    plain, light = PlainLinear(70, 33), BinaryLinear(70, 33, config=BinaryConfig("bibert"))
    with torch.no_grad():
        plain.weight.mul_(12)  # so that some lie outside the window
    light.load_state_dict(plain.state_dict())
    x, upstream = torch.randn(3, 5, 70), torch.randn(3, 5, 33)
    x[0, 0, :3] = torch.tensor([0.0, 1.0, -1.0])
    _, want = training_step(plain, x, upstream)
    _, got = training_step(light, x, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_attention_are_those_of_float_products_bit_for_bit() -> None:
    q, k, v, upstream = torch.randn(4, 2, 3, 9, 40)
    mask = torch.zeros(2, 1, 1, 9)
    mask[1, ..., 4:] = -10000.0
    gradients = []
    for attention in (plain_attention, binarize.bool_attention):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        attention(*leaves, mask).backward(upstream)
        gradients.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
