# SPDX-License-Identifier: Apache-2.0
"""Binary attention in a host model, whichever library it comes from."""

from __future__ import annotations

from torch import nn


def set_attention_(model: nn.Module, kind: str) -> None:
    """Make all self-attention of a transformers or timm model binary, of one kind ("bool", "softmax_aware", ...)."""
    if hasattr(model, "set_attn_implementation"):
        from ..integrations import transformers

        transformers.set_attention_(model, kind)
    else:
        from ..integrations import timm

        timm.binarize_attention_(model, kind)
