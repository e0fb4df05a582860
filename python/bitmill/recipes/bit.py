# SPDX-License-Identifier: Apache-2.0
"""BiT: robustly binarized, multi-distilled transformer.

Source: Liu et al., BiT: Robustly Binarized Multi-distilled Transformer, NeurIPS 2022, as its published code computes
it. Elastic binarization everywhere, {0, alpha} after ReLU and softmax; distilled from full precision to 1-bit weights
with 2-bit activations, and from there to 1-bit activations (`successor`), or at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..binarize import elastic, elastic_alpha
from ..config import BinaryConfig
from ..convert import quantize_
from ..integrations.transformers import CHILD, attach_attention_, attention_layers, quantize_body_
from .bibert import Outputs
from .distillation import hidden_mse, soft_cross_entropy

STEP_LR = 1e-4
"""The rate of the learned steps in the published runs."""


def binarize_(model: nn.Module, act_bits: int = 1) -> list[str]:
    """Turn a transformers BERT into a BiT, in place.

    As BiBERT, but with ReLU instead of GELU, learned shifts and steps of all activations, and the softmax. The steps
    are parameters, set by the first training batch.

    Args:
        model: a BERT of transformers, with or without a head.
        act_bits: 1, or 2 or 4 for a model on the way.
    Returns:
        The names of the layers that became binary.
    Raises:
        ValueError: if the model does not fit.
    """
    layers = encoder_layers(model)
    attach_attention_(model, "elastic")
    for layer in layers:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    config: Any = model.config
    config.hidden_act = "relu"
    down = {layer.output.dense for layer in layers}
    names = quantize_(model, BinaryConfig("bit", act_bits, signed=False), lambda module, name: module in down)
    names += quantize_body_(model, BinaryConfig("bit", act_bits, embeddings=True))
    if act_bits > 1:
        for _, module, _, _ in attention_layers(model):
            setattr(module, CHILD, MultiBitAttention(act_bits))
    return names


def encoder_layers(model: nn.Module) -> Any:
    """The layers of a BERT encoder.

    Raises:
        ValueError: for another model.
    """
    encoder = getattr(getattr(model, "base_model", model), "encoder", None)
    layers = list(getattr(encoder, "layer", ()))
    if not layers or not all(hasattr(layer, "intermediate") and hasattr(layer.output, "dense") for layer in layers):
        raise ValueError(f"expected a BERT of transformers, got {type(model).__name__}; its layers are others")
    return layers


class Elastic(nn.Module):
    """The elastic quantiser of one tensor, with a step that the first training batch sets."""

    ready: Tensor

    def __init__(self, bits: int, signed: bool = True) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.ready:
            with torch.no_grad():
                self.alpha.copy_(elastic_alpha(x, self.bits, self.signed))
                self.ready.fill_(True)
        return elastic(x, self.alpha, self.bits, self.signed)


class MultiBitAttention(nn.Module):
    """BiT's attention with 2-bit or 4-bit queries, keys, values and probabilities: softmax(q k^T / sqrt(d)) v.

    For training only: a model of this kind is the teacher of one with binary attention. Arguments of `forward` are
    those of `nn.BinaryAttention`.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.query, self.key, self.value = Elastic(bits), Elastic(bits), Elastic(bits)
        self.map = Elastic(bits, signed=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        scores = self.query(q) @ self.key(k).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        probability = torch.softmax(scores, -1).nan_to_num(0.0)  # a row without a key has none
        probability = nn.functional.dropout(probability, dropout, self.training)
        return self.map(probability) @ self.value(v)


def successor(student: nn.Module, predecessor: nn.Module) -> None:
    """Start a student, already `binarize_`d, from a predecessor with more activation bits: all but the steps.

    Steps of other bit widths do not compare; the first training batch sets the student's.
    """
    state = {
        name: value
        for name, value in predecessor.state_dict().items()
        if not name.rpartition(".")[2].startswith("alpha") and f".{CHILD}." not in name
    }
    student.load_state_dict(state, strict=False)


def distillation_loss(student: Outputs, teacher: Outputs) -> Tensor:
    """The training loss of BiT: soft cross-entropy of the logits, mean squared errors of hidden states; weights 1.

    The published runs keep the teacher in training mode, with its dropout.
    """
    return soft_cross_entropy(student.logits, teacher.logits) + hidden_mse(student.hidden, teacher.hidden)
