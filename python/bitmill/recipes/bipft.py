# SPDX-License-Identifier: Apache-2.0
"""BiPFT: a binary BERT for pre-training, with low-rank estimates of what binary attention leaves out.

Source: Xing et al., BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization Residual
Polynomials, AAAI 2024, as its published code computes it. BiT's binarizers; GELU, and signed inputs everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..binarize import low_rank_addend
from ..config import BinaryConfig
from ..integrations.transformers import CHILD, attach_attention_, quantize_body_
from .bibert import Outputs
from .bit import encoder_layers
from .distillation import hidden_mse, soft_cross_entropy


def binarize_(model: nn.Module, rank: int = 1) -> list[str]:
    """Turn a transformers BERT into a BiPFT, in place.

    Args:
        model: a BERT of transformers, with or without a head and a pooler.
        rank: of the estimators in every attention layer, BiPFT-B; 0 leaves them out, BiPFT-A.
    Returns:
        The names of the layers that became binary.
    Raises:
        ValueError: if the model does not fit, or for a negative rank.
    """
    if rank < 0:
        raise ValueError(f"binarize_: rank must be 0 or more, got {rank}")
    if rank and getattr(getattr(model, "config", None), "is_decoder", False):
        raise ValueError("binarize_: model must be an encoder, got a decoder, whose cache the estimators do not have")
    layers = encoder_layers(model)
    attach_attention_(model, "elastic")
    names = quantize_body_(model, BinaryConfig("bit", embeddings=True))
    body: Any = getattr(model, "base_model", model)
    std = body.config.initializer_range
    for layer in layers if rank else ():
        layer.attention.self = LowRankSelfAttention(layer.attention.self, rank, std)
    if body.pooler is not None:
        body.pooler = ResidualPooler(body.pooler.dense, body.config.layer_norm_eps)
    return names


ESTIMATORS = ("query_plus", "query_minus", "key_plus", "key_minus", "value_plus")


class LowRankSelfAttention(nn.Module):
    """BERT's self-attention with elastic binary attention, and estimators of rank r from the real-valued input.

    With linears qp, kp, qm, km of r outputs and vp of one: scores gain ((qm + qp) kp^T + qp km^T) / sqrt(d), the same
    for all heads, and values gain vp.
    """

    def __init__(self, attention: Any, rank: int = 1, std: float = 0.02) -> None:
        super().__init__()
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.attention_head_size, self.dropout = attention.attention_head_size, attention.dropout
        self.binary_attention = getattr(attention, CHILD)
        width, device = self.query.in_features, self.query.weight.device
        for name in ESTIMATORS:
            estimator = nn.Linear(width, 1 if name == "value_plus" else rank, device=device)
            nn.init.normal_(estimator.weight, std=std)
            nn.init.zeros_(estimator.bias)
            self.add_module(name, estimator)
        self.train(attention.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [batch, n, width] and transformers' mask to (context [batch, n, width], None).

        Raises:
            ValueError: for a cache of earlier keys.
        """
        if kwargs.get("cache") is not None:
            raise ValueError("LowRankSelfAttention: cache must be None; there are no estimates of earlier keys in one")
        x = hidden_states
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        *parts, value_addend = self._estimate(x)
        addend = low_rank_addend(*parts).unsqueeze(1)
        value_addend = value_addend.unsqueeze(1)
        context = self.binary_attention(
            q, k, v, attention_mask, dropout=self.dropout.p, addend=addend, value_addend=value_addend
        )
        return context.transpose(1, 2).flatten(2), None

    def _estimate(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the estimators say, in the order of ESTIMATORS: one product, since each alone is hardly any work."""
        layers = [getattr(self, name) for name in ESTIMATORS]
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return nn.functional.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


class ResidualPooler(nn.Module):
    """tanh(LayerNorm(dense(h)) + h) of the first token h."""

    def __init__(self, dense: Any, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = nn.LayerNorm(dense.out_features, eps=eps, device=dense.weight.device)
        self.train(dense.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        first = hidden_states[:, 0]
        return torch.tanh(self.LayerNorm(self.dense(first)) + first)


def pretraining_loss(
    tokens: Tensor, labels: Tensor, student: Outputs, teacher: Outputs, next_sentence: Tensor | None = None
) -> Tensor:
    """The pre-training loss: masked words, next sentence, and the teacher's logits and hidden states; weights 1.

    Args:
        tokens: the student's word logits [batch, n, vocabulary].
        labels: the words [batch, n] int64, -100 where none was masked.
        student, teacher: next-sentence logits [batch, 2] and hidden states.
        next_sentence: [batch] int64, or None without that task.
    """
    masked = nn.functional.cross_entropy(tokens.flatten(0, -2), labels.flatten())
    distilled = soft_cross_entropy(student.logits, teacher.logits) + hidden_mse(student.hidden, teacher.hidden)
    if next_sentence is None:
        return masked + distilled
    return masked + distilled + nn.functional.cross_entropy(student.logits, next_sentence)
