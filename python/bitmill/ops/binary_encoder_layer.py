# SPDX-License-Identifier: Apache-2.0
"""A whole layer of a transformer's encoder in one op, for inference. With its attention A, of which the projections are
part, and its MLP M:

    h = norm(A(x) + x),  y = last_norm(M(h) + h)            as in BERT
    h = A(norm(x)) + x,  y = M(last_norm(h)) + h            norm_first, as in ViT

One op, because after the attention every row goes its own way: output projection, residual, normalisation, packing, and
the same of the MLP are one pass over the row. It is the composition of `binary_self_attention`, `layer_norm`,
`binary_mlp` and `layer_norm`, and equals them bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library as library
from ._block_arguments import LayerNormArguments, MlpArguments, SelfAttentionArguments
from ._checks import require
from .binary_blocks import _binary_mlp_reference, _binary_self_attention_reference

# No defaults: every argument is given by the wrapper.
library.define(
    "binary_encoder_layer",
    "(Tensor x, Tensor[] shift, float[] threshold, str levels, Tensor[] weight, Tensor[] weight_nonzero,"
    " Tensor positive, Tensor? negative, Tensor? single, Tensor? mask, Tensor? lengths, int heads, str rule,"
    " float? scaling, float beta, Tensor? alpha_q, Tensor? alpha_k, Tensor? alpha_a, Tensor context_positive,"
    " Tensor? context_negative, str out_levels, Tensor out, Tensor? out_nonzero, Tensor scale, Tensor? bias,"
    " Tensor norm_weight, Tensor norm_bias, float norm_eps, Tensor? mlp_shift, float mlp_threshold, str mlp_levels,"
    " Tensor up, Tensor? up_nonzero, Tensor mlp_positive, Tensor? mlp_negative, Tensor? mlp_single,"
    " str inner_levels, Tensor down, Tensor? down_nonzero, Tensor mlp_scale, Tensor? mlp_bias,"
    " Tensor last_norm_weight, Tensor last_norm_bias, float last_norm_eps, bool norm_first) -> Tensor",
)

Parts = tuple[SelfAttentionArguments, LayerNormArguments, MlpArguments, LayerNormArguments]


def _checked(x: Tensor, arguments: tuple[Any, ...]) -> Parts:
    op, at = "binary_encoder_layer", len(SelfAttentionArguments._fields)
    attention, norm = SelfAttentionArguments(*arguments[:at]), LayerNormArguments(*arguments[at : at + 3])
    mlp, last_norm = MlpArguments(*arguments[at + 3 : -4]), LayerNormArguments(*arguments[-4:-1])
    attention.check(op, x, None)
    mlp.check(op, x, None, "mlp_")
    for name, scale in (("scale", attention.scale), ("mlp_scale", mlp.scale)):
        n, k = scale.shape[0], x.shape[-1]
        require(n == k, f"{op}: {name} must have as many rows as x has columns, {k}, got {n}")
    norm.check(op, x, "norm_")
    last_norm.check(op, x, "last_norm_")
    return attention, norm, mlp, last_norm


@library.default("binary_encoder_layer")
def _binary_encoder_layer_reference(x: Tensor, *arguments: Any) -> Tensor:
    attention, norm, mlp, last_norm = _checked(x, arguments)
    size = x.shape[-1:]
    if arguments[-1]:
        h = _binary_self_attention_reference(torch.layer_norm(x, size, *norm), x, *attention)
        return _binary_mlp_reference(torch.layer_norm(h, size, *last_norm), h, *mlp)
    h = torch.layer_norm(_binary_self_attention_reference(x, x, *attention), size, *norm)
    return torch.layer_norm(_binary_mlp_reference(h, h, *mlp), size, *last_norm)


@torch.library.register_fake("bitmill::binary_encoder_layer")
def _(x, *arguments):
    _checked(x, arguments)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def binary_encoder_layer(
    x: Tensor,
    attention: SelfAttentionArguments,
    norm: LayerNormArguments,
    mlp: MlpArguments,
    last_norm: LayerNormArguments,
    norm_first: bool = False,
) -> Tensor:
    """An encoder's layer of bits with its two residuals and normalisations.

    Args:
        x: float32 [sequences, n, k]; with lengths among the arguments of the attention [rows, k].
        attention: of a `binary_self_attention` with k outputs.
        norm, last_norm: weight and bias, float32 [k], and epsilon; of the attention's result and the MLP's, or of their
            inputs.
        mlp: of a `binary_mlp` with k outputs.
        norm_first: normalise the inputs, and not the sums.
    Returns:
        float32, x's shape.
    Raises:
        ValueError: as the ops that it is made of.
    """
    return torch.ops.bitmill.binary_encoder_layer.default(x, *attention, *norm, *mlp, *last_norm, norm_first)
