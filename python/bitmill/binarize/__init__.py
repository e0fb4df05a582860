# SPDX-License-Identifier: Apache-2.0
"""Binarizers: the rules of the published methods as data, and their forward and straight-through gradient."""

from .functions import (
    BinarizedWeight,
    binarize_weight,
    boolean,
    elastic,
    elastic_alpha,
    exact_linear,
    sign,
    weight_scale,
)
from .rules import ActivationRule, Method, WeightRule, method, method_names, register_method

__all__ = [
    "ActivationRule",
    "BinarizedWeight",
    "Method",
    "WeightRule",
    "binarize_weight",
    "boolean",
    "elastic",
    "elastic_alpha",
    "exact_linear",
    "method",
    "method_names",
    "register_method",
    "sign",
    "weight_scale",
]
