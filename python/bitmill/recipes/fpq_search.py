# SPDX-License-Identifier: Apache-2.0
"""LLM-FP4's search in one linear layer: 4-bit formats and scales for its weights and its activations.

y = X W' is to come out of X^ W^', both sides cast to 4-bit floats (ops/fpq.py). A row of W has a scale of its own; X
has one for all and, pre-shifted, another power of two for every input channel; each side has one format. Every round
goes through them in this order, each by trying all its candidates and keeping the first of those with the least error,
while the other side stays as it is: scales of the weights in every format, scales of the activations in every format,
format of the weights, format of the activations. The formats are what takes effect: a round searches next to what the
last one chose. Without shifts (the published baseline) the order is weights, scales and format, then activations.

Candidates of a scale: search="scale": a times the largest magnitude becomes the largest value, a on a geometric grid
from 5/4 down to 5/64, whatever the magnitude. search="paper": as published, gamma b0 for the bias b0 that keeps the
largest magnitude, gamma = 0.01 + i 1.19 / candidates; gamma multiplies the logarithm of a scale, so its reach depends
on the magnitude, and is nothing where b0 = 0. search="minmax": the largest magnitude is kept, nothing is searched.

Errors: "l2" the mean of (y - y^)^2, "l1" of |y - y^|, "cosine" 1 - the cosine of y and y^: over tokens for a row's
scale, over outputs and then on average of the tokens for activations; of formats the mean over all rows.
With "l2" the weights need no products with tokens: with D = W^ - W, err = D X^'X^ D' - 2 D X^'(X - X^) W' + constant.

Source: Liu et al., LLM-FP4: 4-Bit Floating-Point Quantized Transformers, EMNLP 2023, sections 3 and 4, as its published
code computes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import code_values, fp4_cast, fp4_uncast, fpq_bias, fpq_scale, fpq_shift
from ..ops.fp4_activations import channel_scale
from ..ops.fpq import largest_shift

FORMATS = ("e3m0", "e2m1", "e1m2")  # of equal errors the first one wins
SEARCHES = ("scale", "paper", "minmax")
METRICS = ("l2", "l1", "cosine")


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Attributes:
        activations: "fp4", or "float" or "int8" for weights alone.
        shift: pre-shifted exponent biases of the input channels (FPQ), or one scale for all (the published baseline).
        search, metric: of the module docstring.
        rounds: at most; a side whose other side has not changed is not searched again.
        candidates: of a scale; None for 100 of "paper", as published, and 40 of "scale".
        formats, activation_formats: to choose from, of "e3m0", "e2m1" and "e1m2". Activations in "e3m0" are too wide
            for int8 and are multiplied as floats.
    """

    activations: str = "fp4"
    shift: bool = True
    search: str = "scale"
    metric: str = "l2"
    rounds: int = 3
    candidates: int | None = None
    formats: tuple[str, ...] = FORMATS
    activation_formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        for field, allowed in (
            ("activations", ("fp4", "float", "int8")),
            ("search", SEARCHES),
            ("metric", METRICS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"Search: {field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in ("formats", "activation_formats"):
            given = tuple(getattr(self, field))
            if not given or not set(given) <= set(FORMATS):
                raise ValueError(f"Search: {field} must be some of {', '.join(FORMATS)}, got {given!r}")
            object.__setattr__(self, field, tuple(f for f in FORMATS if f in given))
        if self.candidates is None:
            object.__setattr__(self, "candidates", {"paper": 100, "scale": 40, "minmax": 1}[self.search])
        for field in ("rounds", "candidates"):
            if getattr(self, field) < 1:
                raise ValueError(f"Search: {field} must be at least 1, got {getattr(self, field)}")

    def scales(self, amax: Tensor, format: str) -> Iterator[Tensor]:
        """The candidates for what values are multiplied with, float32 of amax's shape; amax is above 0."""
        assert self.candidates is not None
        count, largest = self.candidates, max(code_values(format))
        if self.search == "paper":
            bias = fpq_bias(amax, format)
            return (fpq_scale((0.01 + i * 1.19 / count) * bias, format) for i in range(count))
        if self.search == "minmax":
            return iter([amax / largest])
        return (amax / largest * (1.25 * 16.0 ** (-i / max(count - 1, 1))) for i in range(count))

    def shifts(self, amax: Tensor, scale: Tensor, format: str) -> Tensor | None:
        """What each channel's bias is above that of the scale, uint8 [k]; None without shifts."""
        if not self.shift:
            return None
        if self.search == "paper":
            return fpq_shift(fpq_bias(amax, format), bias_of(scale, format), format)
        above = (scale * max(code_values(format))).log2() - amax.log2()
        return above.round().clamp(0, largest_shift(format)).to(torch.uint8)


def bias_of(scale: Tensor, format: str) -> Tensor:
    """Undo `fpq_scale`."""
    return fpq_bias(scale * max(code_values(format)), format)


class Cast(NamedTuple):
    """One side: its format, its scale, float32 [n, 1] or [], and for activations the shifts, uint8 [k], if any."""

    format: str
    scale: Tensor
    shift: Tensor | None = None

    def codes(self, x: Tensor) -> Tensor:
        """Packed codes of float32 [..., k]."""
        return fp4_cast(x / channel_scale(self.scale, self.shift), self.format)

    def __call__(self, x: Tensor) -> Tensor:
        """The values that x becomes."""
        return fp4_uncast(self.codes(x), x.shape[-1], self.format) * channel_scale(self.scale, self.shift)

    def same_as(self, other: Cast | None) -> bool:
        if other is None or self.format != other.format or not torch.equal(self.scale, other.scale):
            return False
        return self.shift is None or other.shift is None or torch.equal(self.shift, other.shift)


Searched = tuple[dict[str, Cast], dict[str, float]]
"""The best cast of every format, and its error."""


class Found(NamedTuple):
    """What `search_layer` returns: casts of weights and activations, and |y - y^| / |y| on the inputs.

    weight_scales [n, 1] and activation_scales [] are the best of every format in the last round, chosen or not.
    """

    weight: Cast
    activation: Cast | None
    error: float
    weight_scales: dict[str, Tensor]
    activation_scales: dict[str, Tensor]


@torch.no_grad()
def search_layer(weight: Tensor, inputs: Tensor, amax: Tensor | None = None, search: Search | None = None) -> Found:
    """Formats and scales for a layer.

    Args:
        weight: [n, k], finite, any float dtype.
        inputs: [tokens, k], finite, what the layer sees.
        amax: float32 [k], the largest magnitude of each channel; None for that of `inputs`.
        search: how.
    Raises:
        ValueError: for shapes that do not fit, no tokens, NaN or infinity.
    """
    if weight.dim() != 2 or inputs.dim() != 2 or inputs.shape[1] != weight.shape[1] or not len(inputs):
        raise ValueError(
            f"search_layer: inputs must have shape [tokens, {weight.shape[-1]}] with a token at least for a weight"
            f" {list(weight.shape)}, got {list(inputs.shape)}"
        )
    inputs = inputs.float()
    amax = inputs.abs().amax(0) if amax is None else amax
    if amax.shape != inputs.shape[1:]:
        raise ValueError(f"search_layer: amax must have shape [{inputs.shape[1]}], got {list(amax.shape)}")
    for name, t in (("weight", weight), ("inputs", inputs), ("amax", amax)):
        if not t.isfinite().all():
            raise ValueError(f"search_layer: {name} must be finite, got NaN or infinity")
    return _Layer(weight.detach().float(), inputs, _positive(amax.float()), search or Search()).run()


def _positive(amax: Tensor) -> Tensor:
    """Magnitudes without 0, whose logarithm is infinite: what has no other values counts as next to nothing."""
    return torch.where(amax > 0, amax, torch.finfo(torch.float32).tiny)


class _Layer:
    def __init__(self, weight: Tensor, inputs: Tensor, amax: Tensor, search: Search) -> None:
        self.weight, self.inputs, self.amax, self.search = weight, inputs, amax, search
        self.outputs = inputs @ weight.T
        rows = weight.abs().amax(1, keepdim=True)
        self.row_amax = torch.where(rows > 0, rows, 1.0)

    def run(self) -> Found:
        search = self.search
        weight, activation = self._start("e2m1", search.formats), None
        if search.activations != "fp4":
            casts, errors = self.search_weights(None)
            weight = casts[_best(errors)]
            return Found(weight, None, self.error(weight, None), {f: c.scale for f, c in casts.items()}, {})
        activation = self.activation_cast(_first("e2m1", search.activation_formats), self.amax.max(), None)
        weights, activations = _Memo(self.search_weights), _Memo(self.search_activations)
        for _ in range(search.rounds):
            casts, errors = weights(activation)
            old, weight = weight, casts[_best(errors)]
            if not search.shift:
                old = weight
            inputs, input_errors = activations(old)
            if not weight.same_as(old):
                input_errors = self.activation_errors(inputs, weight)
            activation = inputs[_best(input_errors)]
        return Found(
            weight,
            activation,
            self.error(weight, activation),
            {f: c.scale for f, c in casts.items()},
            {f: c.scale for f, c in inputs.items()},
        )

    def _start(self, format: str, formats: tuple[str, ...]) -> Cast:
        format = _first(format, formats)
        return Cast(format, self.row_amax / max(code_values(format)))

    def activation_cast(self, format: str, amax: Tensor, scale: Tensor | None) -> Cast:
        scale = amax / max(code_values(format)) if scale is None else scale
        return Cast(format, scale, self.search.shifts(self.amax, scale, format))

    def search_weights(self, activation: Cast | None) -> Searched:
        """The best scale of every row in every format, and the formats' errors."""
        error_of = self._weight_errors(self.inputs if activation is None else activation(self.inputs))
        casts: dict[str, Cast] = {}
        errors: dict[str, float] = {}
        for format in self.search.formats:
            least = torch.full_like(self.row_amax, torch.inf)
            best = torch.ones_like(least)
            for scale in self.search.scales(self.row_amax, format):
                error = error_of(Cast(format, scale)(self.weight))
                better = error < least
                least, best = torch.where(better, error, least), torch.where(better, scale, best)
            casts[format], errors[format] = Cast(format, best), least.double().sum().item()
        return casts, errors

    def _weight_errors(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from a weight's values to the error of every row, [n, 1], up to a constant."""
        if self.search.metric != "l2":
            return lambda values: _error(self.outputs, inputs @ values.T, self.search.metric, 0).unsqueeze(1)
        gram, target = inputs.T @ inputs, 2 * self.weight @ ((self.inputs - inputs).T @ inputs)

        def error_of(values: Tensor) -> Tensor:
            difference = values - self.weight
            return ((difference @ gram - target) * difference).sum(1, keepdim=True)

        return error_of

    def search_activations(self, weight: Cast) -> Searched:
        """The best scale of every format, and its error."""
        values = weight(self.weight)
        casts: dict[str, Cast] = {}
        errors: dict[str, float] = {}
        for format in self.search.activation_formats:
            for scale in self.search.scales(self.amax.max(), format):
                cast = self.activation_cast(format, self.amax.max(), scale)
                error = self._activation_error(cast, values)
                if format not in casts or error < errors[format]:
                    casts[format], errors[format] = cast, error
        return casts, errors

    def activation_errors(self, casts: dict[str, Cast], weight: Cast) -> dict[str, float]:
        values = weight(self.weight)
        return {format: self._activation_error(cast, values) for format, cast in casts.items()}

    def _activation_error(self, cast: Cast, values: Tensor) -> float:
        """Infinite for NaN, which comes of values too large for float32 and compares with nothing."""
        error = _error(self.outputs, cast(self.inputs) @ values.T, self.search.metric, 1).double().mean().item()
        return math.inf if math.isnan(error) else error

    def error(self, weight: Cast, activation: Cast | None) -> float:
        """|y - y^| / |y|, 0 for y = 0."""
        inputs = self.inputs if activation is None else activation(self.inputs)
        size = self.outputs.norm().item()
        return (self.outputs - inputs @ weight(self.weight).T).norm().item() / size if size else 0.0


def _error(outputs: Tensor, got: Tensor, metric: str, dim: int) -> Tensor:
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(outputs, got, dim=dim)
    difference = outputs - got
    return (difference.square() if metric == "l2" else difference.abs()).mean(dim)


def _first(format: str, formats: tuple[str, ...]) -> str:
    return format if format in formats else formats[0]


def _best(errors: dict[str, float]) -> str:
    """The first of the least."""
    return min(errors, key=errors.__getitem__)


class _Memo:
    """A search that is not done again for the same cast of the other side."""

    def __init__(self, function: Callable[[Cast], Searched]) -> None:
        self.function = function
        self.last: tuple[Cast, Searched] | None = None

    def __call__(self, other: Cast) -> Searched:
        if self.last is None or not other.same_as(self.last[0]):
            self.last = other, self.function(other)
        return self.last[1]
