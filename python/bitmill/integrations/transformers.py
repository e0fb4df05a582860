# SPDX-License-Identifier: Apache-2.0
"""Binary attention in the models of transformers 5, without rewriting them.

Importing this module adds three names to transformers' attention interface, so that a conversion is two lines:

    model.set_attn_implementation("bitmill_bool")     # or bitmill_softmax_aware
    quantize_(model, BinaryConfig("bibert"), lambda module, name: "classifier" not in name)

`bitmill_elastic` learns steps, which are parameters and must exist before the optimizer: `attach_attention_` puts an
`nn.BinaryAttention` named `binary_attention` into every attention layer. A layer that has one uses it, whatever the
name, and its steps are in the state_dict. Written for transformers 5.17 to 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..binarize import bool_attention, softmax_aware_attention
from ..config import BinaryConfig
from ..convert import quantize_
from ..nn import BinaryAttention

try:
    import transformers
except ImportError:
    raise ImportError(
        "bitmill.integrations.transformers needs transformers 5, which is not installed: pip install 'transformers>=5'"
    ) from None
if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"bitmill.integrations.transformers needs transformers 5 or newer, got {transformers.__version__}: "
        "pip install 'transformers>=5'"
    )

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

CHILD = "binary_attention"
PREFIX = "bitmill_"
PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"))
UNSUPPORTED = ("softcap", "s_aux", "position_bias")

Attention = Callable[..., Tensor]
_FUNCTIONS: dict[str, Attention] = {}  # what was registered, by kind


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The boolean mask (True: attend); a causal one is always made, because nothing but the mask says so here."""
    return None if _keeps_all(**kwargs) else sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _keeps_all(
    attention_mask: Tensor | None = None,
    kv_length: float = math.inf,
    kv_offset: int = 0,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool = False,
    **_: Any,
) -> bool:
    """Whether the mask keeps all and need not be made. sdpa_mask finds that too, after asking about every tracer that
    there is, which takes as long as the answer; an ordinary tensor on the CPU leaves two of them."""
    if not allow_is_bidirectional_skip or local_size is not None or type(attention_mask) is not Tensor:
        return False
    if not attention_mask.is_cpu or attention_mask.shape[-1] < kv_offset + kv_length:
        return False
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and bool(attention_mask.all())


def _missing(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float) -> Tensor:
    raise ValueError(
        "bitmill_elastic: this attention layer has no steps to learn; call"
        " bitmill.integrations.transformers.attach_attention_(model, 'elastic') before making the optimizer"
    )


def register_attention(kind: str, function: Attention) -> str:
    """Make `bitmill_<kind>` a name that `set_attn_implementation` knows.

    Args:
        kind: an identifier; a kind that exists is replaced.
        function: called as function(q, k, v, mask, scaling=..., dropout=...) with q [batch, heads, n, d], k and v
            [batch, heads, m, d], a boolean or additive mask or None, scaling None for 1 / sqrt(d), and the dropout rate
            (0 in eval mode); returns the context [batch, heads, n, d].
    Returns:
        The name.
    """
    name = PREFIX + kind

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        for option in UNSUPPORTED:
            if kwargs.get(option) is not None:
                raise ValueError(f"{name}: binary attention has no {option}, which {type(module).__name__} uses")
        if attention_mask is not None and not attention_mask.is_floating_point():
            attention_mask = attention_mask.bool()
        if scaling is not None and math.isclose(scaling, query.shape[-1] ** -0.5):
            scaling = None
        attend = getattr(module, CHILD, function)
        context = attend(query, key, value, attention_mask, scaling=scaling, dropout=dropout)
        return context.transpose(1, 2).contiguous(), None

    _FUNCTIONS[kind] = function
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, _mask)
    return name


def enable() -> None:
    """Register the three kinds; done when this module is imported."""
    register_attention("bool", bool_attention)
    register_attention("softmax_aware", softmax_aware_attention)
    register_attention("elastic", _missing)


def chained_kind(kind: str) -> str | None:
    """The rule of `ops.binary_attention_bits` that a registered kind computes, or None."""
    rules: dict[Any, str] = {bool_attention: "bool", softmax_aware_attention: "softmax_aware"}
    return rules.get(_FUNCTIONS.get(kind))


class AttentionLayer(NamedTuple):
    """An attention layer of a host, its projections, and the width of a head."""

    name: str
    module: nn.Module
    projections: tuple[nn.Module, nn.Module, nn.Module]
    head_dim: int


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers that keep their projections as query, key, value or q_proj, k_proj, v_proj: BERT, ViT, most others.

    Raises:
        ValueError: if there is none; the classes that look like attention are named.
    """
    found = []
    for name, module in model.named_modules():
        for names in PROJECTIONS:
            projections = tuple(getattr(module, part, None) for part in names)
            head_dim = getattr(module, "attention_head_size", getattr(module, "head_dim", None))
            if all(isinstance(part, nn.Module) for part in projections) and isinstance(head_dim, int):
                found.append(AttentionLayer(name, module, projections, head_dim))  # type: ignore[arg-type]
    if not found:
        seen = sorted({type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()})
        raise ValueError(
            f"{type(model).__name__}: expected attention layers with query, key, value or q_proj, k_proj, v_proj,"
            f" got {', '.join(seen) or 'no attention'}; use bitmill.nn.BinaryAttention in a layer of your own"
        )
    return found


def set_attention_(model: nn.Module, kind: str) -> None:
    """`model.set_attn_implementation("bitmill_<kind>")`, with an error instead of a warning where that has no effect.

    Raises:
        ValueError: if the model is not one of transformers, or does not take its attention from the interface.
    """
    name = PREFIX + kind
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"set_attention_: expected a model of transformers, got {type(model).__name__}; put"
            " bitmill.nn.BinaryAttention into its attention layers"
        )
    if name not in AttentionInterface():
        known = ", ".join(sorted(key.removeprefix(PREFIX) for key in AttentionInterface() if key.startswith(PREFIX)))
        raise ValueError(f"set_attention_: kind must be one of {known}, got {kind!r}")
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"set_attention_: {type(model).__name__} does not take its attention from transformers' interface; put"
            " bitmill.nn.BinaryAttention into its attention layers"
        )


def attach_attention_(model: nn.Module, kind: str, **options: Any) -> list[str]:
    """Put an `nn.BinaryAttention` into every attention layer, and let the model use them.

    Needed for "elastic", before the optimizer is made; for the other kinds, where options differ from their defaults.
    Dropout stays what the model's config says.

    Args:
        kind: "bool", "softmax_aware" or "elastic".
        options: of `nn.BinaryAttention`: beta, zero, row_scale.
    Returns:
        The names of the layers.
    Raises:
        ValueError: if the model has no attention layers that fit, or does not take its attention from the interface.
    """
    layers = attention_layers(model)
    set_attention_(model, kind)
    for _, module, projections, head_dim in layers:
        device = next(projections[0].parameters()).device
        attention = BinaryAttention(kind, head_dim, device=device, **options)
        module.add_module(CHILD, attention.train(module.training))
    return [layer.name for layer in layers]


def quantize_body_(model: nn.Module, config: BinaryConfig) -> list[str]:
    """`quantize_` for the model without its head: the linear layers and, if the config says so, the word embedding.

    The body is transformers' `base_model`; position and token-type tables and convolutions stay as they are.
    """
    body: Any = getattr(model, "base_model", model)
    table = body.get_input_embeddings()
    inside = set(body.modules())

    def wanted(module: nn.Module, name: str) -> bool:
        return module in inside and (module is table or not isinstance(module, nn.Embedding))

    return quantize_(model, config, wanted)


class Projections:
    """Queries, keys and values of every attention layer in the model's last forward, before their signs.

    `last` holds one (q, k, v) a layer, each [batch, heads, n, d], with their gradients. Hooks do the work, so call
    `remove` before the model is packed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = attention_layers(model)
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._handles = [
            projection.register_forward_hook(self._keep(i, j))
            for i, layer in enumerate(self.layers)
            for j, projection in enumerate(layer.projections)
        ]

    def _keep(self, layer: int, projection: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._outputs[layer, projection] = output

        return hook

    @property
    def last(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        def heads(i: int, j: int) -> Tensor:
            return self._outputs[i, j].unflatten(-1, (-1, self.layers[i].head_dim)).transpose(-3, -2)

        return [(heads(i, 0), heads(i, 1), heads(i, 2)) for i in range(len(self.layers))]

    def remove(self) -> None:
        """Take the hooks off and forget the tensors."""
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()


enable()
