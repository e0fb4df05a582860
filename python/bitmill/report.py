# SPDX-License-Identifier: Apache-2.0
"""`summary`: what a model costs, counted from what it holds. Nothing is left out: scales, padding, names, metadata.

Operations follow the convention of the binary-network papers: a product of an m-bit and an n-bit number counts
m n / 64 of a float operation (BinaryBERT, BiBERT), per row of the input.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from torch import nn

from .chained import chains
from .checkpoint import file_size
from .config import BinaryConfig, FP4Config, Int8Config, OneBitConfig, SalientConfig
from .convert import LATENT, PACKED
from .nn import PackedBinaryEmbedding, PackedFP4Embedding, PackedInt8Embedding, PackedZonedLinear
from .nn._module import PackedModule
from .ops._cuda import kernel_on_cuda
from .ops._machine import kernel_of


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer: sizes in bytes, `bits_per_weight` with scales and padding but without the bias."""

    name: str
    kind: str
    shape: tuple[int, int]
    bytes: int
    bits_per_weight: float
    macs: int
    operations: float
    kernel: str


class Complexity(NamedTuple):
    """BiBench's track of theoretical complexity: how many times smaller, fewer operations, and their mean."""

    storage: float
    operations: float
    overall: float


def bibench_complexity(
    parameters: float, float_parameters: float, operations: float, float_operations: float
) -> Complexity:
    """r_c = |M| / ((|M| - |M'|) / 32 + |M'|), r_s = F / ((F - F') / 64 + F'), overall = sqrt((r_c^2 + r_s^2) / 2).

    Args:
        parameters, float_parameters: |M| of the model and |M'| of the part that stays in floating point.
        operations, float_operations: F and F'.
    Source: Qin et al., BiBench, ICML 2023, section 3.2. All weights and activations of the rest are taken as 1 bit.
    """
    stored = (parameters - float_parameters) / 32 + float_parameters
    done = (operations - float_operations) / 64 + float_operations
    storage, fewer = (parameters / stored if stored else 1.0), (operations / done if done else 1.0)
    return Complexity(storage, fewer, math.sqrt((storage**2 + fewer**2) / 2))


@dataclasses.dataclass(frozen=True)
class Summary:
    """A model.

    Attributes:
        layers: its bitmill layers, or, if it has none, its nn.Linear layers.
        bits_per_weight: of these layers together.
        resident_bytes: the memory of all parameters and buffers, what is shared counted once.
        file_bytes: the file that `bitmill.save` writes, names and metadata included.
        float_bytes: the model that these layers replaced, in float32.
        paper_bytes: what papers on binary networks count of it: the bits of the quantised weights and a float32 scale a
            row of each, with no bias, LayerNorm, position table or head (the 13.4 MB of BiBERT, "31.2x").
        complexity: BiBench's ratios of storage and operations, `bibench_complexity`.
        chains: of each block that `pack_` can connect by bits, its name, and the reason why it is not, or "".
    """

    layers: tuple[LayerSummary, ...]
    bits_per_weight: float
    resident_bytes: int
    file_bytes: int
    float_bytes: int
    paper_bytes: float
    complexity: Complexity
    chains: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'kind':<22} {'n x k':>14} {'bytes':>12} {'bits/weight':>11}  kernel"]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(
                f"{layer.name:<{width}}  {layer.kind:<22} {shape:>14} {layer.bytes:>12,} {layer.bits_per_weight:>11.3f}"
                f"  {layer.kernel}"
            )
        macs, operations = sum(x.macs for x in self.layers), sum(x.operations for x in self.layers)
        lines.append(
            f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits a weight; {self.resident_bytes:,} bytes in"
            f" memory, {self.file_bytes:,} in a file; {macs:,} multiply-adds a row, worth {operations:,.0f} in float"
        )
        if self.paper_bytes:
            lines.append(
                f"{self.float_bytes:,} bytes in float32: the file is {self.float_bytes / self.file_bytes:.1f}x smaller;"
                f" as papers count, weights and their scales alone, {self.float_bytes / self.paper_bytes:.1f}x, and"
                f" {macs / operations if operations else 1:.1f}x fewer operations in these layers"
            )
        connected = sum(not reason for _, reason in self.chains)
        if connected:
            lines.append(f"{connected} blocks connected by bits")
        lines += [f"{name} computes layer by layer: {reason}" for name, reason in self.chains if reason]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Bytes, bits a weight, operations and the kernel in use, for each bitmill layer and for the model.

    Raises:
        ValueError: if the model is on the meta device or holds state that is not a tensor.
    """
    file_bytes = file_size(model)  # refuses what has no size
    modules = list(model.named_modules())
    kinds = LATENT + PACKED if any(isinstance(m, LATENT + PACKED) for _, m in modules) else (nn.Linear,)
    layers = tuple(_layer(name, module) for name, module in modules if isinstance(module, kinds))
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    bits = sum(round(layer.bits_per_weight * layer.shape[0] * layer.shape[1]) for layer in layers)
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    resident = sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())
    per_weight, papers = bits / weights if weights else 0.0, _as_papers_count(model, layers)
    return Summary(layers, per_weight, resident, file_bytes, *papers, chains=tuple(chains(model)))


def _as_papers_count(model: nn.Module, layers: tuple[LayerSummary, ...]) -> tuple[int, float, Complexity]:
    """Bytes in float32, bytes by the papers' convention, and the complexity, of a model with quantised layers."""
    ours = {name: m for name, m in model.named_modules() if isinstance(m, LATENT + PACKED)}
    inside = {id(t) for m in ours.values() for t in (*m.parameters(), *m.buffers())}
    rest = sum(t.numel() for t in model.parameters() if id(t) not in inside)
    payload = rows = weights = binary = 0.0
    for layer in layers:
        module = ours.get(layer.name)
        elements = layer.shape[0] * layer.shape[1]
        bias = getattr(module, "bias", None)
        if module is not None:
            rest += 0 if bias is None else bias.numel()
            payload, rows, weights = (
                payload + elements * _weight_bits(module) / 8,
                rows + layer.shape[0],
                weights + elements,
            )
            binary += layer.macs if _cost(module) < 1 else 0
    macs = sum(layer.macs for layer in layers)
    left = sum(
        m.weight.numel()
        for m in model.modules()
        if layers and isinstance(m, (nn.Linear, nn.Conv2d)) and not isinstance(m, LATENT + PACKED)
    )
    complexity = bibench_complexity(weights + rest, rest, macs + left, macs + left - binary)
    return int(4 * (weights + rest)), payload + 4 * rows, complexity


def _layer(name: str, module: nn.Module) -> LayerSummary:
    n, k = module.weight_shape() if isinstance(module, PackedModule) else _shape(module.weight)
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    size = sum(t.nbytes for t in tensors.values())
    weight_bits = 8 * sum(t.nbytes for key, t in tensors.items() if key != "bias")
    lookup = isinstance(module, (nn.Embedding, PackedBinaryEmbedding, PackedFP4Embedding, PackedInt8Embedding))
    macs = 0 if lookup else n * k
    return LayerSummary(
        name,
        type(module).__name__,
        (n, k),
        size,
        weight_bits / (n * k) if n * k else 0.0,
        macs,
        macs * _cost(module),
        _kernel(module),
    )


def _shape(weight: Any) -> tuple[int, int]:
    n, *k = weight.shape
    return n, math.prod(k)


def _kernel(module: nn.Module) -> str:
    if not isinstance(module, PackedModule):
        return "torch"
    device = next(module.buffers()).device.type
    if device == "cpu":
        return kernel_of(module.kernel)
    return kernel_on_cuda(module.kernel) if device == "cuda" else "torch"


def _cost(module: nn.Module) -> float:
    """Float operations that one multiply-add is worth: weight bits x activation bits / 64, at most 1."""
    config = getattr(module, "config", None) if isinstance(module, LATENT + PACKED) else None
    activation = config.act_bits if isinstance(config, BinaryConfig) else 32

    def worth(weight: float) -> float:
        return min(weight * activation / 64, 1.0)

    if isinstance(config, SalientConfig):  # the share of each kind
        return config.fraction * worth(config.bits) + (1 - config.fraction) * worth(1)
    return worth(_weight_bits(module))


def _weight_bits(module: nn.Module) -> float:
    """Bits of a weight without its scale."""
    config = getattr(module, "config", None) if isinstance(module, LATENT + PACKED) else None
    if isinstance(config, SalientConfig):
        return config.fraction * config.bits + (1 - config.fraction)
    if isinstance(config, BinaryConfig):
        return config.weight_bits
    if isinstance(module, PackedZonedLinear):
        return 1 + module.salient_share()
    return {FP4Config: 4, Int8Config: 8, OneBitConfig: 1}.get(type(config), 32)
