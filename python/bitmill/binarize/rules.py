# SPDX-License-Identifier: Apache-2.0
"""The words in which a binarizer is declared; methods.py is the table of the published ones.

A weight is prepared (centred, redistributed), divided by a scale and becomes levels; its gradient passes a surrogate
window and may carry the scale. An activation is shifted, becomes levels of its scale, and passes another window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..ops._surrogates import SURROGATES
from .schedules import SCHEDULES

FLOAT_BITS = 32


def _require_one_of(rule: Any, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(rule, field)
    if value not in allowed:
        raise ValueError(f"{type(rule).__name__}: {field} must be one of {', '.join(allowed)}, got {value!r}")


def _require(rule: Any, field: str, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"{type(rule).__name__}: {field} must be {expected}, got {getattr(rule, field)!r}")


def _is_bits(value: object) -> bool:
    return type(value) is int and 1 <= value <= 8


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """How a weight [n, k] is binarised.

    Attributes:
        centre: subtracted first: "none", "row" mean (gradients flow through it) or "global" mean (detached).
        scale: "row" mean |W|, "row_centred" mean |W - centre|, "tensor" mean |W|, "row_max" max |W| (all detached),
            "none" 1, or "learned": a parameter that starts as the row mean |W|.
        surrogate: window on the prepared weight, see `bitmill.ops._surrogates.surrogate_slope`.
        carries_scale: whether the gradient of the weight is multiplied by the scale.
        levels: what is multiplied by the scale. "sign" -1, 0, +1 by sign; "ternary" -1, 0, +1 by rounding; "mid_rise"
            (StatsQ) and "uniform" (N2UQ) the odd whole numbers -(2^b - 1) ... 2^b - 1, which are b signs worth 1, 2,
            4, ...; "integer" -(2^(b-1) - 1) ... 2^(b-1) - 1, which have no packed form; "residual" the sign of the
            weight and the signs of what the planes before leave, each with a learned scale.
        bits: b.
        scale_factor: multiplies the statistic of `scale`.
        window: half the width of the surrogate's window.
        divides_span: whether the gradient is divided by the largest value that the row can take (N2UQ).
        redistribute: ReCU's chain after the centre: every row is divided by its standard deviation and clamped at a
            quantile that follows the epoch; gradients flow through both.
    """

    centre: str = "none"
    scale: str = "row"
    surrogate: str = "clip"
    carries_scale: bool = False
    levels: str = "sign"
    bits: int = 1
    scale_factor: float = 1.0
    window: float = 1.0
    divides_span: bool = False
    redistribute: bool = False

    def __post_init__(self) -> None:
        _require_one_of(self, "centre", ("none", "row", "global"))
        _require_one_of(self, "scale", ("none", "row", "row_centred", "tensor", "row_max", "learned"))
        _require_one_of(self, "surrogate", SURROGATES)
        _require_one_of(self, "levels", ("sign", "ternary", "mid_rise", "uniform", "integer", "residual"))
        _require(self, "bits", _is_bits(self.bits), "a whole number from 1 to 8")
        _require(self, "bits", self.bits == 1 or self.levels != "sign", "1 for levels 'sign'")
        _require(self, "scale", self.levels != "residual" or self.scale == "learned", "'learned' for levels 'residual'")
        _require(self, "scale", (self.levels == "integer") == (self.scale == "row_max"), "'row_max' for whole numbers")
        learned = self.scale == "learned" and (self.surrogate == "fourier" or self.levels not in ("sign", "residual"))
        _require(self, "scale", not learned, f"a statistic for levels {self.levels!r} and surrogate {self.surrogate!r}")

    @property
    def planes(self) -> int:
        """Planes of signs that the packed form holds; 0 for none."""
        if self.levels == "integer":
            return 0
        return self.bits if self.levels in ("mid_rise", "uniform", "residual") else 1


@dataclasses.dataclass(frozen=True)
class ActivationRule:
    """How an activation [..., k] is quantised.

    Attributes:
        shift: a learned vector [k] that is added first: "none", "added", or "gradient" if only the window of the
            gradient sees it, as in BiBench's linear layer of ReActNet.
        scale: of signs: "none" 1, or "row_mean" mean |x| of each row (detached). Of b-bit levels: "learned" one elastic
            step a layer; "tensor_range" and "row_range" from the largest magnitude (signed) or from minimum to maximum
            (unsigned) of the tensor or of each row; "thresholds" learned thresholds and uniform levels (N2UQ).
        surrogate: window on the shifted activation (divided by a learned scale).
        bits: the widths that this rule serves, the usual one first.
        narrow: elastic levels leave out the lowest (signed) or highest (unsigned) code, as in TBT.
        window: half the width of the window of a range's gradient; a tensor's range is clipped to it, too.
        standardise: in training, divide each row by its standard deviation (ReCU); no sign changes.
    """

    shift: str = "none"
    scale: str = "none"
    surrogate: str = "clip"
    bits: tuple[int, ...] = (1,)
    narrow: bool = False
    window: float = 1.0
    standardise: bool = False

    def __post_init__(self) -> None:
        _require_one_of(self, "shift", ("none", "added", "gradient"))
        scales = ("none", "row_mean", "learned", "tensor_range", "row_range", "thresholds")
        _require_one_of(self, "scale", scales)
        _require_one_of(self, "surrogate", SURROGATES)
        valid = isinstance(self.bits, tuple) and len(self.bits) > 0 and all(_is_bits(b) for b in self.bits)
        _require(self, "bits", valid, "a tuple of whole numbers from 1 to 8")
        _require(self, "bits", self.bits == (1,) or self.scale in scales[2:], f"(1,) for scale {self.scale!r}")

    @property
    def only_signs(self) -> bool:
        """Whether the value is the sign of the shifted activation, or that times the mean of the row."""
        return self.scale in ("none", "row_mean") and self.shift != "gradient"

    @property
    def has_unsigned(self) -> bool:
        """Whether there is a choice between levels around 0 and levels from 0 up."""
        return self.scale in ("learned", "tensor_range", "row_range")


@dataclasses.dataclass(frozen=True)
class ConvRule:
    """What a method does differently in a convolution, where rows of weights are filters [in / groups, height, width].

    Attributes:
        weight, activation: the rules for 1-bit weights and activations; None for those of linear layers. The shift is
            one number a channel.
        sample_scale: activations are multiplied by mean |x| of their sample, which their gradient does not carry
            (XNOR-Net). A linear rule with scale "row_mean" becomes this.
        map_scales: outputs are multiplied by learned scales of their row and column, too (XNOR-Net++).
        scales_bias: the learned scale of the weight multiplies the bias, too (ReCU).
    """

    weight: WeightRule | None = None
    activation: ActivationRule | None = None
    sample_scale: bool = False
    map_scales: bool = False
    scales_bias: bool = False

    def __post_init__(self) -> None:
        _require(self, "weight", self.weight is None or self.weight.bits == 1, "None or a rule for 1 bit")
        scale = None if self.activation is None else self.activation.scale
        _require(
            self, "activation", scale in (None, "none", "learned"), "None or a rule with scale 'none' or 'learned'"
        )


@dataclasses.dataclass(frozen=True)
class Method:
    """A published binarizer: rules for linear weights, their activations, and embedding tables; and its source.

    Attributes:
        weights, activations: rules for further bit widths.
        schedules: what follows the epoch, names of `bitmill.binarize.schedules.SCHEDULES`.
        noise: whether learned noise is added to weights and activations in training, times the schedule "noise" (FDA).
        conv: what is different in convolutions.
    """

    name: str
    source: str
    weight: WeightRule
    activation: ActivationRule
    embedding: WeightRule
    weights: tuple[WeightRule, ...] = ()
    activations: tuple[ActivationRule, ...] = ()
    schedules: tuple[str, ...] = ()
    noise: bool = False
    conv: ConvRule = ConvRule()

    def __post_init__(self) -> None:
        unknown = [name for name in self.schedules if name not in SCHEDULES]
        _require(self, "schedules", not unknown, f"names among {', '.join(SCHEDULES)}")
        for field, all_bits in (("weights", self.weight_bits), ("activations", self.act_bits)):
            _require(self, field, len(set(all_bits)) == len(all_bits), "one rule for each number of bits")

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Widths of weights, the usual one first."""
        return tuple(rule.bits for rule in (self.weight, *self.weights))

    @property
    def act_bits(self) -> tuple[int, ...]:
        """Widths of activations, the usual one first; 32 are floats."""
        return (*(b for rule in (self.activation, *self.activations) for b in rule.bits), FLOAT_BITS)

    def weight_rule(self, bits: int) -> WeightRule:
        """The rule for linear weights of this many bits."""
        return next(rule for rule in (self.weight, *self.weights) if rule.bits == bits)

    def activation_rule(self, bits: int) -> ActivationRule:
        """The rule for activations of this many bits; the empty rule for floats."""
        rules = (self.activation, *self.activations)
        return next((rule for rule in rules if bits in rule.bits), ActivationRule())

    def conv_weight_rule(self, bits: int) -> WeightRule:
        """The rule for filters of this many bits."""
        return self.conv.weight if bits == 1 and self.conv.weight is not None else self.weight_rule(bits)

    def conv_activation_rule(self, bits: int) -> ActivationRule:
        """The rule for images of this many bits; the empty rule for floats."""
        if bits == 1 and self.conv.activation is not None:
            return self.conv.activation
        rule = self.activation_rule(bits)
        return dataclasses.replace(rule, scale="none") if rule.scale == "row_mean" else rule

    @property
    def has_sample_scale(self) -> bool:
        """Whether 1-bit images are multiplied by their mean magnitude."""
        return self.conv.sample_scale or (self.conv.activation is None and self.activation.scale == "row_mean")

    def table_rule(self, bits: int) -> WeightRule:
        """The rule for embedding tables beside weights of this many bits: one plane, so ternary or 1 bit."""
        rule = self.weight_rule(bits)
        return rule if rule.levels == "ternary" else self.embedding
