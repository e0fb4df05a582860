# SPDX-License-Identifier: Apache-2.0
"""The models of `bitmill bench --model`: architectures of transformers with random weights, nothing downloaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.transformers import transformers

Inputs = dict[str, Tensor]

SPREAD = 0.05  # standard deviation of what a fresh model has as zeros


class Architecture(NamedTuple):
    """A classifier of transformers, the options of its config, and the method that a bench takes by itself."""

    model: str
    config: str
    method: str
    options: dict[str, int]


def _bert(**options: int) -> Architecture:
    return Architecture("BertForSequenceClassification", "BertConfig", "bibert", options)


def _deit(width: int) -> Architecture:
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return Architecture("ViTForImageClassification", "ViTConfig", "bivit", {**sizes, "num_labels": 1000})


ARCHITECTURES = {
    "bert-base": _bert(),
    "minilm": _bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "deit-t": _deit(192),
    "deit-s": _deit(384),
    "deit-b": _deit(768),
}


def config_of(name: str) -> Any:
    """The config of a model of transformers."""
    architecture = ARCHITECTURES[name]
    return getattr(transformers, architecture.config)(**architecture.options)


def random_model(name: str) -> nn.Module:
    """A float32 model in eval mode. What is exactly 0 in a fresh model and never in a trained one is drawn too: biases,
    the row of the padding token, a weight here and there."""
    model = getattr(transformers, ARCHITECTURES[name].model)(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            zero = parameter == 0
            parameter[zero] = SPREAD * torch.randn(int(zero.sum()))
    return model.eval()


def empty_model(name: str) -> nn.Module:
    """The same without values, for `bitmill.load`: on the meta device, but for what no file has."""
    with torch.device("meta"):
        model = getattr(transformers, ARCHITECTURES[name].model)(config_of(name))
    for module in model.modules():
        for key in module._non_persistent_buffers_set:
            setattr(module, key, torch.empty_like(getattr(module, key), device="cpu"))
        if module._non_persistent_buffers_set:
            model._init_weights(module)
    return model.eval()


def random_inputs(name: str, lengths: list[int]) -> Inputs:
    """Texts of these lengths, padded to the longest; or as many images."""
    config = config_of(name)
    if not hasattr(config, "vocab_size"):
        return {"pixel_values": torch.randn(len(lengths), 3, config.image_size, config.image_size)}
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, config.vocab_size, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def most_tokens(name: str) -> int | None:
    """How many tokens a text may have; None for a model of images."""
    return getattr(config_of(name), "max_position_embeddings", None)


def image_tokens(name: str) -> int:
    """Patches and the class token."""
    config = config_of(name)
    return (config.image_size // config.patch_size) ** 2 + 1
