# SPDX-License-Identifier: Apache-2.0
"""`summary`: what a model costs, counted from what it holds. Nothing is left out: scales, padding, names, metadata.

Operations follow the convention of the binary-network papers: a product of an m-bit and an n-bit number counts
m n / 64 of a float operation (BinaryBERT, BiBERT), per row of the input.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import file_size
from .convert import LATENT, PACKED
from .nn import PackedBinaryEmbedding
from .nn._module import PackedModule
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


@dataclasses.dataclass(frozen=True)
class Summary:
    """A model.

    Attributes:
        layers: its bitmill layers, or, if it has none, its nn.Linear layers.
        bits_per_weight: of these layers together.
        resident_bytes: all parameters and buffers in memory.
        file_bytes: the file that `bitmill.save` writes, names and metadata included.
    """

    layers: tuple[LayerSummary, ...]
    bits_per_weight: float
    resident_bytes: int
    file_bytes: int

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
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Bytes, bits a weight, operations and the kernel in use, for each bitmill layer and for the model.

    Raises:
        ValueError: if the model is on the meta device or holds state that is not a tensor.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, LATENT + PACKED)]
    if not found:
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    layers = tuple(_layer(name, module) for name, module in found)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in layers)
    resident = {id(t): _bytes(t) for t in (*model.parameters(), *model.buffers())}
    return Summary(layers, bits / weights if weights else 0.0, sum(resident.values()), file_size(model))


def _layer(name: str, module: nn.Module) -> LayerSummary:
    shape = module.weight_shape() if isinstance(module, PackedModule) else tuple(module.weight.shape)
    n, k = shape
    tensors = {key: t for key, t in (*module.named_parameters(), *module.named_buffers())}
    size = sum(_bytes(t) for t in tensors.values())
    weight_bits = 8 * (size - sum(_bytes(t) for key, t in tensors.items() if key == "bias"))
    lookup = isinstance(module, (nn.Embedding, PackedBinaryEmbedding))
    macs = 0 if lookup else n * k
    return LayerSummary(
        name,
        type(module).__name__,
        (n, k),
        size,
        weight_bits / (n * k) if n * k else 0.0,
        macs,
        macs * _cost(module),
        kernel_of(module.kernel) if isinstance(module, PackedModule) else "torch",
    )


def _cost(module: nn.Module) -> float:
    """Float operations that one multiply-add is worth: weight bits x activation bits / 64, at most 1."""
    config = getattr(module, "config", None)
    if config is None:
        return 1.0
    activation = min(getattr(config, "act_bits", 32), 32)
    weight = {"BinaryConfig": 1, "FP4Config": 4}.get(type(config).__name__)
    if weight is None:  # salient: the share of each kind
        return config.fraction * min(config.bits * activation / 64, 1) + (1 - config.fraction) * activation / 64
    return min(weight * activation / 64, 1.0)


def _bytes(t: Tensor) -> int:
    return t.numel() * torch.empty(0, dtype=t.dtype).element_size()
