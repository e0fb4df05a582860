# SPDX-License-Identifier: Apache-2.0
"""Binarizers as data: one row a method, one implementation for all (functions.py, levels.py, activations.py).

A new method is a new row. What the words of a row mean: rules.py.
"""

from __future__ import annotations

import dataclasses

from .rules import ActivationRule, ConvRule, Method, WeightRule

_BIVIT = WeightRule(centre="row", scale="row", surrogate="clip_open", carries_scale=True)
_DOREFA = WeightRule(surrogate="clip_open", carries_scale=True)
_FDA = WeightRule(surrogate="fourier", carries_scale=True)
_RECU = WeightRule(centre="row", scale="learned", surrogate="identity", carries_scale=True, redistribute=True)
_SIGN_IDENTITY = WeightRule(surrogate="identity")
_LLMQAT = WeightRule(levels="integer", scale="row_max", surrogate="clip_open", window=2.0, bits=4)
_BINARYDM = WeightRule(levels="residual", scale="learned", carries_scale=True)


def _stats_q(bits: int) -> WeightRule:
    return WeightRule(levels="mid_rise", surrogate="identity", bits=bits, scale_factor=0.5 ** (bits - 1))


def _n2uq(bits: int) -> WeightRule:
    return dataclasses.replace(_stats_q(bits), levels="uniform", divides_span=True)


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
            activation=ActivationRule(shift="added", scale="learned", bits=(1, 2, 4)),
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
            conv=ConvRule(WeightRule(), ActivationRule(), sample_scale=True),
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
            conv=ConvRule(WeightRule(), ActivationRule()),
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
            conv=ConvRule(WeightRule(scale="learned", carries_scale=True), ActivationRule(), map_scales=True),
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
            conv=ConvRule(activation=ActivationRule(shift="added", surrogate="polynomial")),
        ),
        Method(
            "binaryvit",
            "Le and Li, BinaryViT, CVPRW 2023",
            weight=WeightRule(centre="row"),
            activation=ActivationRule(surrogate="polynomial"),
            embedding=WeightRule(centre="row"),
            conv=ConvRule(WeightRule()),
        ),
        Method(
            "recu",
            "Xu et al., ReCU, ICCV 2021, as BiBench's linear layer computes it; output scales from the row means on",
            weight=_RECU,
            activation=ActivationRule(surrogate="polynomial", standardise=True),
            embedding=WeightRule(centre="row"),
            schedules=("tau",),
            conv=ConvRule(scales_bias=True),
        ),
        Method(
            "fda",
            "Xu et al., Learning Frequency Domain Approximation for Binary Neural Networks, NeurIPS 2021",
            weight=_FDA,
            activation=ActivationRule(surrogate="fourier"),
            embedding=_FDA,
            schedules=("terms", "noise"),
            noise=True,
        ),
        Method(
            "tbt",
            "Liu et al., Binary and Ternary Natural Language Generation, ACL 2023",
            weight=_SIGN_IDENTITY,
            activation=ActivationRule(scale="learned", bits=(1, 2), narrow=True),
            embedding=_SIGN_IDENTITY,
            weights=(WeightRule(levels="ternary", surrogate="identity", bits=2, scale_factor=4 / 3),),
            activations=(ActivationRule(scale="tensor_range", surrogate="clip_open", bits=(8,), window=2.5),),
        ),
        Method(
            "llmqat",
            "Liu et al., LLM-QAT, Findings of ACL 2024",
            weight=_SIGN_IDENTITY,
            activation=ActivationRule(scale="row_range", surrogate="clip_open", bits=(8,), window=2.0),
            embedding=_SIGN_IDENTITY,
            weights=(_stats_q(2), _LLMQAT, dataclasses.replace(_LLMQAT, bits=8)),
        ),
        Method(
            "n2uq",
            "Liu et al., Nonuniform-to-Uniform Quantization, CVPR 2022, equations 5 to 8",
            weight=_n2uq(1),
            activation=ActivationRule(scale="thresholds", bits=(1, 2, 3, 4)),
            embedding=WeightRule(),
            weights=tuple(_n2uq(bits) for bits in (2, 3, 4)),
        ),
        Method(
            "statsq",
            "Liu et al., Oscillation-free Quantization, ICML 2023: StatsQ; one elastic step a layer for activations",
            weight=_stats_q(2),
            activation=ActivationRule(scale="learned", bits=(2, 3, 4)),
            embedding=_SIGN_IDENTITY,
            weights=(_stats_q(3), _stats_q(4)),
        ),
        Method(
            "binarydm",
            "Zheng et al., BinaryDM, 2024 (arXiv v1): one or, with 2 bits, two planes of signs with learned scales",
            weight=_BINARYDM,
            activation=ActivationRule(scale="learned", bits=(8, 4)),
            embedding=WeightRule(carries_scale=True),
            weights=(dataclasses.replace(_BINARYDM, bits=2),),
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
