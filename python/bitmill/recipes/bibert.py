# SPDX-License-Identifier: Apache-2.0
"""BiBERT: fully binarized BERT with Bi-Attention and Direction-Matching Distillation.

Source: Qin et al., BiBERT: Accurate Fully Binarized BERT, ICLR 2022, as its published code computes it. The student
starts from its teacher: the same model, fine-tuned in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..binarize import sign
from ..config import BinaryConfig
from ..integrations.transformers import Projections, quantize_body_, register_attention, set_attention_
from ..ops._library import without_autocast
from .distillation import (
    hidden_direction_loss,
    hidden_mse,
    similarity,
    similarity_loss,
    soft_cross_entropy,
)


def binarize_(model: nn.Module, attention: str = "bool", method: str = "bibert") -> list[str]:
    """Turn a transformers BERT into a BiBERT, in place.

    Binary are the word embedding, all linear layers of the body, the pooler's included, and the attention. Positions,
    token types, normalisations, biases, GELU, residuals and the classifier stay as they are.

    Args:
        model: a BERT of transformers, with or without a head.
        attention: the kind that `set_attention_` takes; "sign_softmax" for the baseline of the paper, or
            "thresholded_softmax".
        method: of the binarizers of weights and activations.
    Returns:
        The names of the layers that became binary.
    Raises:
        ValueError: if the model does not fit; it is then unchanged.
    """
    if attention in SOFTMAX_ATTENTIONS:
        register_attention(attention, SOFTMAX_ATTENTIONS[attention])
    host: Any = model
    before = getattr(getattr(host, "config", None), "_attn_implementation", None)
    set_attention_(host, attention)
    try:
        return quantize_body_(host, BinaryConfig(method, embeddings=True))
    except ValueError:
        host.set_attn_implementation(before)
        raise


class Outputs(NamedTuple):
    """What distillation compares.

    Attributes:
        logits: [batch, classes].
        hidden: the embeddings' output and that of every layer, each [batch, n, d].
        similarities: of queries, of keys and of values, each one matrix [batch, heads, n, n] a layer; empty where they
            are not compared.
    """

    logits: Tensor
    hidden: Sequence[Tensor]
    similarities: Sequence[Sequence[Tensor]] = ()


def outputs_of(model: nn.Module, batch: dict[str, Tensor], projections: Projections | None = None) -> Outputs:
    """Run a classifier of transformers on a batch; similarities if its `Projections` are given."""
    result: Any = model(**batch, output_hidden_states=True)
    similarities: tuple[list[Tensor], ...] = ()
    if projections is not None:
        layers = projections.last
        similarities = tuple([similarity(layer[i]) for layer in layers] for i in range(3))
    return Outputs(result.logits, result.hidden_states, similarities)


def prediction_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss of the logits: soft cross-entropy + NLL / 2, or the mean squared error to the teacher for one output."""
    if student.shape[-1] == 1:
        return nn.functional.mse_loss(student, teacher)
    return soft_cross_entropy(student, teacher) + 0.5 * nn.functional.cross_entropy(student, labels)


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of the task alone: cross-entropy, or the mean squared error of one output."""
    if logits.shape[-1] == 1:
        return nn.functional.mse_loss(logits.squeeze(-1), labels)
    return nn.functional.cross_entropy(logits, labels)


def direction_matching_loss(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """The training loss of BiBERT: logits, similarities of queries, keys and values, hidden states; weights 1."""
    matched = sum(similarity_loss(*pair) for pair in zip(student.similarities, teacher.similarities, strict=True))
    predicted = prediction_loss(student.logits, teacher.logits, labels)
    return predicted + matched + hidden_direction_loss(student.hidden, teacher.hidden)


def mse_loss(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """BiBERT's logit term with the distillation that it replaces: mean squared errors of hidden states."""
    return prediction_loss(student.logits, teacher.logits, labels) + hidden_mse(student.hidden, teacher.hidden)


def sign_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The paper's fully binarized baseline (section 3.1): sgn(softmax(S)), S from signs, times the signs of v.

    Probabilities are positive, so the map is 1 at every attended key: attention has lost its information, which is what
    Bi-Attention repairs. Gradients pass the signs straight through and the softmax as it is.

    Args:
        q, k, v: float [..., n, d], [..., m, d], [..., m, d].
        mask: boolean (True: attend) or additive, broadcast to [..., n, m], or None.
        scaling: of the scores; None for 1 / sqrt(d).
        dropout: of the probabilities.
    """
    return _softmax_attention(sign, q, k, v, mask, scaling, dropout)


def thresholded_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """As `sign_softmax_attention`, with the map 1 where softmax(S) >= 1/2 and 0 elsewhere: the nearer of the two.

    At most one key of a row, or two, reaches one half, and in a long text mostly none: then nothing is passed on.
    """
    return _softmax_attention(_nearest_bit, q, k, v, mask, scaling, dropout)


SOFTMAX_ATTENTIONS = {  # that binarise what softmax gives
    "sign_softmax": sign_softmax_attention,
    "thresholded_softmax": thresholded_softmax_attention,
}


def _nearest_bit(probability: Tensor) -> Tensor:
    """With a gradient of 1."""
    return probability + ((probability >= 0.5).to(probability.dtype) - probability).detach()


def _softmax_attention(
    binarize: Callable[[Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    with without_autocast(q):
        query, key, value = (sign(t.float(), "clip_open") for t in (q, k, v))
        scores = query @ key.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        probability = torch.softmax(scores, -1).nan_to_num(0.0)  # a row without a key has none
        probability = nn.functional.dropout(probability, dropout, dropout > 0)
        return (binarize(probability) @ value).to(q.dtype)
