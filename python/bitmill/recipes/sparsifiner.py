# SPDX-License-Identifier: Apache-2.0
"""Sparsifiner: a predicted sparse attention pattern, as a mask that the binary attentions take.

Source: Wei et al., Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers,
CVPR 2023, as its code computes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MaskPredictor(nn.Module):
    """Which keys each query attends to, from a low-rank estimate of the attention map.

    q and k are projected to half their width, the keys' tokens to `tokens // reduction` basis vectors. A query's `topk`
    largest coefficients times the thresholded basis estimate its row of the map, of which the largest `keep` share of
    the tokens is attended to. The first token (the class token) attends to all. The mask has no gradient; the estimate
    (`estimate`) has one, for the distillation that trains the predictor.

    Args:
        head_dim: width d of a head.
        tokens: sequence length N, fixed.
        keep: share of the tokens that a query attends to, in (0, 1].
        reduction: N over the number of basis vectors.
        topk: coefficients that a query keeps.
        basis_threshold: basis entries at or below it are 0.
    """

    def __init__(
        self,
        head_dim: int,
        tokens: int,
        keep: float = 0.25,
        reduction: int = 6,
        topk: int = 8,
        basis_threshold: float = 0.02,
    ) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"MaskPredictor: keep must lie in (0, 1], got {keep}")
        if not 0 < topk <= tokens // reduction:
            raise ValueError(
                f"MaskPredictor: topk must lie between 1 and tokens // reduction = {tokens // reduction}, got {topk}"
            )
        self.tokens, self.keep, self.topk, self.basis_threshold = tokens, keep, topk, basis_threshold
        self.query, self.key = nn.Linear(head_dim, head_dim // 2), nn.Linear(head_dim, head_dim // 2)
        self.down = nn.Parameter(torch.empty(tokens, tokens // reduction))
        self.basis = nn.Parameter(torch.empty(tokens, tokens // reduction))
        for parameter in (self.down, self.basis):
            nn.init.trunc_normal_(parameter, std=0.02)

    def estimate(self, q: Tensor, k: Tensor) -> Tensor:
        """The estimated map of all rows but the first: [batch, heads, N - 1, N] from q, k [batch, heads, N, d]."""
        if q.dim() != 4 or q.shape != k.shape or q.shape[2] != self.tokens:
            raise ValueError(
                f"MaskPredictor: expected q and k [batch, heads, {self.tokens}, d], got {list(q.shape)} and"
                f" {list(k.shape)}"
            )
        heads = q.shape[1]
        scores = self.query(q) @ (self.key(k).mT @ self.down)
        # the published scale is that of the number of heads, not of their width
        coefficients = torch.softmax(scores[:, :, 1:] / math.sqrt(heads), -1)
        value, index = coefficients.topk(self.topk, -1)
        sparse = torch.zeros_like(coefficients).scatter(-1, index, value)
        size = self.basis.abs()
        return sparse @ torch.where(size > self.basis_threshold, size, 0.0).mT

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Boolean mask [batch, heads, N, N], True where a query attends."""
        with torch.no_grad():
            estimate = self.estimate(q, k)
            kept = estimate.topk(math.ceil(self.keep * self.tokens), -1).indices
            mask = torch.zeros_like(estimate, dtype=torch.bool).scatter(-1, kept, True)
            return torch.cat([mask.new_ones(*mask.shape[:2], 1, self.tokens), mask], 2)


class SparsifinerAttention(nn.Module):
    """Multi-head self-attention over a predicted mask; x [batch, N, dim] to the same shape.

    For binary attention give the mask to `bitmill.binarize.softmax_aware_attention` instead.
    """

    def __init__(
        self, dim: int, num_heads: int, tokens: int, qkv_bias: bool = True, predictor: MaskPredictor | None = None
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"SparsifinerAttention: dim must be a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, qkv_bias), nn.Linear(dim, dim)
        self.predictor = predictor if predictor is not None else MaskPredictor(dim // num_heads, tokens)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = self.predictor(q, k)
        context = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(context.transpose(1, 2).flatten(2))
