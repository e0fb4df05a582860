# SPDX-License-Identifier: Apache-2.0
"""Binarizers as data: one row a method, one implementation for all (functions.py). A new method is a new row.

A weight becomes scale * sgn(weight - centre); its gradient passes a surrogate window and may carry the scale. An
activation is shifted, becomes levels of its scale, and its gradient passes another window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..ops.binary_matmul import SURROGATES


def _require_one_of(rule: Any, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(rule, field)
    if value not in allowed:
        raise ValueError(f"{type(rule).__name__}: {field} must be one of {', '.join(allowed)}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """How a weight [n, k] is binarised.

    Attributes:
        centre: subtracted before the sign: "none", "row" mean (gradients flow through it) or "global" mean (detached).
        scale: "row" mean |W|, "row_centred" mean |W - centre|, "tensor" mean |W| (all detached), "none" 1, or
            "learned": a parameter that starts as the row mean |W|.
        surrogate: window on the centred weight, see `bitmill.ops.binary_matmul.surrogate_slope`.
        carries_scale: whether the gradient of the weight is multiplied by the scale.
    """

    centre: str = "none"
    scale: str = "row"
    surrogate: str = "clip"
    carries_scale: bool = False

    def __post_init__(self) -> None:
        _require_one_of(self, "centre", ("none", "row", "global"))
        _require_one_of(self, "scale", ("none", "row", "row_centred", "tensor", "learned"))
        _require_one_of(self, "surrogate", SURROGATES)


@dataclasses.dataclass(frozen=True)
class ActivationRule:
    """How an activation [..., k] is binarised.

    Attributes:
        shift: a learned vector [k] that is added first: "none", "added", or "gradient" if only the window of the
            gradient sees it, as in BiBench's linear layer of ReActNet.
        scale: "none" 1, "row_mean" mean |x| of each row (detached), or "learned": one elastic step per layer.
        surrogate: window on the shifted activation (divided by a learned scale).
    """

    shift: str = "none"
    scale: str = "none"
    surrogate: str = "clip"

    def __post_init__(self) -> None:
        _require_one_of(self, "shift", ("none", "added", "gradient"))
        _require_one_of(self, "scale", ("none", "row_mean", "learned"))
        _require_one_of(self, "surrogate", SURROGATES)


@dataclasses.dataclass(frozen=True)
class Method:
    """A published binarizer: rules for linear weights, their activations, and embedding tables; and its source."""

    name: str
    source: str
    weight: WeightRule
    activation: ActivationRule
    embedding: WeightRule


_BIVIT = WeightRule(centre="row", scale="row", surrogate="clip_open", carries_scale=True)

_DOREFA = WeightRule(surrogate="clip_open", carries_scale=True)

_METHODS = {
    m.name: m
    for m in (
        Method(
            "bibert",
            "Qin et al., BiBERT: Accurate Fully Binarized BERT, ICLR 2022, as its code computes it",
            weight=WeightRule(centre="row", scale="row", surrogate="clip"),
            activation=ActivationRule(surrogate="clip"),
            embedding=WeightRule(centre="row", scale="row", surrogate="clip"),
        ),
        Method(
            "bit",
            "Liu et al., BiT: Robustly Binarized Multi-distilled Transformer, NeurIPS 2022",
            weight=WeightRule(centre="global", scale="tensor", surrogate="identity"),
            activation=ActivationRule(shift="added", scale="learned", surrogate="clip"),
            embedding=WeightRule(centre="global", scale="row", surrogate="identity"),
        ),
        Method(
            "bivit",
            "He et al., BiViT: Extremely Compressed Binary Vision Transformers, ICCV 2023, analytic scales",
            weight=_BIVIT,
            activation=ActivationRule(surrogate="clip_open"),
            embedding=_BIVIT,
        ),
        Method(
            "bivit_pws",
            "He et al., BiViT, ICCV 2023, parameterized weight scales",
            weight=dataclasses.replace(_BIVIT, scale="learned"),
            activation=ActivationRule(surrogate="clip_open"),
            embedding=_BIVIT,
        ),
        Method(
            "xnor",
            "Rastegari et al., XNOR-Net, ECCV 2016, as BiBench's linear layer computes it",
            weight=WeightRule(centre="row", scale="row_centred", surrogate="clip", carries_scale=True),
            activation=ActivationRule(scale="row_mean", surrogate="clip"),
            embedding=WeightRule(centre="row", scale="row_centred", surrogate="clip", carries_scale=True),
        ),
        Method(
            "bnn",
            "Courbariaux et al., Binarized Neural Networks, NeurIPS 2016: signs without a scale",
            weight=WeightRule(scale="none"),
            activation=ActivationRule(),
            embedding=WeightRule(scale="none"),
        ),
        Method(
            "dorefa",
            "Zhou et al., DoReFa-Net, 2016, 1 bit, a scale a row as in BiBench (the paper has one a layer)",
            weight=_DOREFA,
            activation=ActivationRule(surrogate="clip_open"),
            embedding=_DOREFA,
        ),
        Method(
            "bireal",
            "Liu et al., Bi-Real Net, ECCV 2018: a polynomial window on activations",
            weight=WeightRule(),
            activation=ActivationRule(surrogate="polynomial"),
            embedding=WeightRule(),
        ),
        Method(
            "xnorpp",
            "Bulat and Tzimiropoulos, XNOR-Net++, BMVC 2019: learned output scales, here from the row means on",
            weight=WeightRule(scale="learned", surrogate="clip_open", carries_scale=True),
            activation=ActivationRule(surrogate="clip_open"),
            embedding=WeightRule(surrogate="clip_open", carries_scale=True),
        ),
        Method(
            "react",
            "Liu et al., ReActNet, ECCV 2020: a learned shift before the sign",
            weight=WeightRule(),
            activation=ActivationRule(shift="added", surrogate="polynomial"),
            embedding=WeightRule(),
        ),
        Method(
            "react_bibench",
            "ReActNet as BiBench's linear layer computes it: the shift moves the window of the gradient only",
            weight=WeightRule(),
            activation=ActivationRule(shift="gradient", surrogate="polynomial"),
            embedding=WeightRule(),
        ),
        Method(
            "binaryvit",
            "Le and Li, BinaryViT, CVPRW 2023",
            weight=WeightRule(centre="row"),
            activation=ActivationRule(surrogate="polynomial"),
            embedding=WeightRule(centre="row"),
        ),
        Method(
            "sign",
            "the sign times the mean magnitude of the row (binary weight networks; Courbariaux et al. 2016)",
            weight=WeightRule(),
            activation=ActivationRule(),
            embedding=WeightRule(),
        ),
    )
}


def register_method(new: Method) -> None:
    """Add a method under its name, so that BinaryConfig accepts it. Files that name it load where it is registered.

    Raises:
        ValueError: if the name is taken, or no Python identifier.
    """
    if not isinstance(new, Method) or not new.name.isidentifier():
        raise ValueError(f"register_method: expected a Method whose name is an identifier, got {new!r}")
    if new.name in _METHODS:
        raise ValueError(f"register_method: the name {new.name!r} is taken; choose another one")
    _METHODS[new.name] = new


def method_names() -> tuple[str, ...]:
    """Names that BinaryConfig(method=...) accepts."""
    return tuple(_METHODS)


def method(name: str) -> Method:
    """The rules of a method.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {name!r}")
    return _METHODS[name]
