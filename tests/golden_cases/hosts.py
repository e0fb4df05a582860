# SPDX-License-Identifier: Apache-2.0
"""Transformers' own BERT as the host of recorded layers, converted by the recipes. Needs transformers 5."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .common import Case

PLACES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "i": "intermediate.dense",
    "f": "output.dense",
    "ln1": "attention.output.LayerNorm",
    "ln2": "output.LayerNorm",
}
SMALL = {
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
    "vocab_size": 8,
    "num_hidden_layers": 1,
    "max_position_embeddings": 8,
    "intermediate_size": 4,
}
OURS = {"move": "shift", "alpha": "alpha", "weight": "weight", "bias": "bias"}


def _import(name: str) -> Any:
    pytest.importorskip("transformers", minversion="5", reason="these comparisons need transformers 5 as the host")
    return importlib.import_module(name)


def recipe(name: str) -> Any:
    """A module of bitmill.recipes."""
    return _import(f"bitmill.recipes.{name}")


def integration() -> Any:
    return _import("bitmill.integrations.transformers")


def bert(**sizes: int) -> Any:
    """A BERT of the given sizes, without dropout, in eval mode."""
    host = _import("transformers")
    return host.BertModel(host.BertConfig(**{**SMALL, **sizes})).eval()


def bert_classifier(**sizes: int) -> Any:
    host = _import("transformers")
    return host.BertForSequenceClassification(host.BertConfig(**{**SMALL, **sizes})).eval()


def bert_of_layer(case: Case) -> Any:
    """A BERT of one layer, of the size that the case's parameters have."""
    width = case["par_q_weight"].shape[0]
    inner = case["par_i_weight"].shape[0] if "par_i_weight" in case else 4
    return bert(hidden_size=width, num_attention_heads=int(case.number("hp_heads")), intermediate_size=inner)


def parameters_of_layer(layer: nn.Module, case: Case) -> dict[str, nn.Parameter]:
    """The layer's parameters by the names of the case, with the case's values; learned steps are marked as set."""
    found: dict[str, nn.Parameter] = {}
    for name in case.arrays:
        place, _, part = name.removeprefix("par_").rpartition("_")
        if not name.startswith("par_") or part == "wscale" or (place not in PLACES and place != "alpha"):
            continue
        path = f"attention.self.binary_attention.alpha_{part}" if place == "alpha" else f"{PLACES[place]}.{OURS[part]}"
        found[name.removeprefix("par_")] = layer.get_parameter(path)
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(case[f"par_{name}"].reshape(parameter.shape))
        for name, buffer in layer.named_buffers():
            if name.endswith("alpha_ready"):
                buffer.fill_(True)
    return found


@contextmanager
def recorded(module: nn.Module, names: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of submodules, by the given names, while the context lasts."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    handles = [module.get_submodule(path).register_forward_hook(keep(name)) for path, name in names.items()]
    yield outputs
    for handle in handles:
        handle.remove()


def key_mask(case: Case) -> Tensor:
    """[batch, 1, 1, n], True at kept keys."""
    return case["in_keep"].bool()[:, None, None]
