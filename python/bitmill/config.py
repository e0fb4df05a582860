# SPDX-License-Identifier: Apache-2.0
"""The configurations that `quantize_` and `from_linear` take: frozen, validated, and plain data in a file."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from .binarize import WeightRule, method_names
from .binarize import method as find_method
from .ops._salient_encoding import STRUCTURES
from .ops.int8 import ACTIVATIONS

MAX_GROUP = 1 << 24  # the widest layer that the ops take


@dataclasses.dataclass(frozen=True)
class Config:
    """What all configurations share. `to_dict` and `from_dict` are exact inverses."""

    def to_dict(self) -> dict[str, Any]:
        return {"config": type(self).__name__, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Raises ValueError for an unknown configuration, an unknown field, or a value out of range."""
        classes = {
            c.__name__: c
            for c in (BinaryConfig, SalientConfig, FP4Config, Int8Config, OneBitConfig, ZonedConfig)
            if issubclass(c, cls)
        }
        name = values.get("config") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in classes:
            known = " or ".join(repr(c) for c in classes)
            raise ValueError(f'{cls.__name__}: expected a dict with "config" {known}, got {shorten(values)}')
        fields = {key: value for key, value in values.items() if key != "config"}
        known_fields = {f.name for f in dataclasses.fields(classes[name])}
        unknown = [key for key in fields if key not in known_fields]
        if unknown:
            raise ValueError(f"{name}: unknown field {shorten(unknown[0])}; a newer bitmill may have written it")
        return classes[name](**fields)

    def takes_activations(self, activations: str) -> bool:
        """Whether a configuration like this one may have them."""
        changed: dict[str, Any] = {"activations": activations}
        try:
            dataclasses.replace(self, **changed)
        except (TypeError, ValueError):  # no such field, or not with the other fields
            return False
        return True

    def _require(self, field: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {field} must be {expected}, got {shorten(getattr(self, field))}")

    def _require_one_of(self, field: str, allowed: tuple[Any, ...], condition: str = "") -> None:
        value = getattr(self, field)
        same_type = any(type(value) is type(a) and value == a for a in allowed)
        self._require(field, same_type, "one of " + ", ".join(repr(a) for a in allowed) + condition)

    def _require_group_size(self) -> None:
        size = getattr(self, "group_size")  # noqa: B009  (only the subclasses have it)
        valid = size is None or (type(size) is int and 0 < size <= MAX_GROUP and size % 32 == 0)
        self._require("group_size", valid, "None or a positive multiple of 32 up to 2**24")


@dataclasses.dataclass(frozen=True)
class BinaryConfig(Config):
    """Weights of 1 bit or a few, with activations of 1 bit, a few, or float ones.

    Attributes:
        method: the binarizer, one of `bitmill.binarize.method_names()`: "bibert", "bit", "bivit", "xnor", "sign", ...
        act_bits: bits of an activation, as the method has them; 32: activations stay floats. None for the method's
            usual number, which then stands here: 1 for most.
        signed: for activations with levels of a step (BiT, TBT, LLM-QAT): around 0 (True) or from 0 up (False; after
            ReLU or softmax).
        zero: what sign(0) of an activation is: "torch" 0, as in the published code; "plus" +1, which packs to one
            plane instead of two.
        group_size: columns that share a weight scale, a multiple of 32; None for the method's own granularity.
        embeddings: let `quantize_` swap nn.Embedding too.
        convs: let `quantize_` swap nn.Conv2d too (1-bit or float images, no group_size).
        activations: for act_bits=32: "float" multiplies activations as they are; "int8" rounds every row to int8 with a
            scale of its own first, in training too (straight-through), which is faster.
        weight_bits: bits of a weight, as the method has them; None for its usual number. 2 is ternary for TBT and two
            planes of signs for the others.
    """

    method: str = "bibert"
    act_bits: int = None  # type: ignore[assignment]  # __post_init__ puts a number here
    signed: bool = True
    zero: str = "torch"
    group_size: int | None = None
    embeddings: bool = False
    activations: str = "float"
    weight_bits: int = None  # type: ignore[assignment]
    convs: bool = False

    def __post_init__(self) -> None:
        self._require_one_of("method", method_names())
        binarizer = find_method(self.method)
        for field, allowed in (("act_bits", binarizer.act_bits), ("weight_bits", binarizer.weight_bits)):
            if getattr(self, field) is None:
                object.__setattr__(self, field, allowed[0])
            self._require_one_of(field, allowed, f" for method {self.method!r}")
        for field, options in (
            ("signed", (True, False)),
            ("zero", ("torch", "plus")),
            ("embeddings", (True, False)),
            ("convs", (True, False)),
        ):
            self._require_one_of(field, options)
        self._require_one_of("activations", ACTIVATIONS)
        self._require_group_size()
        weight, activation = self.weight_rule, binarizer.activation_rule(self.act_bits)
        if self.act_bits == 32:
            activation = binarizer.activation
        self._require("signed", self.signed or activation.has_unsigned, f"True for method {self.method!r}")
        floats = self.act_bits == 32 and weight.planes == 1
        self._require(
            "activations", self.activations == "float" or floats, "'float' unless act_bits=32 and weights are one plane"
        )
        grouped = weight.centre != "global" and weight.scale in ("row", "row_centred") and weight.planes == 1
        grouped = grouped and (self.act_bits in (1, 32) and activation.scale != "thresholds")
        self._require(
            "group_size", self.group_size is None or grouped, f"None for method {self.method!r} with these bits"
        )

    @property
    def weight_rule(self) -> WeightRule:
        """The method's rule for weights of this many bits."""
        return find_method(self.method).weight_rule(self.weight_bits)


@dataclasses.dataclass(frozen=True)
class SalientConfig(Config):
    """PB-LLM's partial binarization: a salient fraction keeps more bits, the rest is alpha sgn(w - mu) + mu.

    Attributes:
        fraction: share of the weights that stays salient, in [0, 1].
        bits: 8 or 4 (codes with a per-row asymmetric min/max, 4 bits two to a byte) or 16 (float16).
        metric: how salience is measured: "magnitude" |w|; "quantile" w itself, half of the fraction from either end of
            the whole matrix (the published training code); or by what an error costs, which `recipes.pb_llm` knows from
            activations: "hessian" w^2 / U_jj^2 (the published code) or "hessian_paper" w^2 / (H^-1)_jj^2 (the paper).
        structure: "element" takes single weights; "column" whole columns, by the sum of their metric: faster and
            smaller for the same fraction, at a loss of accuracy.
        scale: "unbiased" divides by the number of binarised weights, "official" by the group width, as the published
            code does.
        centre: subtract the mean mu of the binarised weights (True) or not (False, mu = 0).
        group_size: columns that share alpha and mu, a multiple of 32; None for the whole row.
        activations: "float" multiplies activations as they are; "int8" rounds every row to int8 with a scale of its own
            first, in training too (straight-through), which is faster.
        granularity: what has an alpha and a mu of its own: a "row" (or its groups), or the "layer", as in the published
            training code.
        surrogate: what stands for the derivative of sgn in training, times alpha: "identity" 1 (the published code),
            "clip" [|w - mu| <= 1] (the paper, equation 2), "ede" 1 - tanh^2(0.1 (w - mu)) (IR-Net).
    """

    fraction: float = 0.1
    bits: int = 8
    metric: str = "magnitude"
    structure: str = "element"
    scale: str = "unbiased"
    centre: bool = True
    group_size: int | None = None
    activations: str = "float"
    granularity: str = "row"
    surrogate: str = "identity"

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, (int, float)) and not isinstance(self.fraction, bool)
        self._require("fraction", number and 0 <= self.fraction <= 1, "a number in [0, 1]")
        self._require_one_of("bits", (4, 8, 16))
        self._require_one_of("metric", ("magnitude", "quantile", "hessian", "hessian_paper"))
        self._require_one_of("structure", STRUCTURES)
        self._require(
            "structure", self.structure == "element" or self.metric != "quantile", "'element' for metric 'quantile'"
        )
        self._require_one_of("activations", ACTIVATIONS)
        self._require_one_of("scale", ("unbiased", "official"))
        self._require_one_of("centre", (True, False))
        self._require_one_of("granularity", ("row", "layer"))
        self._require_one_of("surrogate", ("identity", "clip", "ede"))
        self._require_group_size()
        self._require(
            "group_size", self.group_size is None or self.granularity == "row", "None for granularity 'layer'"
        )


@dataclasses.dataclass(frozen=True)
class FP4Config(Config):
    """4-bit floating-point weights, and activations of as many bits if wanted.

    Attributes:
        format: "e2m1", "e1m2" or "e3m0" with one float scale an output channel; "mxfp4": E2M1 with one E8M0 scale for
            32 columns; "nvfp4": E2M1 with one E4M3 scale for 16 columns and a float scale of all; "nf4" or "bnb-fp4":
            bitsandbytes' tables with one float scale, the largest magnitude, for `group_size` columns.
        scale_rule: for "mxfp4", how a block's scale follows from its largest magnitude: "floor" (the OCP text),
            "rceil", "ceil" or "even".
        activations: "float" multiplies activations as they are; "int8" rounds every row to int8 with a scale of its own
            first, in training too (straight-through), which is faster; not for "nf4" and "bnb-fp4", whose values are
            no integers. "mxfp4" for weights in "mxfp4" and "nvfp4" for "nvfp4" cast them to such blocks. "e2m1",
            "e1m2" or "e3m0", for weights in any of these three, cast them to this format with a scale and shifts of
            the input channels that a layer has to be given (`recipes.llm_fp4`).
        group_size: for "nf4" and "bnb-fp4", columns that share a scale, a multiple of 16, or 0 for a whole row. None
            for the format's usual number, which then stands here: 64 for these two; the rest has no other.
        embeddings: let `quantize_` swap nn.Embedding too.
    """

    format: str = "e2m1"
    scale_rule: str = "floor"
    activations: str = "float"
    group_size: int = None  # type: ignore[assignment]  # __post_init__ puts a number here
    embeddings: bool = False

    STATIC: ClassVar[tuple[str, ...]] = ("e2m1", "e1m2", "e3m0")  # activations with scales known beforehand
    FORMATS: ClassVar[tuple[str, ...]] = (*STATIC, "mxfp4", "nvfp4", "nf4", "bnb-fp4")
    SCALE_RULES: ClassVar[tuple[str, ...]] = ("floor", "rceil", "ceil", "even")

    def __post_init__(self) -> None:
        self._require_one_of("format", self.FORMATS)
        self._require_one_of("scale_rule", self.SCALE_RULES)
        self._require_one_of("embeddings", (True, False))
        integers = self.format not in ("nf4", "bnb-fp4")
        own = self.STATIC if self.format in self.STATIC else (self.format,)
        allowed = (*ACTIVATIONS, *own) if integers else ("float",)
        self._require_one_of("activations", allowed, f" for format {self.format!r}")
        usual = {"mxfp4": 32, "nvfp4": 16, "nf4": 64, "bnb-fp4": 64}.get(self.format, 0)
        if self.group_size is None:
            object.__setattr__(self, "group_size", usual)
        if self.format in ("nf4", "bnb-fp4"):
            valid = type(self.group_size) is int and 0 <= self.group_size <= MAX_GROUP and self.group_size % 16 == 0
            self._require("group_size", valid, "0 (a whole row) or a positive multiple of 16 up to 2**24")
        else:
            self._require_one_of("group_size", (usual,), f" for format {self.format!r}")

    @property
    def static_activations(self) -> bool:
        """Whether a layer has an input_scale and input_shift."""
        return self.activations in self.STATIC


@dataclasses.dataclass(frozen=True)
class Int8Config(Config):
    """8-bit rows, for embeddings and output heads; packed layers only.

    Attributes:
        activations: "float" multiplies activations as they are; "int8" rounds every row to int8 with a scale of its own
            first, which is faster.
    """

    activations: str = "float"

    def __post_init__(self) -> None:
        self._require_one_of("activations", ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class OneBitConfig(Config):
    """OneBit: signs between an input scale and an output scale, and a LayerNorm (arXiv 2402.11295).

    Attributes:
        zero: what the sign of a weight 0 is: "torch" 0, as the published training form has it (a second plane where
            zeros occur); "plus" +1, as its packed form has it.
        activations: "float" multiplies activations as they are; "int8" rounds every row, after the input scale, to int8
            with a scale of its own first, in training too (straight-through), which is faster.
    """

    zero: str = "torch"
    activations: str = "float"

    def __post_init__(self) -> None:
        self._require_one_of("zero", ("torch", "plus"))
        self._require_one_of("activations", ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class ZonedConfig(Config):
    """BiLLM's and ARB-LLM's binarised weights, which exist after training only: `recipes.billm`, `recipes.arb_llm`.

    Attributes:
        block: columns that share salient columns and scales, a multiple of 32.
        centre: whether a zone of a row has a mean mu (BiLLM) or none (ARB-LLM with column scales).
        column_scale: whether every column has a scale.
        split_salient: whether salient columns have a concentrated and a sparse zone too (the column-group bitmap).
        scale_bits: 16 or 32: of a stored mean or scale.
    """

    block: int = 128
    centre: bool = True
    column_scale: bool = False
    split_salient: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        valid = type(self.block) is int and 0 < self.block <= MAX_GROUP and self.block % 32 == 0
        self._require("block", valid, "a positive multiple of 32 up to 2**24")
        for field in ("centre", "column_scale", "split_salient"):
            self._require_one_of(field, (True, False))
        self._require_one_of("scale_bits", (16, 32))


def shorten(value: object) -> str:
    """What an error message says of a value from a stranger."""
    try:
        text = repr(value)
    except Exception:  # too deep, too many digits, or a repr that fails
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
