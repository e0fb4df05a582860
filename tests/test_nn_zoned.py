# SPDX-License-Identifier: Apache-2.0
"""PackedZonedLinear: what it holds, what it takes in a file, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bitmill import checkpoint, dequantize_, load, pack_, save, summary
from bitmill._checkpoint_file import digest
from bitmill.config import ZonedConfig
from bitmill.nn import PackedZonedLinear
from zoned_inputs import FORMS, form_name, zoned_weight_of

every_form = pytest.mark.parametrize("config", FORMS, ids=form_name)


def layer_of(config: ZonedConfig, k: int = 200, n: int = 19, bias: bool = True, share: float = 0.2):
    weight = zoned_weight_of(config, n, k, share)
    return PackedZonedLinear.from_parts(weight, torch.randn(n) if bias else None, config), weight


@every_form
def test_the_layer_is_its_weight(config: ZonedConfig) -> None:
    for k, n, bias, share in ((200, 19, True, 0.2), (1, 1, False, 1.0), (130, 32, True, 0.0), (0, 3, True, 0.5)):
        packed, weight = layer_of(config, k, n, bias, share)
        packed.validate()
        assert not list(packed.parameters()) and packed.weight_shape() == (n, k)
        linear = packed.dequantize()
        assert torch.equal(linear.weight, weight.value(config.block)) and (linear.bias is None) != bias
        for shape in ((k,), (0, k), (2, 3, k)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(shape, dtype=dtype)
                got, expected = packed(x), linear(x.float())
                assert got.dtype == dtype and got.shape == expected.shape
                error = (got.float() - expected).norm()
                assert error <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm() + 1e-6


@every_form
def test_layers_survive_copy_pickle_dtype_compilation_and_export(config: ZonedConfig) -> None:
    packed, x = layer_of(config)[0], torch.randn(3, 200)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), packed(x))
    twin = PackedZonedLinear(**packed.arguments(), config=config)
    twin.load_state_dict(packed.state_dict())
    assert torch.equal(twin(x), packed(x))
    half = copy.deepcopy(packed).bfloat16()
    assert half.scale.dtype == packed.scale.dtype and half(x.bfloat16()).dtype == torch.bfloat16
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), packed(x))
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(torch.ones(7, 200)), packed(torch.ones(7, 200)))


def test_a_swapped_layer_is_left_alone_by_pack_and_turned_back() -> None:
    model = nn.Sequential(layer_of(FORMS[1])[0])
    assert pack_(model) == [] and dequantize_(model) == ["0"] and type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("config", "claimed"),
    [
        (ZonedConfig(), 2 + 7 * 16 / 128),
        (ZonedConfig(centre=False, column_scale=True), 2 + 4 * 16 / 128 + 16 / 512),
        (ZonedConfig(split_salient=True), 2 + 10 * 16 / 128),
        (ZonedConfig(centre=False, column_scale=True, split_salient=True), 2 + 6 * 16 / 128 + 16 / 512),
        (ZonedConfig(256, scale_bits=32), 2 + 7 * 32 / 256),
    ],
    ids=lambda value: form_name(value) if isinstance(value, ZonedConfig) else "",
)
def test_a_file_is_as_small_as_claimed(config: ZonedConfig, claimed: float, tmp_path: Path) -> None:
    """Two bits, the scales, a bit for each salient weight that is split (8 at a time), a bit a column: within 2 %."""
    n, k = 512, 1024
    packed, weight = layer_of(config, k, n, False, 0.1)
    share, model = packed.salient_share(), nn.Sequential(packed)
    if config.split_salient:
        claimed += sum(math.ceil(int(part.sum()) / 8) * 8 for part in weight.salient.split(config.block)) / k
    claimed += 1 / n
    (layer,) = summary(model).layers
    assert layer.bits_per_weight == pytest.approx(claimed, rel=0.02) and layer.kernel
    save(model, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == checkpoint.file_size(model)
    assert 8 * (tmp_path / "a").stat().st_size == pytest.approx(claimed * n * k, rel=0.02)
    assert layer.operations == layer.macs * (1 + share) / 2


class Model(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(200, 19) if layer is None else layer
        self.norm = nn.LayerNorm(19)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


@every_form
def test_files_come_back_and_liars_are_refused(config: ZonedConfig, tmp_path: Path) -> None:
    model, x, path = Model(layer_of(config)[0]), torch.randn(3, 200), tmp_path / "a"
    save(model, path)
    fresh = Model()
    assert load(fresh, path) == ["fc"] and torch.equal(fresh(x), model(x)) and fresh.fc.config == config
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()[checkpoint.KEY])

    def refused(match: str, entries: int | None = None, **changed: Tensor) -> None:
        lie = {**tensors, **{f"fc.{name}": t for name, t in changed.items()}}
        said = copy.deepcopy({key: value for key, value in metadata.items() if key != "sha256"})
        if entries is not None:
            said["modules"]["fc"]["arguments"]["entries"] = entries
        said["sha256"] = digest(said, lie)
        safetensors.torch.save_file(lie, tmp_path / "b", {checkpoint.KEY: json.dumps(said)})
        untouched = Model()
        with pytest.raises(ValueError, match=f"cannot be loaded: .*{match}"):
            load(untouched, tmp_path / "b")
        assert type(untouched.fc) is nn.Linear

    def with_bit(name: str, *where: int) -> Tensor:
        t = tensors[f"fc.{name}"].clone()
        t[where[:-1]] |= 1 << where[-1]
        return t

    for name in ("sign", "zone"):
        refused(f"{name}: bits past the last", **{name: with_bit(name, 0, 6, 0, 9)})
        refused(f"{name}: bits past the last", **{name: with_bit(name, 1, 0, 3, 0)})
    refused("salient: bits past the last column", salient=with_bit("salient", 6, 8))
    scale = tensors["fc.scale"].clone()
    scale.view(-1)[5] = torch.inf
    refused("scale: every scale must be finite", scale=scale)
    refused("fc.scale has shape", scale=torch.cat([scale, scale], 2))
    for entries in (-1, 10**15):
        if config.split_salient:
            refused("arguments are not valid|shape|contradict", entries=entries)
    if config.split_salient:
        refused("the packed arrays contradict each other", salient=torch.zeros_like(tensors["fc.salient"]))
        refused("bits past the last row", salient_zone=with_bit("salient_zone", 1, 0, 3, 0))
    else:
        refused("arguments", entries=3)


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = zoned_weight_of(FORMS[0], 19, 200)
    with pytest.raises(
        ValueError, match=r"weight must have scales \[19, 2, 7\] and no column_scale .*got \[19, 7, 7\]"
    ):
        PackedZonedLinear.from_parts(weight, None, ZonedConfig())
    large = weight._replace(scale=weight.scale * 1e5)
    with pytest.raises(ValueError, match=r"small enough for scales of 16 bits.* or take scale_bits=32"):
        PackedZonedLinear.from_parts(large, None, ZonedConfig(32))
    PackedZonedLinear.from_parts(large, None, ZonedConfig(32, scale_bits=32))
    with pytest.raises(ValueError, match="in_features = 200"):
        layer_of(FORMS[0])[0](torch.randn(3, 201))
