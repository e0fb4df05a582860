# SPDX-License-Identifier: Apache-2.0
"""Chains: the packed layers of a transformer block connected by bits.

Between two binary layers a float is made only to be turned into a bit again. A chain leaves it out: what an output of
the first layer becomes in the second is found once, by trying every dot product (`ops.bit_ranges`), and compared as an
integer from then on. Floats remain where the mathematics needs them: residuals and normalisations, which are torch's
own. So every bit, and every float, is the one that the layers compute one by one.

A chain adds nothing to the state: a block keeps its modules and their names, and gets a child `chain` without
persistent buffers. A block whose chain does not hold for an input (gradients, hooks, another dtype) computes layer by
layer.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .binarize.functions import ALPHA_FLOOR
from .nn import BinaryAttention, PackedBinaryLinear
from .ops import BitRanges, binary_attention_bits, binary_matmul_bits, binary_matmul_floats, bit_ranges, bitpack
from .ops.bitpack import binarized

Rows = tuple[Tensor, Tensor | None]  # packed rows: signs, and nonzero bits or None

MOST_KEYS = 4096  # of a chain whose host does not say how many there can be


class NotChained(ValueError):
    """Why a block computes layer by layer."""


class Input:
    """How a layer makes bits of its input."""

    def __init__(self, layer: PackedBinaryLinear) -> None:
        self.layer, self.levels, self.threshold = layer, layer._levels, 0.0
        if self.levels == "bool":
            self.threshold = 0.5 if layer.alpha is None else float(layer.alpha / 2)

    def is_like(self, other: Input) -> bool:
        plain = self.layer.shift is None and other.layer.shift is None
        return plain and (self.levels, self.threshold) == (other.levels, other.threshold)

    def level(self, x: Tensor) -> Tensor:
        return binarized(x, self.layer.shift, self.levels, self.threshold)

    def pack(self, x: Tensor) -> Rows:
        sign, nonzero, _, _ = bitpack(x, self.layer._buffers["shift"], self.levels, self.threshold)
        return sign, nonzero if self.levels == "sign" else None


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


def has_hooks(module: nn.Module) -> bool:
    """Whether someone looks at what this module computes."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Ranges(nn.Module):
    """What each output of a product becomes in the next layer."""

    positive: Tensor
    negative: Tensor | None
    single: Tensor | None

    def __init__(self, level: Callable[[Tensor], Tensor], n: int, k: int, levels: str, device: torch.device) -> None:
        super().__init__()
        try:
            found = bit_ranges(level, n, k, levels, device)
        except ValueError as error:
            raise NotChained(str(error).removeprefix("bit_ranges: ")) from None
        for name, t in found._asdict().items():
            self.register_buffer(name, t, persistent=False)

    def forward(self) -> BitRanges:
        own: dict[str, Any] = self._buffers
        return BitRanges(own["positive"], own["negative"], own["single"])


class Link(nn.Module):
    """A layer from bits to the bits that the next one reads.

    Args:
        layer: the first of the two, from `chainable`.
        levels: of the second.
        level: what its results z, float32 [count, n], become there.
    """

    def __init__(self, layer: PackedBinaryLinear, levels: str, level: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple it stays the host's child alone
        scale, bias, n, k = layer.scale[:, 0], layer.bias, layer.out_features, layer.in_features

        def of_dot(dot: Tensor) -> Tensor:
            z = scale * dot
            return level(z if bias is None else z + bias)

        self.ranges = Ranges(of_dot, n, k, levels, scale.device)

    def forward(self, rows: Rows) -> Rows:
        layer, ranges = self.layer[0], self.ranges
        own: dict[str, Any] = layer._buffers  # ten times faster than attributes
        sign, nonzero = binary_matmul_bits(
            rows[0],
            own["weight"],
            ranges(),
            layer.out_features,
            layer.in_features,
            rows[1],
            own["weight_nonzero"],
            layer._levels,
        )
        return sign, None if ranges.negative is None else nonzero


def to_floats(layer: PackedBinaryLinear, rows: Rows, residual: Tensor | None) -> Tensor:
    """The layer's results from its packed input, and a residual added to them."""
    own: dict[str, Any] = layer._buffers
    return binary_matmul_floats(
        rows[0],
        own["weight"],
        own["scale"],
        own["bias"],
        layer.in_features,
        rows[1],
        own["weight_nonzero"],
        layer._levels,
        residual,
    )


class Attention(NamedTuple):
    """The rule of a block's attention, as `ops.binary_attention_bits` takes it."""

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
        self.out = (chainable(out, "output"),)
        heads = attention.heads * 3 // len(layers)
        for layer in layers:
            if layer.out_features % (32 * heads):
                raise NotChained(f"heads of {layer.out_features / heads:g} columns are not whole words of 32")
        levels = "sign" if attention.zero == "torch" else "plus"
        self.inputs = [Input(layer) for layer in layers]
        self.one_input = all(self.inputs[0].is_like(other) for other in self.inputs[1:])
        self.projections = nn.ModuleList(
            Link(layer, levels, lambda z: binarized(z, None, levels, 0.0)) for layer in layers
        )
        outer, n = Input(self.out[0]), self.out[0].in_features
        self.context = Ranges(
            lambda dot: outer.level(attention.context(dot)).expand(-1, n),
            n,
            self.most_keys,
            outer.levels,
            self.out[0].scale.device,
        )
        alpha_q, alpha_k, _, alpha_a = attention.steps or (None, None, None, None)
        for name, step in (("alpha_q", alpha_q), ("alpha_k", alpha_k), ("alpha_a", alpha_a)):
            self.register_buffer(name, step, persistent=False)
        if self.context.single is not None:
            raise NotChained("the levels of the output projection's input are not ranges")

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
        (q, q_nonzero), (k, k_nonzero), (v, v_nonzero) = self.project(x)
        ranges = self.context
        mask = mask.float() if mask is not None and mask.dtype == torch.float64 else mask
        own: dict[str, Any] = self._buffers
        sign, nonzero = binary_attention_bits(
            q, k, v, ranges.positive, ranges.negative, self.heads, q_nonzero, k_nonzero, v_nonzero, mask, lengths,
            self.rule, self.scaling, self.beta, own["alpha_q"], own["alpha_k"], own["alpha_a"],
        )  # fmt: skip
        return to_floats(self.out[0], (sign, None if ranges.negative is None else nonzero), residual)

    def project(self, x: Tensor) -> Sequence[Rows]:
        """The packed rows of queries, keys and values."""
        links = self.projections
        packed = [self.inputs[0].pack(x)] * len(links) if self.one_input else [each.pack(x) for each in self.inputs]
        rows = [link(bits) for link, bits in zip(links, packed, strict=True)]
        if len(rows) == 3:
            return rows
        sign, nonzero = rows[0]
        nonzeros = (None,) * 3 if nonzero is None else nonzero.chunk(3, -1)
        return list(zip(sign.chunk(3, -1), nonzeros, strict=True))


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
        self.up, self.down = Link(first, inner.levels, lambda z: inner.level(activation(z))), (last,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return to_floats(self.down[0], self.up(self.input.pack(x)), residual)


class Chained:
    """Mixin of a host's module whose forward can run `self.chain`; see `register_chain`."""

    plain: ClassVar[Any]  # the host's own class, whose methods compute layer by layer
    chain: Any
    training: bool

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        """The chain of a module.

        Raises:
            NotChained: if it has none.
        """
        raise TypeError(f"{cls.__name__} does not say what its chain is")

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        """The modules that a chain does not call: that one of them has hooks or trains is a reason not to run it."""
        return tuple(module.children())

    def runs(self, x: Tensor, *others: Tensor) -> bool:
        """Whether the chain may compute this input; `others` are tensors that may want a gradient."""
        return (
            x.dtype == torch.float32
            and not self.training
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)))
            and not any(module.training or has_hooks(module) for module in self.chain.passed)
        )


_CHAINED: dict[type[nn.Module], type[Chained]] = {}
_REGISTERED_IN = {  # of the modules that define a host's classes: what is imported when `chain_` meets one of them
    "timm.layers.mlp": "bitmill.integrations._timm_chain",
    "bitmill.integrations.timm": "bitmill.integrations._timm_chain",
    **{
        f"transformers.models.{name}.modeling_{name}": "bitmill.integrations._transformers_chain_relatives"
        for name in ("deit", "electra", "roberta", "xlm_roberta")
    },
}


def register_chain(chained: type[Chained]) -> type[Chained]:
    """Let `pack_` chain the modules of `chained.plain`, by turning them into `chained`, a subclass of both.

    Used as a decorator. The class says in `plan` what to chain, and in `forward` when.
    """
    _CHAINED[chained.plain] = chained
    return chained


def chain_(model: nn.Module) -> dict[str, str]:
    """Chain every packed block that a host has registered, in place.

    Returns:
        Of each block that could be chained by its class: its name, and the reason why it is not, or "".
    """
    modules: list[Any] = list(model.modules())
    for module in reversed(modules):  # a block asks whether its parts are chained
        chained = _chained(type(module))
        if chained is None:
            continue
        try:
            _connect(module, chained)
        except NotChained as reason:
            vars(module)["not_chained"] = str(reason)
            continue
        vars(module).pop("not_chained", None)
        module.__class__ = chained
        if _plan_again not in module._load_state_dict_post_hooks.values():
            module.register_load_state_dict_post_hook(_plan_again)
    return dict(chains(model))


def _chained(host: type[nn.Module]) -> type[Chained] | None:
    if host.__module__ in _REGISTERED_IN:
        with contextlib.suppress(ImportError):  # of a host in another version
            importlib.import_module(_REGISTERED_IN[host.__module__])
    return _CHAINED.get(host)


def unchain_(model: nn.Module) -> list[str]:
    """Take every chain off, in place: the layers compute one by one. Returns the names of the blocks."""
    names = []
    for name, module in list(model.named_modules()):
        vars(module).pop("not_chained", None)
        if isinstance(module, Chained):
            _unchain(module)
            names.append(name)
    return names


def _connect(module: Any, chained: type[Chained]) -> None:
    chain: Any = chained.plan(module).train(module.training)
    chain.passed = chained.passed(module)  # found once: looking for children takes longer than looking for hooks
    module.chain = chain


def _unchain(module: Any) -> None:
    del module.chain
    module.__class__ = module.plain


def chains(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Of each block that a host has registered: its name, and the reason why it is not chained, or ""."""
    for name, module in model.named_modules():
        if isinstance(module, Chained):
            yield name, ""
        elif "not_chained" in vars(module):
            yield name, vars(module)["not_chained"]


def _plan_again(module: Any, incompatible_keys: Any) -> None:
    """New weights have other ranges."""
    if not isinstance(module, Chained):
        return
    try:
        _connect(module, type(module))
    except NotChained as reason:
        _unchain(module)
        vars(module)["not_chained"] = str(reason)
