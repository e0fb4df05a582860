# SPDX-License-Identifier: Apache-2.0
"""BiViT: vision transformers with binary weights, binary attention and, optionally, binary MLP activations.

Source: He et al., BiViT: Extremely Compressed Binary Vision Transformers, ICCV 2023. Linear layers: section 3.3 and the
published code (row-centred signs, learned row scales). Attention: softmax-aware binarization, equation 9 (section 3.2).
Cross-layer binarization (section 3.3): first the attention blocks, MLPs in full precision, then the MLPs too; call
`binarize_` with one group, train, and call it with the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import BinaryConfig
from ..convert import quantize_
from ._groups import GROUPS, group_of
from ._hosts import set_attention_

STAGES = (("attn",), ("mlp",))
"""Cross-layer binarization: the groups that each stage adds."""


def binarize_(
    model: nn.Module,
    groups: tuple[str, ...] = GROUPS,
    mlp_act_bits: int = 32,
    method: str = "bivit_pws",
    attention: str = "softmax_aware",
    row_scale: bool = False,
) -> list[str]:
    """Binarise groups of a vision transformer, in place: all linear layers of the group, and its attention.

    Patch embedding, classifier, normalisations, activations, residuals, biases and position tables stay as they are.
    The latent weights are the model's parameters; learned scales are new parameters, so make the optimizer afterwards.

    Args:
        model: a transformers or timm ViT or Swin.
        groups: "attn" and "mlp", or one of them.
        mlp_act_bits: 1, or 32 for floating-point activations in front of MLP weights, as in the paper's ImageNet rows.
        method: "bivit_pws" with learned row scales, as in the paper, "bivit" with the mean magnitude of each row, or
            any other binarizer, to compare.
        attention: "softmax_aware", or another attention of `bitmill.binarize`, to compare.
        row_scale: train with the row scale v of equation 5, which the published code leaves out. It changes no sign
            and hence no prediction, but without it the context is a whole number and the output projection's window
            |x| < 1 passes a gradient only where it is 0; short trainings gain several points by it.
    Returns:
        Names of the layers that were swapped.
    Raises:
        ValueError: for an unknown group, or a model that has no such layers or whose attention is unknown.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown or not groups:
        raise ValueError(f"binarize_: groups must be some of {', '.join(GROUPS)}, got {groups!r}")
    names: list[str] = []
    if "attn" in groups:
        set_attention_(model, attention, **({"row_scale": True} if row_scale else {}))
        names += quantize_(model, BinaryConfig(method), lambda _, name: group_of(name) == "attn")
    if "mlp" in groups:
        config = BinaryConfig(method, act_bits=mlp_act_bits)
        names += quantize_(model, config, lambda _, name: group_of(name) == "mlp")
    return names


def distribution_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy of the student's class probabilities under the teacher's, averaged over the batch.

    Both are logits [batch, classes]; temperature 1; no gradient to the teacher. It is all of BiViT's loss.
    Source: Liu et al., ReActNet, ECCV 2020, section 4.3.
    """
    return torch.nn.functional.cross_entropy(student, torch.softmax(teacher.detach(), -1))


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises linearly over the first `warmup` share of the steps, then falls to 0 along half a cosine."""

    def factor(step: int) -> float:
        progress = (step + 1) / max(steps, 1)
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
