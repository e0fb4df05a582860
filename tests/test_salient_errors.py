# SPDX-License-Identifier: Apache-2.0
"""The ops of the salient_scatter family name a wrong argument, and arrays that lie."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitmill.ops import _library, salient_linear
from bitmill.ops.salient_scatter import _salient_linear_reference, _salient_weight_reference
from problems import on_every_machine
from salient_inputs import ENCODINGS, OP, WEIGHT_OP, Case

compiled = pytest.mark.skipif(not _library.has_compiled_kernel("salient_linear"), reason="no compiled kernels")


Arrays = list


def hostile() -> dict[str, tuple[Arrays, bool]]:
    """Arrays that contradict each other, all of the right shapes and dtypes; and whether every call finds out."""
    cases: dict[str, tuple[Arrays, bool]] = {}
    for kind in ENCODINGS:
        good = Case(19, 70, 0.3, kind=kind).arrays()
        while kind == "columns" and good[1].numel() < 9:
            good = Case(19, 70, 0.3, kind=kind).arrays()

        def put(name: str, seen: bool, index: int, where, value, kind=kind, good=good) -> None:
            arrays = list(good)
            arrays[index] = arrays[index].clone()
            arrays[index][where] = value
            cases[f"{kind}: {name}"] = arrays, seen

        if kind == "columns":
            column = good[1]
            put("negative", True, 1, 0, -1)
            put("past the end", True, 1, -1, 70)
            put("far past the end", True, 1, -1, 2**31 - 1)
            put("not rising", True, 1, 4, int(column[3]))
            put("sign bits", False, 0, slice(None), -1)
            continue
        start, last = good[3], int(good[3][-1])
        put("first", True, 3, 0, 1)
        put("negative first", True, 3, 0, -1)
        put("last", True, 3, -1, last + 5)
        put("far beyond", True, 3, 1, 2**31 - 1)
        put("far below", True, 3, 1, -(2**31))
        put("sign bits of salient weights", False, 0, slice(None), -1)
        cases[f"{kind}: value too short"] = [*good[:2], good[2][:-1], *good[3:]], True
        cases[f"{kind}: no values"] = [*good[:2], good[2][:0], *good[3:]], True
        if kind == "list":
            put("columns past the end", False, 1, slice(None), 254)
            put("random", False, 1, slice(None), torch.randint(0, 255, good[1].shape, dtype=torch.uint8))
            continue
        row_tail = (1, 2, 2)  # tile 1, word of columns 64 ... 95, row 18
        put("row too long", False, 3, 5, int(start[5]) + 1)
        put("full mask", False, 1, slice(None), -1)
        put("empty mask", False, 1, slice(None), 0)
        put("one bit more", False, 1, (0, 1, 2), int(good[1][0, 1, 2]) ^ 1)
        put("one bit in the last word", False, 1, row_tail, int(good[1][row_tail]) ^ 32)
        put("not rising", True, 3, 4, last)
        cases["bitmap: value too long"] = [*good[:2], torch.cat([good[2], good[2]]), *good[3:]], True
    return cases


@pytest.mark.parametrize("name", list(hostile()))
def test_salient_arrays_that_contradict_each_other(name: str) -> None:
    (arrays, seen), x = hostile()[name], torch.randn(40, 70)
    for call in (
        lambda: OP(x[:0], *arrays, None, 0, "float"),
        lambda: WEIGHT_OP(*arrays, 70, 0),
        lambda: _salient_linear_reference(x, *arrays, None, 0, "float"),
        lambda: _salient_weight_reference(*arrays, 70, 0),
    ):
        with pytest.raises(ValueError, match=r"contradict each other|shape"):
            call()
    for activations, m in itertools.product(("float", "int8"), (1, 3, 40)):
        if seen:
            with pytest.raises(ValueError, match=r"contradict each other|shape"):
                OP(x[:m], *arrays, None, 0, activations)
        elif _library.has_compiled_kernel("salient_linear"):
            for machine, out in on_every_machine(lambda: OP(x[:m], *arrays, None, 0, activations)):  # noqa: B023
                assert out.shape == (m, 19), machine


NAMES = ("weight", "index", "value", "start", "alpha", "mu", "value_scale", "value_zero")


def wrong_arguments() -> list:
    good = dict(zip(NAMES, Case(19, 70, 0.3).arrays(), strict=True))
    good |= {"x": torch.randn(3, 70), "bias": torch.randn(19), "group_size": 0, "activations": "float", "code_bits": 8}
    cases = []
    for name in (*NAMES, "bias"):
        t = good[name]
        cases += [(name, t.unsqueeze(0), "shape"), (name, t.double(), "must be"), (name, t.to("meta"), "cpu|device")]
        if name != "value":
            cases.append((name, torch.cat([t, t], -1), "shape"))
    cases += [
        ("x", torch.tensor(1.0), "dimension"),
        ("x", torch.randn(3, 70).double(), "float32, bfloat16 or float16"),
        ("x", torch.randn(3, 102), "shape"),
        ("value_scale", None, "together"),
        ("value_zero", None, "together"),
        ("value", torch.zeros(good["value"].numel()).half(), "float16"),
        ("value", good["value"].to(torch.int8), "int8"),
        ("start", None, "start must be given"),
        ("index", torch.zeros(3, dtype=torch.int32), "start must be given"),
        ("index", torch.zeros(3, 16, dtype=torch.uint8), "shape"),
        ("index", torch.zeros(3, 16, dtype=torch.int16), "index must be"),
        ("alpha", torch.tensor(1.0), "shape"),
        ("group_size", 16, "group_size"),
        ("group_size", -32, "group_size"),
        ("group_size", 32, "shape"),
        ("activations", "int4", "activations"),
        ("code_bits", 4, "shape|contradict"),
        ("code_bits", 2, "code_bits must be 8 or 4, got 2"),
    ]
    return [pytest.param({**good, name: wrong}, text, id=f"{name}-{i}") for i, (name, wrong, text) in enumerate(cases)]


@pytest.mark.parametrize("arguments,text", wrong_arguments())
def test_salient_linear_names_the_wrong_argument(arguments: dict, text: str) -> None:
    on_one_device = all(not isinstance(t, torch.Tensor) or t.device.type == "cpu" for t in arguments.values())
    kernels = (salient_linear, _salient_linear_reference) if on_one_device else (_salient_linear_reference,)
    for kernel in kernels:
        with pytest.raises(ValueError, match=text):
            kernel(**arguments)


@compiled
def test_salient_compiled_and_default_errors_agree() -> None:
    for parameter in wrong_arguments():
        arguments = parameter.values[0]
        if any(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in arguments.values()):
            continue
        texts = []
        for kernel in (salient_linear, _salient_linear_reference):
            with pytest.raises(ValueError) as error:
                kernel(**arguments)
            texts.append(str(error.value).split(" must")[0])
        assert texts[0] == texts[1]


def test_salient_weight_wants_a_possible_k() -> None:
    arrays = Case(3, 10).arrays()
    for kernel in (WEIGHT_OP, _salient_weight_reference):
        for k in (-1, 2**24 + 1):
            with pytest.raises(ValueError, match="k must be in"):
                kernel(*arrays, k, 0)
