# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers in training form, and both packed forms of one."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import bitmill
from bitmill import BinaryConfig, pack_
from bitmill.chained import Chained, chains
from bitmill.recipes import bibert, bipft, bit, bivit


def bert(kind: str = "bibert", layers: int = 2, **options: Any) -> nn.Module:
    """A small BERT with biases that are not 0, in eval mode and training form."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192, "max_position_embeddings": 96}
    config = transformers.BertConfig(vocab_size=300, num_hidden_layers=layers, **{**sizes, **options})
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1)
    if kind in ("bit", "bipft"):
        (bit if kind == "bit" else bipft).binarize_(model)
        model.train()
        model(**texts()).logits.sum().backward()  # sets the steps
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("shift"):
                    p.normal_(0, 0.1)
    elif kind == "bivit":
        bitmill.integrations.transformers.set_attention_(model, "softmax_aware")
        bitmill.integrations.transformers.quantize_body_(model, BinaryConfig("bivit"))
    else:
        bibert.binarize_(model)
    return model.eval()


def texts(*lengths: int, n: int | None = None) -> dict[str, Tensor]:
    lengths = lengths or (40, 7, 33, 1)
    n = n or max(lengths)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(1, 300, mask.shape), "attention_mask": mask.long()}


KINDS = ("bibert", "bit", "bivit")


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Packed layer by layer, and in chains."""
    plain, chained = copy.deepcopy(model), copy.deepcopy(model)
    pack_(plain, chain=False)
    pack_(chained)
    assert not any(isinstance(m, Chained) for m in plain.modules())
    assert dict(chains(chained)) == dict.fromkeys(dict(chains(chained)), "")
    return plain, chained


def vit(mlp_act_bits: int = 1, **options: Any) -> nn.Module:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192, "image_size": 40, "patch_size": 8}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(num_hidden_layers=2, num_labels=7, **{**sizes, **options})
    )
    bivit.binarize_(model, mlp_act_bits=mlp_act_bits)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1)
    return model.eval()
