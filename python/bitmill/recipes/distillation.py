# SPDX-License-Identifier: Apache-2.0
"""Losses that compare a student with its teacher. Teachers' tensors carry no gradient: run them under torch.no_grad.

Lists hold one tensor a layer; where the teacher has r times as many layers, a student's layer is compared with one of
r. Hidden states begin with the embeddings' output, so their lists are one longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DROPPED = -100.0
"""Similarities at or below this are masked ones, and count as 0."""


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-softmax(teacher) log softmax(student), averaged over rows and classes, as the published code does.

    Args:
        student, teacher: logits [..., classes].
    """
    return -(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).mean()


def direction_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|| S / ||S|| - T / ||T|| ||, Frobenius norms over the whole tensors, the batch included (BiBERT, equation 13)."""
    return (student / student.norm() - teacher / teacher.norm()).norm()


def similarity(x: Tensor) -> Tensor:
    """x x^T / sqrt(d) of real-valued queries, keys or values [..., n, d]: [..., n, n]."""
    return x @ x.mT / x.shape[-1] ** 0.5


def similarity_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the direction distance of similarities; layer l is compared with the last of its group of r.

    Args:
        student, teacher: similarity matrices, one a layer; entries <= -100 count as 0 on both sides.
    """
    ratio = _ratio(len(student), len(teacher))
    pairs = zip(student, teacher[ratio - 1 :: ratio], strict=True)
    return _sum(direction_distance(*(torch.where(t <= DROPPED, 0.0, t) for t in pair)) for pair in pairs)


def hidden_direction_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over hidden states [batch, n, d] of the direction distance."""
    return _sum(direction_distance(*pair) for pair in _hidden_pairs(student, teacher))


def hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over hidden states [batch, n, d] of the mean squared error (TernaryBERT, BinaryBERT, BiT)."""
    return _sum(torch.nn.functional.mse_loss(*pair) for pair in _hidden_pairs(student, teacher))


def _hidden_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(student, teacher[:: _ratio(len(student) - 1, len(teacher) - 1)], strict=True))


def _ratio(student: int, teacher: int) -> int:
    if student < 1 or teacher % student:
        raise ValueError(f"the teacher's layers must be a multiple of the student's, got {teacher} and {student}")
    return teacher // student


def _sum(terms: object) -> Tensor:
    return torch.stack(list(terms)).sum()  # type: ignore[call-overload]
