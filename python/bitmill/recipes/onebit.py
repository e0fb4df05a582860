# SPDX-License-Identifier: Apache-2.0
"""OneBit: the linear layers of a language model as signs between two vectors, trained from the model that they replace.

The student starts from the rank-one approximation of every weight's magnitudes and learns from the teacher's logits and
hidden states. Published settings: AdamW(betas=(0.9, 0.98), weight_decay=0.01), a learning rate of 4e-4 (LLaMA-7B) or
1e-4 (LLaMA-2-7B) that falls as a cosine after 500 steps, 50 epochs on texts that the teacher wrote.

Source: Xu et al., OneBit: Towards Extremely Low-bit Large Language Models, NeurIPS 2024 (arXiv 2402.11295), sections
3.3 and 3.4; weights of the losses and the latent weights' start as in its published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import OneBitConfig
from ..convert import Filter, quantize_
from ..nn import OneBitLinear
from .layerwise import decoder_blocks

LATENT = 0.01


@torch.no_grad()
def binarize_(
    model: nn.Module, config: OneBitConfig | None = None, blocks: str | None = None, filter_fn: Filter | None = None
) -> list[str]:
    """Swap the nn.Linear layers of a model's decoder blocks for OneBitLinear, in place; weights become 0.01 sgn(W).

    Args:
        model: a transformers causal language model, or any module that keeps its blocks in one nn.ModuleList.
        config: of the layers.
        blocks: the name of the nn.ModuleList, "model.layers"; None finds it.
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names that were swapped.
    Raises:
        ValueError: for a model without such layers, or with several lists of blocks.
    """
    prefix, _ = decoder_blocks(model, blocks)

    def inside(module: nn.Module, name: str) -> bool:
        return name.startswith(f"{prefix}.") and (filter_fn is None or filter_fn(module, name))

    names = quantize_(model, config or OneBitConfig(), inside)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, OneBitLinear)
        layer.weight.copy_(LATENT * torch.sign(layer.weight))
    return names


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor]
) -> Tensor:
    """0.01 KL(teacher || student) of a sequence + sum over hidden states of the mean |t / |t| - s / |s||^2 of a token.

    Args:
        student_logits, teacher_logits: [sequences, tokens, vocabulary]; the teacher's carry no gradient.
        student_hidden, teacher_hidden: [sequences, tokens, d], one a layer, as long as each other.
    """
    student, teacher = (torch.log_softmax(logits.float(), -1) for logits in (student_logits, teacher_logits))
    divergence = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    directions = (
        (nn.functional.normalize(t.float(), dim=-1) - nn.functional.normalize(s.float(), dim=-1))
        .square()
        .sum(-1)
        .mean()
        for s, t in zip(student_hidden, teacher_hidden, strict=True)
    )
    return 0.01 * divergence + torch.stack([*directions]).sum()
