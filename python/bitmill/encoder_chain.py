# SPDX-License-Identifier: Apache-2.0
"""Chains of whole layers of a transformer: attention, MLP, their residuals and normalisations in one op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chain import float32_mask
from .chained import Chained
from .ops import BinaryEncoder, EncoderLayerArguments, LayerNormArguments
from .unchanged import Held, Unchanged, has_hooks, held_by


class Parts(NamedTuple):
    """Of a layer: the modules whose chains are its attention and its MLP, and the normalisation of each."""

    attention: Any
    norm: Any
    mlp: Any
    last_norm: Any


class Prepared(NamedTuple):
    """The ops of layers, one for all that are alike."""

    ops: list[BinaryEncoder]
    columns: int  # of x
    most_keys: int
    unchanged: Unchanged | None = None  # whether it still holds

    def __call__(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None = None) -> Tensor:
        """x, mask and lengths as for `AttentionChain`."""
        mask = float32_mask(mask)
        for op in self.ops:
            x = op(x, mask, lengths)
        return x


class EncoderChain(nn.Module):
    """Layers of an encoder, if nothing but their chains and normalisations would be called.

    Args:
        layers: one after another, each chained; they stay the host's.
        parts: finds those of a layer; a function of a module.
        called: those of the layers that the host would call, as it does not call itself.
        norm_first: normalise what goes into attention and MLP, and not the sums.
        plain: classes that compute layer normalisation and nothing else.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        parts: Callable[[Any], Parts],
        called: Sequence[nn.Module] = (),
        norm_first: bool = False,
        plain: tuple[type[nn.LayerNorm], ...] = (nn.LayerNorm,),
    ) -> None:
        super().__init__()
        self.layers: tuple[Any, ...] = tuple(layers)
        self.called, self.parts = tuple(called), parts
        self.norm_first, self.plain = norm_first, plain
        self.prepared: Prepared | None = None

    def ready(self, x: Tensor) -> Prepared | None:
        """What computes x, rows of float32, or None if the layers have to be called."""
        columns, prepared = x.shape[-1], self.prepared
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            prepared = self.prepare(columns)
        elif prepared is None or prepared.columns != columns or not prepared.unchanged():  # type: ignore[misc]
            prepared = self.prepare(columns)
            self.prepared = prepared and prepared._replace(unchanged=self._watch())
        return prepared if prepared is not None and x.shape[-2] <= prepared.most_keys else None

    def prepare(self, columns: int) -> Prepared | None:
        """`ready` for once, for rows of so many floats."""
        layers: list[EncoderLayerArguments] = []
        most: list[int] = []
        for layer in self.layers:
            attention, norm, mlp, last_norm = self.parts(layer)
            if not all(isinstance(host, Chained) and host.holds() for host in (layer, attention, mlp)):
                return None
            first, last = layer_norm_of(norm, columns, self.plain), layer_norm_of(last_norm, columns, self.plain)
            if first is None or last is None:
                return None
            layers.append(EncoderLayerArguments(attention.chain.arguments(), first, mlp.chain.arguments(), last))
            most.append(attention.chain.most_keys)
        if any(module.training or has_hooks(module) for module in self._called()):
            return None
        alike = itertools.groupby(layers, key=EncoderLayerArguments.shared)
        ops = [BinaryEncoder(list(those), self.norm_first) for _, those in alike]
        return Prepared(ops, columns, min(most))

    def _called(self) -> list[Any]:
        """The hosts that would be called."""
        parts = ((layer, self.parts(layer)) for layer in self.layers)
        return [*self.called, *(host for layer, of in parts for host in (of.attention, of.mlp) if host is not layer)]

    def _watch(self) -> Unchanged:
        modules = self._called()
        norms: list[nn.Module] = []
        same: dict[Held, None] = {}
        numbers: dict[Held, None] = {}
        for layer in self.layers:
            attention, norm, mlp, last_norm = self.parts(layer)
            norms += norm, last_norm
            for host in (layer, attention, mlp):
                modules += host.chain.passed.modules
                same.update((held[:3], None) for held in host.chain.passed.held)
                numbers.update(dict.fromkeys(host.chain.current.numbers))
            same.update(dict.fromkeys((*attention.chain.sources(), *mlp.chain.sources())))
        same.update(dict.fromkeys(held_by(norms, "_parameters")))
        same.update(((norm, "__dict__", name), None) for norm in norms for name in ("eps", "normalized_shape"))
        return Unchanged(dict.fromkeys(modules), norms, same, numbers)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.prepared = None  # which would keep the tensors
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "prepared": None}


def layer_norm_of(norm: Any, columns: int, plain: tuple[type[nn.LayerNorm], ...]) -> LayerNormArguments | None:
    """What a normalisation of rows is, or None if it is more than that."""
    if type(norm) not in plain or has_hooks(norm) or norm.normalized_shape != (columns,):
        return None
    weight, bias = norm.weight, norm.bias
    if weight is None or bias is None or weight.dtype != torch.float32 or bias.dtype != torch.float32:
        return None
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        return None
    return LayerNormArguments(weight, bias, norm.eps)
