# SPDX-License-Identifier: Apache-2.0
"""Binarizers: the rules of the published methods as data, and their forward and straight-through gradient."""

from .activations import (
    QuantizedActivation,
    Thresholds,
    quantize_activation,
    quantized_linear,
    threshold_code,
    threshold_levels,
)
from .attention import (
    bool_attention,
    elastic_attention,
    elastic_map_attention,
    low_rank_addend,
    softmax_aware_attention,
)
from .attention_maps import one_hot_map, sampled_map, softmax_aware_map
from .functions import BinarizedWeight, binarize_weight, boolean, elastic, elastic_alpha, sign, weight_scale
from .levels import learned_noise, standardised
from .methods import method, method_names, register_method
from .products import exact_linear, level_product, weight_linear
from .rules import ActivationRule, ConvRule, Method, WeightRule
from .schedules import FollowsEpoch, epoch_numbers, set_epoch

__all__ = [
    "ActivationRule",
    "BinarizedWeight",
    "ConvRule",
    "FollowsEpoch",
    "Method",
    "QuantizedActivation",
    "Thresholds",
    "WeightRule",
    "binarize_weight",
    "bool_attention",
    "boolean",
    "elastic",
    "elastic_alpha",
    "elastic_attention",
    "elastic_map_attention",
    "epoch_numbers",
    "exact_linear",
    "learned_noise",
    "level_product",
    "low_rank_addend",
    "method",
    "method_names",
    "one_hot_map",
    "quantize_activation",
    "quantized_linear",
    "register_method",
    "sampled_map",
    "set_epoch",
    "sign",
    "softmax_aware_attention",
    "softmax_aware_map",
    "standardised",
    "threshold_code",
    "threshold_levels",
    "weight_linear",
    "weight_scale",
]
