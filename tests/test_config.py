# SPDX-License-Identifier: Apache-2.0
"""The configurations: every field refuses what it does not know, and a dict gives back the same object."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from bitmill import BinaryConfig, FP4Config, OneBitConfig, SalientConfig
from bitmill.binarize import method_names
from bitmill.config import Config, ZonedConfig

VALID = [
    *(BinaryConfig(method=m, act_bits=bits, embeddings=True) for m in method_names() for bits in (None, 32)),
    *(BinaryConfig(method="bit", act_bits=bits, signed=signed) for bits in (1, 2, 4) for signed in (True, False)),
    *(BinaryConfig(method=m, group_size=64, zero="plus") for m in ("bibert", "bivit", "xnor", "sign")),
    *(SalientConfig(fraction=f, bits=b) for f in (0.0, 0.1, 1, 1.0) for b in (4, 8, 16)),
    SalientConfig(scale="official"),
    SalientConfig(structure="column", activations="int8"),
    SalientConfig(metric="quantile", granularity="layer", surrogate="ede"),
    SalientConfig(group_size=1 << 24, centre=False),
    *(FP4Config(format=f, scale_rule=r) for f in FP4Config.FORMATS for r in FP4Config.SCALE_RULES),
    OneBitConfig("plus", "int8"),
    ZonedConfig(64, False, True, True, 32),
]

JUNK: list[Any] = [
    int,
    float("nan"),
    float("inf"),
    10**30,
    -(10**30),
    10**5000,
    "",
    "BIBERT",
    b"bibert",
    [],
    ["bibert"],
    {},
    {"a": [{}]},
    (1,),
    object(),
    lambda: None,
]

# What each field refuses besides.
FIELDS = [
    (BinaryConfig, "method", [True, None, 1]),
    (BinaryConfig, "act_bits", [True, False, 1.0, 0, 2, 3, 4, 8, -1, "1"]),
    (BinaryConfig, "weight_bits", [True, False, 1.0, 0, 2, -1, "1"]),
    (BinaryConfig, "signed", [None, 0, 1, "True"]),
    (BinaryConfig, "zero", [None, 0, True, "Torch"]),
    (BinaryConfig, "group_size", [True, 0, -32, 31, 33, 64.0, "64", (1 << 24) + 32]),
    (BinaryConfig, "embeddings", [None, 0, 1]),
    (BinaryConfig, "convs", [None, 0, 1]),
    (BinaryConfig, "activations", [None, 8, "int4", "int8"]),
    (SalientConfig, "fraction", [True, False, None, -0.01, 1.01, -1, 2, "0.1", 0.1j]),
    (SalientConfig, "bits", [True, None, 2, 8.0, "8"]),
    (SalientConfig, "metric", [None, "Hessian"]),
    (SalientConfig, "structure", [None, "row", "columns"]),
    (SalientConfig, "scale", [None, "biased"]),
    (SalientConfig, "centre", [None, 0, 1]),
    (SalientConfig, "group_size", [True, 0, -32, 100, 128.0]),
    (SalientConfig, "activations", [None, 8, "int4"]),
    (SalientConfig, "granularity", [None, "column"]),
    (SalientConfig, "surrogate", [None, "clip_open"]),
    (FP4Config, "format", [None, "e4m3", "E2M1", 4]),
    (FP4Config, "scale_rule", [None, "round", 0]),
    (FP4Config, "activations", [None, 8, "int4"]),
    (FP4Config, "group_size", [16, 64, "0", False, 0.0]),
    (FP4Config, "embeddings", [None, 0, 1]),
    (OneBitConfig, "zero", [None, 0, True, "Torch"]),
    (OneBitConfig, "activations", [None, 8, "int4"]),
    (ZonedConfig, "block", [None, True, 0, -32, 100, 128.0, (1 << 24) + 32]),
    (ZonedConfig, "centre", [None, 0, 1]),
    (ZonedConfig, "column_scale", [None, 0, 1]),
    (ZonedConfig, "split_salient", [None, 0, 1]),
    (ZonedConfig, "scale_bits", [None, True, 8, 16.0, "16"]),
]


def assert_one_sentence(error: ValueError, cls: type, field: str) -> None:
    text = str(error)
    assert text.startswith(f"{cls.__name__}: {field} must be "), text
    assert ", got " in text and "\n" not in text and len(text) < 400


@pytest.mark.parametrize(("cls", "field", "bad"), FIELDS, ids=[f"{cls.__name__}-{field}" for cls, field, _ in FIELDS])
def test_every_field_refuses_what_it_does_not_know(cls: type[Config], field: str, bad: list[Any]) -> None:
    for value in [*JUNK, *bad]:
        with pytest.raises(ValueError) as error:
            cls(**{field: value})
        assert_one_sentence(error.value, cls, field)


def test_every_field_is_covered() -> None:
    covered = {(cls, field) for cls, field, _ in FIELDS}
    for cls in (BinaryConfig, SalientConfig, FP4Config, OneBitConfig, ZonedConfig):
        assert {(cls, f.name) for f in dataclasses.fields(cls)} == {c for c in covered if c[0] is cls}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"method": "bibert", "act_bits": 2}, "act_bits"),
        ({"method": "xnor", "act_bits": 4}, "act_bits"),
        ({"method": "llmqat", "act_bits": 1}, "act_bits"),
        ({"method": "statsq", "weight_bits": 1}, "weight_bits"),
        ({"method": "bibert", "weight_bits": 2}, "weight_bits"),
        ({"method": "bibert", "signed": False}, "signed"),
        ({"method": "n2uq", "signed": False}, "signed"),
        ({"method": "bit", "group_size": 32}, "group_size"),
        ({"method": "bivit_pws", "group_size": 32}, "group_size"),
        ({"method": "recu", "group_size": 32}, "group_size"),
        ({"method": "statsq", "group_size": 32}, "group_size"),
        ({"method": "tbt", "group_size": 32, "act_bits": 8}, "group_size"),
    ],
)
def test_fields_that_a_method_does_not_have(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(values["method"]))) as error:
        BinaryConfig(**values)
    assert_one_sentence(error.value, BinaryConfig, field)


def test_fields_that_a_format_does_not_have() -> None:
    sizes = {format: FP4Config(format).group_size for format in FP4Config.FORMATS}
    assert sizes == {"e2m1": 0, "e1m2": 0, "e3m0": 0, "mxfp4": 32, "nvfp4": 16, "nf4": 64, "bnb-fp4": 64}
    for format, size in sizes.items():
        assert FP4Config(format, group_size=size) == FP4Config(format)
        bad = [-16, 8, 24, 64.0, True, (1 << 24) + 16] if size == 64 else [64]
        for value in bad:
            with pytest.raises(ValueError, match="group_size") as error:
                FP4Config(format, group_size=value)
            assert_one_sentence(error.value, FP4Config, "group_size")
    for format in ("nf4", "bnb-fp4"):
        with pytest.raises(ValueError, match=f"'float' for format '{format}', got 'int8'"):
            FP4Config(format, activations="int8")


def test_fields_of_a_salient_config_that_exclude_each_other() -> None:
    for values, field in (
        ({"metric": "quantile", "structure": "column"}, "structure"),
        ({"granularity": "layer", "group_size": 32}, "group_size"),
    ):
        with pytest.raises(ValueError) as error:
            SalientConfig(**values)
        assert_one_sentence(error.value, SalientConfig, field)


def test_the_error_names_what_came_and_what_is_allowed() -> None:
    with pytest.raises(ValueError) as error:
        BinaryConfig(act_bits=3)
    assert str(error.value) == "BinaryConfig: act_bits must be one of 1, 32 for method 'bibert', got 3"


@pytest.mark.parametrize("config", VALID, ids=repr)
def test_a_dict_gives_back_the_same_object(config: Config) -> None:
    values = config.to_dict()
    assert values["config"] == type(config).__name__
    assert set(values) == {"config", *(f.name for f in dataclasses.fields(config))}
    for again in (values, json.loads(json.dumps(values))):
        copy = Config.from_dict(again)
        assert copy == config and type(copy) is type(config) and copy.to_dict() == values
        assert type(config).from_dict(again) == config
    assert Config.from_dict({"config": values["config"]}) == type(config)()


def test_configurations_are_frozen_and_hashable() -> None:
    for config in (BinaryConfig(), SalientConfig(), FP4Config(), OneBitConfig(), ZonedConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.anything = 1  # type: ignore[attr-defined]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 1)
        assert hash(config) == hash(type(config)())


def test_from_dict_refuses_what_is_no_configuration() -> None:
    for values in [*JUNK, *({"config": v} for v in JUNK), None, {"config": "Config"}, {"method": "bibert"}]:
        with pytest.raises(ValueError, match='expected a dict with "config"') as error:
            Config.from_dict(values)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_class_reads_its_own_dicts_only() -> None:
    with pytest.raises(ValueError, match=r"^BinaryConfig: expected .*'BinaryConfig'"):
        BinaryConfig.from_dict(FP4Config().to_dict())


@pytest.mark.parametrize("key", ["bits", "x" * 10_000, "", 1, None, (1, 2), "__class__", "config "])
def test_from_dict_refuses_an_unknown_field(key: Any) -> None:
    with pytest.raises(ValueError, match=r"^FP4Config: unknown field .*newer bitmill") as error:
        Config.from_dict({**FP4Config().to_dict(), key: 1, 2: 3})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("cls", "field", "bad"), FIELDS, ids=[f"{cls.__name__}-{field}" for cls, field, _ in FIELDS])
def test_from_dict_refuses_values_as_the_class_does(cls: type[Config], field: str, bad: list[Any]) -> None:
    for value in [*JUNK, *bad]:
        with pytest.raises(ValueError) as error:
            Config.from_dict({**cls().to_dict(), field: value})
        assert_one_sentence(error.value, cls, field)


def test_values_too_deep_or_too_odd_to_print() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, Odd(), 10**5000, "x" * 1_000_000):
        with pytest.raises(ValueError) as error:
            BinaryConfig(group_size=value)  # type: ignore[arg-type]
        assert_one_sentence(error.value, BinaryConfig, "group_size")
    while deep:  # so that dropping it is not deep either
        deep = deep.pop()
