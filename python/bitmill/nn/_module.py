# SPDX-License-Identifier: Apache-2.0
"""What all layers share: the training form is an nn.Linear or nn.Embedding with a latent weight, the packed form owns
buffers only.

A packed layer can be built empty from its `arguments()` and its config, so a checkpoint is data: the class's name,
its config, its arguments and its tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import Config

L = TypeVar("L", bound="LatentLinear")
E = TypeVar("E", bound="LatentEmbedding")
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def as_float32(t: Tensor | None) -> Tensor | None:
    """The ops take scales and biases in float32; a training layer moved by .half() or .bfloat16() has them rounded."""
    return t if t is None or t.dtype == torch.float32 else t.float()


class LatentLinear(nn.Linear):
    """Training form: nn.Linear whose weight [out_features, in_features] is latent and is quantised in forward."""

    config_class: ClassVar[type[Config]]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Config | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = config if config is not None else self.config_class()
        if not isinstance(config, self.config_class):
            expected = self.config_class.__name__
            raise ValueError(f"{type(self).__name__}: config must be a {expected}, got {type(config).__name__}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.config: Any = config
        self.create_state(self.weight.device, self.weight.dtype)

    def create_state(self, device: torch.device, dtype: torch.dtype) -> None:
        """Create the parameters and buffers that the method adds to weight and bias."""

    @classmethod
    def from_linear(cls: type[L], linear: nn.Linear, config: Config | None = None, **state: Any) -> L:
        """A layer on the same Parameters: nothing is copied, tied weights stay tied.

        In eval mode nn.TransformerEncoderLayer reads the weights of its linear1 and linear2 and does not call them;
        `quantize_` tells it to.

        Args:
            state: what the layer's `create_state` takes besides.
        Raises:
            ValueError: if `linear` is not exactly an nn.Linear, whose forward this layer replaces.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{cls.__name__}: linear must be a torch.nn.Linear, got {type(linear).__name__},"
                " whose forward may differ"
            )
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, config, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.create_state(linear.weight.device, linear.weight.dtype, **state)
        return layer.train(linear.training)

    def to_linear(self, weight: Tensor) -> nn.Linear:
        """An nn.Linear with this weight and this layer's bias."""
        return linear_from(weight, self.bias, self.weight.dtype, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


class LatentEmbedding(nn.Embedding):
    """Training form: nn.Embedding whose table [num_embeddings, embedding_dim] is latent and is quantised in forward."""

    config_class: ClassVar[type[Config]]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        config: Config | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = config if config is not None else self.config_class()
        if not isinstance(config, self.config_class):
            expected = self.config_class.__name__
            raise ValueError(f"{type(self).__name__}: config must be a {expected}, got {type(config).__name__}")
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.config: Any = config

    @classmethod
    def from_embedding(cls: type[E], embedding: nn.Embedding, config: Config | None = None) -> E:
        """A layer on the same Parameter: nothing is copied, a tied weight stays tied.

        Raises:
            ValueError: for a subclass of nn.Embedding, or one with max_norm, sparse or scale_grad_by_freq.
        """
        if type(embedding) is not nn.Embedding:
            raise ValueError(
                f"{cls.__name__}: embedding must be a torch.nn.Embedding, got {type(embedding).__name__},"
                " whose forward may differ"
            )
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(embedding, option):
                raise ValueError(f"{cls.__name__}: {option} is not supported; build the nn.Embedding without it")
        sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        layer = cls(*sizes, config, device="meta")
        layer.weight = embedding.weight
        return layer.train(embedding.training)


class PackedModule(nn.Module):
    """Packed form: buffers only, ready to save. Subclasses add `forward` and `dequantize`."""

    config: Any
    kernel: str  # the op that forward calls

    def register_buffers(self, **buffers: Tensor | None) -> None:
        """Register buffers, the absent ones last: torch.export (2.13) miscounts buffers that follow a None."""
        for name, t in sorted(buffers.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, t)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move buffers to another device. Their dtypes are the format: .half() and .bfloat16() leave them alone."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def set_activations(self, activations: str) -> None:
        """Multiply other activations from now on; the configuration must allow them."""
        self.config = dataclasses.replace(self.config, activations=activations)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments besides `config` that rebuild this layer's empty buffers."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")

    def weight_shape(self) -> tuple[int, int]:
        """(n, k) of the weight that is packed."""
        raise TypeError(f"{type(self).__name__} does not say the shape of its weight")

    def validate(self) -> None:
        """Raise ValueError if the buffers contradict each other (a file from a stranger may be hostile)."""

    def extra_repr(self) -> str:
        facts = ", ".join(f"{key}={value}" for key, value in self.arguments().items())
        return f"{facts}, {self.config}"


class PackedTable(PackedModule):
    """A lookup table whose output has a dtype of its own: .half(), .bfloat16() and .to(dtype) change it."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype | str
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = float_dtype(type(self).__name__, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTable:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)).dtype
        super()._apply(fn, recurse)
        return self

    def arguments(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("num_embeddings", "embedding_dim", "padding_idx")}
        return {**sizes, "dtype": str(self.dtype).removeprefix("torch.")}

    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim


def linear_from(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, training: bool) -> nn.Linear:
    """An nn.Linear that owns copies of weight and bias."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(dtype).clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype).clone())
    return linear.train(training)


def embedding_from(table: Tensor, padding_idx: int | None, training: bool) -> nn.Embedding:
    """An nn.Embedding that owns a copy of the table."""
    rows, dim = table.shape
    embedding = nn.Embedding(rows, dim, padding_idx, device="meta")
    embedding.weight = nn.Parameter(table.detach().clone())
    return embedding.train(training)


def agreed(value: Tensor, ready: Tensor) -> Tensor:
    """The mean of a value over the ranks whose DistributedDataParallel is running, as long as `ready` is false: what
    the first batch sets is a parameter, which DDP moves by the same gradients everywhere and does not send."""
    ddp = None if torch.compiler.is_compiling() else DistributedDataParallel._active_ddp_module
    if ddp is None or bool(ready):
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total, group=ddp.process_group)
    return total / torch.distributed.get_world_size(ddp.process_group)


def float_dtype(layer: str, dtype: torch.dtype | str) -> torch.dtype:
    """A float dtype, or its name in a file. Raises ValueError for others."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{layer}: dtype must be one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def require_width(layer: str, x: Tensor, k: int) -> None:
    """One clear error for the commonest mistakes; the op checks the rest."""
    if x.is_nested:
        raise ValueError(
            f"{layer}: x must not be a nested tensor; quantise the whole nn.TransformerEncoder, with a filter, or set"
            " its use_nested_tensor = False"
        )
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{layer}: the last dimension of x must be in_features = {k}, got shape {list(x.shape)}")


def whole_ids(layer: str, ids: Tensor) -> Tensor:
    """Ids as int64; those of another kind are an error, as nn.Embedding has it, and not cut off."""
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{layer}: ids must be integers, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.long()


def require_finite(layer: str, weight: Tensor) -> None:
    """NaN and infinity have no packed form."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"{layer}: weight must be finite to be packed, got NaN or infinity; repair the weight first")
