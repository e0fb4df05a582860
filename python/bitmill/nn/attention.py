# SPDX-License-Identifier: Apache-2.0
"""BinaryAttention: queries, keys, values and maps of one bit, to be put into a host's attention layer.

Training form and packed form are one module: without a gradient the same call runs the compiled kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..binarize import bool_attention, elastic_alpha, elastic_attention, softmax_aware_attention
from ..binarize.functions import ALPHA_FLOOR
from ._module import agreed

KINDS = ("bool", "softmax_aware", "elastic")


class BinaryAttention(nn.Module):
    """The attention of BiBERT ("bool"), BiViT ("softmax_aware") or BiT ("elastic") between projections of its host.

    "elastic" learns four steps, float32 scalars: `alpha_q`, `alpha_k`, `alpha_v` and `alpha_a`, of the map; the first
    training batch sets them by BiT's first-use rule, and until then they are what that rule gives for the input.

    Args:
        kind: "bool", "softmax_aware" or "elastic".
        head_dim: the width of a head, checked against q if it is given.
        beta: of "softmax_aware".
        zero: what sgn(0) is, "torch" (0) or "plus" (+1).
        dropout: in training mode, of the scores or (elastic) the probabilities.
        row_scale: of "softmax_aware", in training mode: BiViT's v multiplies each row of the map. It brings the context
            into the window of the next layer's sign, whose gradient is 0 elsewhere, and the sign itself does not see
            it; so eval mode leaves it out. Only for a host whose next layer takes signs.
    """

    alpha_q: Tensor
    alpha_k: Tensor
    alpha_v: Tensor
    alpha_a: Tensor
    alpha_ready: Tensor

    def __init__(
        self,
        kind: str,
        head_dim: int | None = None,
        beta: float = 0.25,
        zero: str = "torch",
        dropout: float = 0.0,
        row_scale: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("kind", kind, KINDS), ("zero", zero, ("torch", "plus"))):
            if value not in allowed:
                raise ValueError(f"BinaryAttention: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if row_scale and kind != "softmax_aware":
            raise ValueError(f"BinaryAttention: row_scale goes with kind softmax_aware, got {kind}")
        if not 0 < beta <= 1:
            raise ValueError(f"BinaryAttention: beta must lie in (0, 1], got {beta}")
        if not 0 <= dropout < 1:
            raise ValueError(f"BinaryAttention: dropout must lie in [0, 1), got {dropout}")
        self.kind, self.head_dim, self.beta, self.zero, self.dropout = kind, head_dim, beta, zero, dropout
        self.row_scale = row_scale
        for name in ("alpha_q", "alpha_k", "alpha_v", "alpha_a"):
            step = nn.Parameter(torch.ones((), device=device)) if kind == "elastic" else None
            self.register_parameter(name, step)
        ready = torch.zeros((), device=device, dtype=torch.bool) if kind == "elastic" else None
        self.register_buffer("alpha_ready", ready)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float | None = None,
        addend: Tensor | None = None,
        value_addend: Tensor | None = None,
    ) -> Tensor:
        """The context.

        Args:
            q, k, v: float [batch, heads, n, d], [batch, heads, m, d], [batch, heads, m, e], before their signs.
            mask: bool (True: attend) or additive, broadcast to [batch, heads, n, m], or None.
            scaling: of the scores; None for 1 / sqrt(d).
            dropout: instead of the module's own, in training mode.
            addend, value_addend: of "elastic", see `bitmill.binarize.elastic_attention`.
        Returns:
            [batch, heads, n, e] of q's dtype.
        Raises:
            ValueError: for shapes, dtypes or masks that do not fit.
        """
        if self.head_dim is not None and q.shape[-1:] != (self.head_dim,):
            raise ValueError(f"BinaryAttention: q must have heads of {self.head_dim} columns, got {list(q.shape)}")
        rate = (self.dropout if dropout is None else dropout) if self.training else 0.0
        if self.kind == "elastic":
            step_q, step_k, step_v, step_a = self._steps(q, k, v)
            return elastic_attention(
                q, k, v, step_q, step_k, step_v, step_a, mask, scaling, self.zero, rate, addend, value_addend
            )
        if addend is not None or value_addend is not None:
            raise ValueError(f"BinaryAttention: addend and value_addend go with kind elastic, got {self.kind}")
        if self.kind == "bool":
            return bool_attention(q, k, v, mask, scaling, self.zero, rate)
        return softmax_aware_attention(
            q, k, v, mask, scaling, self.beta, self.zero, rate, self.row_scale and self.training
        )

    def _steps(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """The four steps; before the first training batch the values that the first-use rule gives for this input."""
        steps, ready = [self.alpha_q, self.alpha_k, self.alpha_v, self.alpha_a], self.alpha_ready
        known = ready.device.type == "cpu" and not torch.compiler.is_compiling() and bool(ready)
        if known or q.numel() == 0 or k.numel() == 0 or v.numel() == 0:  # an empty batch has no mean
            return [alpha.float() for alpha in steps]
        first = [elastic_alpha(t.detach().float()) for t in (q, k, v)]
        first.append(first[0].new_full((), 4 / k.shape[-2]))  # 4 mean P: the probabilities of a row sum to 1
        if self.training:
            first = list(agreed(torch.stack(first), ready).unbind())
        values = [
            torch.where(ready, alpha.detach().float(), start.clamp_min(ALPHA_FLOOR))
            for alpha, start in zip(steps, first, strict=True)
        ]
        if not self.training:
            return values
        with torch.no_grad():
            for alpha, value in zip(steps, values, strict=True):
                alpha.copy_(value)
            ready.fill_(True)
        return [alpha.float() for alpha in steps]

    def extra_repr(self) -> str:
        beta = f", beta={self.beta}, row_scale={self.row_scale}" if self.kind == "softmax_aware" else ""
        return f"{self.kind}{beta}, zero={self.zero}, dropout={self.dropout}"
