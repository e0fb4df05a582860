# SPDX-License-Identifier: Apache-2.0
"""PB-LLM after training: a language model's linear layers become partially binary, from a little calibration text.

Source: Shang et al., PB-LLM: Partially Binarized Large Language Models, ICLR 2024. Salience: section 3.3, by magnitude
or by what an error in the weight costs. Scales of the binarised weights: section 3.4.2 ("unbiased"); the published code
divides by the width of the row group instead ("official"). Rounding: GPTQ (`recipes.gptq`) with scales and mask taken
from the original weight, or plain rounding ("rtn"). All layers of a decoder block are measured in one pass; the next
block sees what the quantised one puts out. Embeddings, output head, normalisations and biases stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import SalientConfig
from ..convert import Filter
from ..nn import PackedSalientLinear
from ..nn._module import require_finite
from ..nn.salient import QuantisedWeight, Scales
from ..ops.salient_scatter import high_bit_scales, salient_columns, salient_mask, salient_quantiles
from . import layerwise
from .gptq import Hessian, factor, output_error, sweep

ROUNDING = ("gptq", "rtn")
WITHOUT_ACTIVATIONS = ("magnitude", "quantile")  # metrics of the weight alone
DEFAULT = SalientConfig(metric="hessian")


class PartiallyBinarised(NamedTuple):
    """A weight [n, k] in its new form: the parts, which entries are salient (bool [n, k]), and GPTQ's loss (0: rtn)."""

    parts: QuantisedWeight
    mask: Tensor
    loss: float

    def value(self) -> Tensor:
        """float32 [n, k]."""
        return self.parts.value(self.mask)


def saliency(weight: Tensor, upper: Tensor | None, metric: str) -> Tensor:
    """How much each entry of a weight [n, k] matters, float32 [n, k].

    "magnitude" |w|; "hessian" w^2 / U_jj^2, as the published code has it; "hessian_paper" w^2 / (H^-1)_jj^2, as the
    paper prints it. U, `upper`, is that of `gptq.factor`, with U^T U = H^-1; magnitudes do without it.
    """
    w = weight.detach().float()
    if metric == "magnitude" or upper is None:
        return w.abs()
    cost = upper.diagonal() if metric == "hessian" else upper.square().sum(0)
    return w.square() / cost.square()


def salient_entries(weight: Tensor, upper: Tensor | None, config: SalientConfig) -> Tensor:
    """bool [n, k]: what the config takes for salient in a weight [n, k], knowing `upper` of `gptq.factor`."""
    if config.metric == "quantile":
        return salient_quantiles(weight, config.fraction)
    scores = saliency(weight, upper, config.metric)
    if config.structure == "column":
        return salient_columns(scores, config.fraction)
    return salient_mask(scores, config.fraction, config.group_size or 0)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None = None,
    config: SalientConfig = DEFAULT,
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
) -> PartiallyBinarised:
    """Partially binarise a weight, knowing the Hessian of its layer's inputs.

    With a group size the fraction of salient entries is that of each group of columns, all rows together; without one,
    or of whole columns or quantiles, that of the matrix. A column that no input reaches counts as 0.

    Args:
        weight: [n, k], any float dtype.
        hessian: float32 [k, k], `gptq.Hessian(...).matrix`; None with rounding="rtn" and a metric of the weight alone.
        config: fraction, bits, metric, structure, scale, centre and group size.
        rounding: "gptq" makes up for every column's error in the columns to its right, "rtn" rounds each by itself.
        damping: of `gptq.factor`.
        block: of `gptq.sweep`.
    Raises:
        ValueError: for a weight that is not finite, a missing or unfit Hessian, or an unknown rounding.
    """
    if rounding not in ROUNDING:
        raise ValueError(f"quantize_weight: rounding must be one of {', '.join(ROUNDING)}, got {rounding!r}")
    require_finite("quantize_weight", weight)
    w, upper = weight.detach().float(), None
    if hessian is not None:
        upper, dead = factor(hessian, damping)
        if upper.shape[0] != w.shape[1]:
            raise ValueError(
                f"quantize_weight: hessian must have shape [{w.shape[1]}, {w.shape[1]}], got {list(hessian.shape)}"
            )
        w = w.masked_fill(dead, 0)
    elif rounding == "gptq" or config.metric not in WITHOUT_ACTIVATIONS:
        raise ValueError(
            f"quantize_weight: hessian must be given for rounding={rounding!r} and metric={config.metric!r}, got None;"
            " or take rounding='rtn' and metric='magnitude'"
        )
    mask = salient_entries(w, upper, config)
    # The range of the codes is that of the weight as it came, dead columns included.
    scale, zero = (None, None) if config.bits == 16 else high_bit_scales(weight.detach(), config.bits)
    scales = Scales.around(w, mask, scale, zero, config)
    if rounding == "rtn" or upper is None:
        return PartiallyBinarised(scales.quantise(w), mask, 0.0)

    def quantise(column: Tensor, first: int) -> Tensor:
        return scales.of_group(first).quantise(column).value(mask[:, first : first + 1])

    swept = sweep(w, upper, quantise, block)
    return PartiallyBinarised(scales.quantise(swept.weight), mask, swept.loss)


def quantize_linear(
    linear: nn.Linear,
    hessian: Tensor | None = None,
    config: SalientConfig = DEFAULT,
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
) -> PackedSalientLinear:
    """`quantize_weight` of an nn.Linear, packed: its weight is exactly the one that the sweep arrived at.

    Raises:
        ValueError: as `quantize_weight`, or if `linear` is not exactly an nn.Linear.
    """
    if type(linear) is not nn.Linear:
        raise ValueError(f"quantize_linear: linear must be a torch.nn.Linear, got {type(linear).__name__}")
    return _packed(linear, quantize_weight(linear.weight, hessian, config, rounding, damping, block), config)


def _packed(linear: nn.Linear, result: PartiallyBinarised, config: SalientConfig) -> PackedSalientLinear:
    packed = PackedSalientLinear.from_parts(result.parts, result.mask, linear.bias, config)
    return packed.train(linear.training)


def quantize_(
    model: nn.Module,
    batches: Iterable[layerwise.Batch],
    config: SalientConfig = DEFAULT,
    rounding: str = "gptq",
    damping: float = 0.01,
    block: int = 128,
    blocks: str | None = None,
    filter_fn: Filter | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Partially binarise and pack the nn.Linear layers of a model's decoder blocks, in place, block by block.

    The memory beyond the model is the calibration text's activations between two blocks and the Hessians of one block.
    The result depends on model, text, settings and number of threads alone.

    Args:
        model: a transformers causal language model, or any module that keeps its blocks in one nn.ModuleList.
        batches: calibration text: ids int64 [sequences, tokens] (`language.random_windows`), or dicts of the model's
            keyword arguments. The method's own number is 128 sequences of 2048 tokens.
        config, rounding, damping, block: of `quantize_weight`.
        blocks: the name of the nn.ModuleList, "model.layers"; None finds it.
        filter_fn: called with (module, name); a false answer leaves the layer alone.
        folder: keeps every finished block on disk; the same call after a kill takes them up from there.
        progress: show a bar with the error of the last layer.
    Returns:
        For every layer that was swapped |X W^T - X Q^T| / |X W^T| on the calibration text.
    Raises:
        ValueError: for no calibration text, a model without such layers or with several lists of blocks, a layer that
            the text never reaches, a weight that is not finite, or a folder of another run. Blocks that were finished
            before stay quantised.
    """
    if rounding not in ROUNDING:
        raise ValueError(f"quantize_: rounding must be one of {', '.join(ROUNDING)}, got {rounding!r}")

    def quantise(linear: nn.Linear, hessian: Hessian) -> tuple[nn.Module, float]:
        result = quantize_weight(linear.weight, hessian.matrix, config, rounding, damping, block)
        return _packed(linear, result, config), output_error(hessian.matrix, linear.weight, result.value())

    settings = {**config.to_dict(), "rounding": rounding, "damping": damping, "block": block}
    return layerwise.quantize_blocks_(model, batches, quantise, settings, blocks, filter_fn, folder, progress)
