# SPDX-License-Identifier: Apache-2.0
"""Binarizers as data: one row a method, one implementation for all (functions.py). A new method is a new row.

A weight becomes scale * sgn(weight - centre); its gradient passes a surrogate window and may carry the scale. An
activation is shifted, becomes levels of its scale, and its gradient passes another window.
"""

from __future__ import annotations

import dataclasses


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


@dataclasses.dataclass(frozen=True)
class ActivationRule:
    """How an activation [..., k] is binarised.

    Attributes:
        shift: whether a learned vector [k] is added first.
        scale: "none" 1, "row_mean" mean |x| of each row (detached), or "learned": one elastic step per layer.
        surrogate: window on the shifted activation (divided by a learned scale).
    """

    shift: bool = False
    scale: str = "none"
    surrogate: str = "clip"


@dataclasses.dataclass(frozen=True)
class Method:
    """A published binarizer: rules for linear weights, their activations, and embedding tables; and its source."""

    name: str
    source: str
    weight: WeightRule
    activation: ActivationRule
    embedding: WeightRule


_BIVIT = WeightRule(centre="row", scale="row", surrogate="clip_open", carries_scale=True)

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
            activation=ActivationRule(shift=True, scale="learned", surrogate="clip"),
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
            "sign",
            "the sign times the mean magnitude of the row (binary weight networks; Courbariaux et al. 2016)",
            weight=WeightRule(),
            activation=ActivationRule(),
            embedding=WeightRule(),
        ),
    )
}


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
