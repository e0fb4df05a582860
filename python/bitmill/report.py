# SPDX-License-Identifier: Apache-2.0
"""`summary`: what a model costs, counted from what it holds. Nothing is left out: scales, padding, names, metadata.

Operations follow the convention of the binary-network papers: a product of an m-bit and an n-bit number counts
m n / 64 of a float operation (BinaryBERT, BiBERT), per row of the input.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from .checkpoint import file_size
from .config import BinaryConfig, FP4Config, SalientConfig
from .convert import LATENT, PACKED
from .nn import PackedBinaryEmbedding
from .nn._module import PackedModule
from .ops._library import has_compiled_kernel
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
        resident_bytes: the memory of all parameters and buffers, what is shared counted once.
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
    file_bytes = file_size(model)  # refuses what has no size
    modules = list(model.named_modules())
    kinds = LATENT + PACKED if any(isinstance(m, LATENT + PACKED) for _, m in modules) else (nn.Linear,)
    layers = tuple(_layer(name, module) for name, module in modules if isinstance(module, kinds))
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    bits = sum(round(layer.bits_per_weight * layer.shape[0] * layer.shape[1]) for layer in layers)
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    resident = sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())
    return Summary(layers, bits / weights if weights else 0.0, resident, file_bytes)


def _layer(name: str, module: nn.Module) -> LayerSummary:
    n, k = module.weight_shape() if isinstance(module, PackedModule) else _shape(module.weight)
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    size = sum(t.nbytes for t in tensors.values())
    weight_bits = 8 * sum(t.nbytes for key, t in tensors.items() if key != "bias")
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
    return device if has_compiled_kernel(module.kernel, device.upper()) else "torch"


def _cost(module: nn.Module) -> float:
    """Float operations that one multiply-add is worth: weight bits x activation bits / 64, at most 1."""
    config = getattr(module, "config", None) if isinstance(module, LATENT + PACKED) else None
    activation = config.act_bits if isinstance(config, BinaryConfig) else 32

    def worth(weight: int) -> float:
        return min(weight * activation / 64, 1.0)

    if isinstance(config, SalientConfig):  # the share of each kind
        return config.fraction * worth(config.bits) + (1 - config.fraction) * worth(1)
    return worth(config.weight_bits if isinstance(config, BinaryConfig) else 4 if isinstance(config, FP4Config) else 32)
