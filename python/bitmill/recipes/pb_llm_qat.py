# SPDX-License-Identifier: Apache-2.0
"""PB-LLM in training: the binarised weights of a language model learn again, the salient ones stay as they are.

    pb_llm.quantize_(rounded, batches, pb_llm.DEFAULT)        # after training: which weights are salient
    binarize_(model, masks=masks_of(rounded))                 # the original model, its linear layers in training form
    next_token_loss(model, ids).backward()

Source: Shang et al., PB-LLM: Partially Binarized Large Language Models, ICLR 2024, section 3.4: salient weights frozen
at 8 bits, alpha the mean magnitude of the binarised ones (equation 8), no mean shift, everything else frozen, the loss
that of the next token. The paper trains 10,000 steps with AdamW, no weight decay, a rate of 2e-5 (1e-4 in its program),
and a cosine after 5 % of warm-up.

What its program does otherwise, and this recipe does not: an 8-bit routine that turns negative weights positive; one
alpha for a whole layer (`granularity="layer"` brings it back); sgn(0) = 0, which no bit can hold; a binarised output
head, which rounding after training leaves alone; and a checkpoint of float16 numbers instead of a packed file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import SalientConfig
from ..convert import Filter, replace_modules, require_bare
from ..nn import PackedSalientLinear, SalientLinear
from ..nn._module import require_finite
from .layerwise import decoder_blocks
from .pb_llm import WITHOUT_ACTIVATIONS

DEFAULT = SalientConfig(metric="hessian", centre=False)
LR, WARMUP, STEPS = 1e-4, 0.05, 10_000


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Which weights are salient in every PackedSalientLinear of a model, bool [n, k], by name."""
    return {name: layer.mask() for name, layer in model.named_modules() if isinstance(layer, PackedSalientLinear)}


def binarize_(
    model: nn.Module,
    config: SalientConfig = DEFAULT,
    masks: Mapping[str, Tensor] | None = None,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
) -> list[str]:
    """Swap linear layers for `SalientLinear`, in place, and freeze all other parameters.

    The weights that train become float32, whatever the model is: steps of this size vanish in 16 bits.

    Args:
        model: a transformers causal language model, or any module that keeps its blocks in one nn.ModuleList.
        masks: by name, the salient weights of the layers to swap (`masks_of` a model that `pb_llm.quantize_` made);
            None for every layer of the decoder blocks, with the salient weights that config.metric finds.
        blocks: the name of the nn.ModuleList; None finds it.
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names that were swapped.
    Raises:
        ValueError: for a metric that needs activations without masks, a mask of a layer that the model does not have or
            of another shape, a weight that is not finite, or a model in which nothing matches. The model is unchanged
            then.
    """
    if masks is None and config.metric not in WITHOUT_ACTIVATIONS:
        raise ValueError(
            f"binarize_: masks must be given for metric {config.metric!r}, got None; take masks_of a model that"
            " pb_llm.quantize_ has rounded"
        )
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if masks is None:
        prefix, _ = decoder_blocks(model, blocks)
        wanted = [name for name in linears if name.startswith(f"{prefix}.")]
    else:
        wanted = list(masks)
    wanted = [name for name in wanted if filter_fn is None or filter_fn(model.get_submodule(name), name)]
    if not wanted:
        raise ValueError("binarize_: the model must contain nn.Linear that masks and filter accept, got none")
    replacements: dict[nn.Module, nn.Module] = {}
    for name in wanted:
        if name not in linears:
            raise ValueError(f"binarize_: masks must be of nn.Linear layers of the model, it has none named {name!r}")
        try:
            require_bare(linears[name])
            require_finite("SalientLinear", linears[name].weight)
            mask = None if masks is None else masks[name]
            replacements[linears[name]] = SalientLinear.from_linear(linears[name], config, mask)
        except ValueError as error:
            raise ValueError(f"binarize_: {name}: {error}") from None
    replace_modules(model, replacements)
    model.requires_grad_(False)
    for layer in replacements.values():
        layer.float().requires_grad_(True)
    return wanted


def optimizer(model: nn.Module, lr: float = LR) -> torch.optim.AdamW:
    """AdamW over what trains, without weight decay, which would move the salient weights."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first, given those before it.

    Args:
        model: called with ids; returns logits [sequences, tokens, vocabulary], or an output of transformers.
        ids: int64 [sequences, tokens].
    """
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
