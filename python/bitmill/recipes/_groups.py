# SPDX-License-Identifier: Apache-2.0
"""Which linear layers of a transformer belong to its attention and which to its MLP, from their names."""

from __future__ import annotations

GROUPS = ("attn", "mlp")
_ATTENTION = {"attention", "attn", "self_attn"}
_MLP = {"mlp", "intermediate", "output", "ffn"}


def group_of(name: str) -> str | None:
    """The group of a layer by its dotted name; None for embeddings, poolers, classifiers and what else is outside.

    Names of transformers' and timm's ViT, Swin, DeiT and BERT: "vit.layers.0.attention.q_proj", "blocks.0.attn.qkv",
    "blocks.0.mlp.fc1", "encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense".
    """
    parts = set(name.split("."))
    if parts & _ATTENTION:
        return "attn"
    return "mlp" if parts & _MLP else None
