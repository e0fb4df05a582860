# SPDX-License-Identifier: Apache-2.0
"""Chains: the packed layers of a transformer block connected by bits.

Between two binary layers a float is made only to be turned into a bit again. A chain leaves it out: what an output of
the first layer becomes in the second is found once, by trying every dot product (`ops.bit_ranges`), and compared as an
integer from then on. Floats remain where the mathematics needs them, in residuals and normalisations. Every bit, and
every float, is the one that the layers compute one by one.

Here is what a chain is; `chained` puts them into the modules of hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .binarize.functions import ALPHA_FLOOR
from .nn import BinaryAttention, PackedBinaryLinear
from .nn._module import require_width
from .ops import (
    BitRanges,
    MlpArguments,
    SelfAttentionArguments,
    binary_matmul_bits,
    binary_matmul_floats,
    bit_ranges,
    bitpack,
)
from .ops.binary_bits import NEVER
from .ops.bitpack import binarized
from .unchanged import Held, has_hooks

READ = ("weight", "weight_nonzero", "shift")  # of a layer whose outputs become bits: the rest is in their ranges
MOST_KEYS = 4096  # of a chain whose host does not say how many there can be


class NotChained(ValueError):
    """Why a block computes layer by layer."""


class Input:
    """How a layer makes bits of its input."""

    def __init__(self, layer: PackedBinaryLinear) -> None:
        self.layer, self.levels, self.threshold = layer, layer._levels, 0.0
        if self.levels == "bool":
            self.threshold = 0.5 if layer.alpha is None else float(layer.alpha / 2)

    def level(self, x: Tensor) -> Tensor:
        return binarized(x, self.layer.shift, self.levels, self.threshold)


def chainable(layer: nn.Module, what: str) -> PackedBinaryLinear:
    """The layer, if it multiplies bits with bits to one integer an output.

    Raises:
        NotChained: if it does not.
    """
    if not isinstance(layer, PackedBinaryLinear):
        raise NotChained(f"{what} is a {type(layer).__name__}, not a PackedBinaryLinear")
    if layer.kernel != "binary_linear":
        raise NotChained(f"{what} has activations of {layer.config.act_bits} bits or weights of more than one plane")
    if layer.config.group_size:
        raise NotChained(f"{what} has a scale for every {layer.config.group_size} columns")
    if layer._row_scale:
        raise NotChained(f"{what} multiplies by the mean of its input")
    if has_hooks(layer):
        raise NotChained(f"{what} has hooks")
    return layer


def ranges_of(level: Callable[[Tensor], Tensor], n: int, k: int, levels: str, device: torch.device) -> BitRanges:
    """`ops.bit_ranges`, or NotChained with the reason why there are none."""
    try:
        return bit_ranges(level, n, k, levels, device)
    except ValueError as error:
        raise NotChained(str(error).removeprefix("bit_ranges: ")) from None


def ranges_after(layer: PackedBinaryLinear, levels: str, level: Callable[[Tensor], Tensor]) -> BitRanges:
    """What a layer's outputs become where they are read.

    Args:
        levels: of the reader.
        level: what the results z, float32 [count, n], become there.
    """
    scale, bias = layer.scale[:, 0], layer.bias

    def of_dot(dot: Tensor) -> Tensor:
        z = scale * dot
        return level(z if bias is None else z + bias)

    return ranges_of(of_dot, layer.out_features, layer.in_features, levels, scale.device)


def then(last: Callable[[Tensor], Tensor], first: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: last(first(x))


def stacked(ranges: Sequence[BitRanges]) -> BitRanges:
    """The ranges of several layers in one, [layers, 2, n] and [layers, n, count]."""
    positive = torch.stack([each.positive for each in ranges])
    if all(each.negative is None for each in ranges):
        return BitRanges(positive, None, None)
    # Where nothing is 0, -1 is all that is not +1: from one past the last to one before the first.
    rest = torch.tensor([[1], [-1]], dtype=torch.int32, device=positive.device)
    negative = [p.flip(0) + rest if r.negative is None else r.negative for p, r in zip(positive, ranges, strict=True)]
    singles = [positive.new_empty(positive.shape[-1], 0) if r.single is None else r.single for r in ranges]
    most = max(t.shape[1] for t in singles)
    single = torch.stack([nn.functional.pad(t, (0, most - t.shape[1]), value=NEVER) for t in singles])
    return BitRanges(positive, torch.stack(negative), single if most else None)


class Ranges(nn.Module):
    """Ranges that move with the model."""

    def __init__(self, ranges: BitRanges) -> None:
        super().__init__()
        for name, t in ranges._asdict().items():
            self.register_buffer(name, t, persistent=False)

    def get(self) -> BitRanges:
        own: dict[str, Any] = self._buffers  # ten times faster than attributes
        return BitRanges(own["positive"], own["negative"], own["single"])


class Attention(NamedTuple):
    """The rule of a block's attention, as `ops.binary_self_attention` takes it."""

    heads: int
    rule: str
    zero: str = "torch"
    scaling: float | None = None
    beta: float = 0.25
    steps: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # alpha_q, alpha_k, alpha_v, alpha_a of "elastic"

    @classmethod
    def of(cls, module: BinaryAttention, heads: int, scaling: float | None = None) -> Attention:
        """Of an attention module.

        Raises:
            NotChained: if its steps have not been set.
        """
        if has_hooks(module):
            raise NotChained("the attention has hooks")
        steps = None
        if module.kind == "elastic":
            if not bool(module.alpha_ready):
                raise NotChained("the steps of the attention have not been set by a training batch")
            steps = tuple(t.detach().float() for t in (module.alpha_q, module.alpha_k, module.alpha_v, module.alpha_a))
        return cls(heads, module.kind, module.zero, scaling, module.beta, steps)  # type: ignore[arg-type]

    def context(self, dot: Tensor) -> Tensor:
        """The float that a whole number A sgn(v) stands for."""
        if self.steps is None:
            return dot
        step_v, step_a = (t.clamp_min(ALPHA_FLOOR) for t in self.steps[2:])
        return step_a * step_v * dot


class AttentionChain(nn.Module):
    """Projections, attention and output projection: float32 in and out, bits between.

    Args:
        projections: the packed query, key and value, or one layer with the outputs of all three side by side. They and
            `out` stay the host's.
        out: the packed output projection.
        attention: the rule.
        most_keys: the longest sequence, or None if the host does not say.
    Raises:
        NotChained: if one of them is not a layer of bits, or heads are not whole words.
    """

    def __init__(
        self, projections: Sequence[nn.Module], out: nn.Module, attention: Attention, most_keys: int | None = None
    ) -> None:
        super().__init__()
        self.most_keys = most_keys or MOST_KEYS
        self.heads, self.rule = attention.heads, attention.rule
        self.scaling, self.beta = attention.scaling, attention.beta
        names = ("query", "key", "value") if len(projections) == 3 else ("query, key and value",)
        layers = [chainable(layer, name) for layer, name in zip(projections, names, strict=True)]
        self.layers, self.out = tuple(layers), (chainable(out, "output"),)  # in tuples they stay the host's alone
        heads = attention.heads * 3 // len(layers)
        for layer in layers:
            if layer.out_features % (32 * heads):
                raise NotChained(f"heads of {layer.out_features / heads:g} columns are not whole words of 32")
        inputs, outer = [Input(layer) for layer in layers], Input(self.out[0])
        if len({(layer.out_features, each.levels) for layer, each in zip(layers, inputs, strict=True)}) > 1:
            raise NotChained("query, key and value have different widths or levels")
        self.levels, self.out_levels = inputs[0].levels, outer.levels
        self.thresholds = [each.threshold for each in inputs]
        levels = "sign" if attention.zero == "torch" else "plus"
        self.projected = Ranges(
            stacked([ranges_after(layer, levels, lambda z: binarized(z, None, levels, 0.0)) for layer in layers])
        )
        n = self.out[0].in_features
        context = ranges_of(
            lambda dot: outer.level(attention.context(dot)).expand(-1, n),
            n,
            self.most_keys,
            outer.levels,
            self.out[0].scale.device,
        )
        if context.single is not None:
            raise NotChained("the levels of the output projection's input are not ranges")
        self.context = Ranges(context)
        alpha_q, alpha_k, _, alpha_a = attention.steps or (None, None, None, None)
        for name, step in (("alpha_q", alpha_q), ("alpha_k", alpha_k), ("alpha_a", alpha_a)):
            self.register_buffer(name, step, persistent=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The result of the output projection, a residual of its shape added.

        x is float32 [sequences, n, d], with a mask or None; or [rows, d] with the lengths of the sequences.
        """
        require_width("PackedBinaryLinear", x, self.layers[0].in_features)
        return torch.ops.bitmill.binary_self_attention.default(x, residual, *self.arguments(mask, lengths))

    def sources(self) -> list[Held]:
        """Where the arguments come from."""
        own = buffers_of((self, self.projected, self.context))
        return [*buffers_of(self.layers, READ), *buffers_of(self.out), *own]

    def arguments(self, mask: Tensor | None = None, lengths: Tensor | None = None) -> SelfAttentionArguments:
        layers: list[dict[str, Any]] = [layer._buffers for layer in self.layers]
        out: dict[str, Any] = self.out[0]._buffers
        own: dict[str, Any] = self._buffers
        context = self.context.get()
        return SelfAttentionArguments(
            _for_each([layer["shift"] for layer in layers]),
            self.thresholds,
            self.levels,
            [layer["weight"] for layer in layers],
            _for_each([layer["weight_nonzero"] for layer in layers]),
            *self.projected.get(),
            float32_mask(mask),
            lengths,
            self.heads,
            self.rule,
            self.scaling,
            self.beta,
            own["alpha_q"],
            own["alpha_k"],
            own["alpha_a"],
            context.positive,
            context.negative,
            self.out_levels,
            out["weight"],
            out["weight_nonzero"],
            out["scale"],
            out["bias"],
        )


def float32_mask(mask: Tensor | None) -> Tensor | None:
    """A mask as the ops take it: bool or float32."""
    return mask.float() if mask is not None and mask.dtype == torch.float64 else mask


def buffers_of(modules: Iterable[nn.Module], names: Collection[str] | None = None) -> list[Held]:
    """The buffers of these names, or all, that the modules have."""
    return [
        (module, "_buffers", name)
        for module in modules
        for name, t in module._buffers.items()
        if t is not None and (names is None or name in names)
    ]


def _for_each(tensors: list[Tensor | None]) -> list[Tensor]:
    """One tensor for each layer, an empty one where it has none, or nothing if no layer has one."""
    some = next((t for t in tensors if t is not None), None)
    return [] if some is None else [some.new_empty(0) if t is None else t for t in tensors]


class MlpChain(nn.Module):
    """down(f(up(x))): float32 in and out, bits between.

    Args:
        up, down: the packed layers, which stay the host's.
        activation: f, a function of float32 tensors, element by element.
    Raises:
        NotChained: if one of them is not a layer of bits, or f has no ranges.
    """

    def __init__(self, up: nn.Module, down: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        first, last = chainable(up, "the first layer"), chainable(down, "the second layer")
        self.input, inner = Input(first), Input(last)
        self.up, self.down, self.inner_levels = (first,), (last,), inner.levels
        self.inner = Ranges(ranges_after(first, inner.levels, then(inner.level, activation)))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        require_width("PackedBinaryLinear", x, self.up[0].in_features)
        return torch.ops.bitmill.binary_mlp.default(x, residual, *self.arguments())

    def sources(self) -> list[Held]:
        """Where the arguments come from."""
        return [*buffers_of(self.up, READ), *buffers_of((*self.down, self.inner))]

    def arguments(self) -> MlpArguments:
        up: dict[str, Any] = self.up[0]._buffers
        down: dict[str, Any] = self.down[0]._buffers
        return MlpArguments(
            up["shift"],
            self.input.threshold,
            self.input.levels,
            up["weight"],
            up["weight_nonzero"],
            *self.inner.get(),
            self.inner_levels,
            down["weight"],
            down["weight_nonzero"],
            down["scale"],
            down["bias"],
        )


class LayersChain(nn.Module):
    """Layers one after another: float32 in and out, bits between.

    Args:
        layers: the packed layers, at least two, which stay the host's.
        between: for each but the last what its outputs go through, a function of float32 [rows, outputs], output by
            output.
    Raises:
        NotChained: if one of them is not a layer of bits, or a function has no ranges.
    """

    def __init__(self, layers: Sequence[nn.Module], between: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.layers = tuple(chainable(layer, f"layer {i} of the chain") for i, layer in enumerate(layers))
        inputs = [Input(layer) for layer in self.layers]
        self.threshold, self.levels = inputs[0].threshold, [each.levels for each in inputs]
        self.ranges = nn.ModuleList(
            Ranges(ranges_after(layer, reader.levels, then(reader.level, f)))
            for layer, reader, f in zip(self.layers, inputs[1:], between, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        require_width("PackedBinaryLinear", x, self.layers[0].in_features)
        buffers: list[dict[str, Any]] = [layer._buffers for layer in self.layers]
        sign, nonzero, _, _ = bitpack(x, buffers[0]["shift"], self.levels[0], self.threshold)
        zeros = nonzero if self.levels[0] == "sign" else None
        every: Any = self.ranges
        for layer, own, ranges, levels in zip(self.layers, buffers, every, self.levels, strict=False):
            found, sizes = ranges.get(), (layer.out_features, layer.in_features)
            sign, nonzero = binary_matmul_bits(sign, own["weight"], found, *sizes, zeros, own["weight_nonzero"], levels)
            zeros = None if found.negative is None else nonzero
        own, k = buffers[-1], self.layers[-1].in_features
        return binary_matmul_floats(
            sign, own["weight"], own["scale"], own["bias"], k, zeros, own["weight_nonzero"], self.levels[-1]
        )
