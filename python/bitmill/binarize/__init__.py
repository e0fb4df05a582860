# SPDX-License-Identifier: Apache-2.0
"""Binarizers: the rules of the published methods as data, and their forward and straight-through gradient."""

from .attention import bool_attention, elastic_attention, low_rank_addend, softmax_aware_attention
from .attention_maps import one_hot_map, sampled_map, softmax_aware_map
from .functions import (
    BinarizedWeight,
    binarize_weight,
    boolean,
    elastic,
    elastic_alpha,
    sign,
    weight_scale,
)
from .products import exact_linear, level_product
from .rules import ActivationRule, Method, WeightRule, method, method_names, register_method

__all__ = [
    "ActivationRule",
    "BinarizedWeight",
    "Method",
    "WeightRule",
    "binarize_weight",
    "bool_attention",
    "boolean",
    "elastic",
    "elastic_alpha",
    "elastic_attention",
    "exact_linear",
    "level_product",
    "low_rank_addend",
    "method",
    "method_names",
    "one_hot_map",
    "register_method",
    "sampled_map",
    "sign",
    "softmax_aware_attention",
    "softmax_aware_map",
    "weight_scale",
]
