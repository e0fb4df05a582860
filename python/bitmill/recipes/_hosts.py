# SPDX-License-Identifier: Apache-2.0
"""Binary attention in a host model, whichever library it comes from."""

from __future__ import annotations

from typing import Any

from torch import nn


def set_attention_(model: nn.Module, kind: str, **options: Any) -> None:
    """Make all self-attention of a transformers or timm model binary.

    Args:
        kind: "bool", "softmax_aware", "elastic", or a name given to transformers' `register_attention`.
        options: of `nn.BinaryAttention`.
    """
    if hasattr(model, "set_attn_implementation"):
        from ..integrations import transformers

        if options or kind == "elastic":
            transformers.attach_attention_(model, kind, **options)
        else:
            transformers.set_attention_(model, kind)
    else:
        from ..integrations import timm

        timm.binarize_attention_(model, kind, **options)
