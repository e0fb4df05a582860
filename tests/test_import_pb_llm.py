# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that PB-LLM's program wrote: the recorded ones, ones made by its formulas, and ones that are neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitmill import SalientConfig, load, save
from bitmill.demo.model import Stories, StoriesConfig
from bitmill.integrations.pb_llm import import_, import_linear, read_masks
from bitmill.nn import PackedSalientLinear
from fake_quantised_inputs import linear_of, pb_llm_weight

SMALL = StoriesConfig(dim=32, hidden=64, layers=2, heads=4, kv_heads=2, vocab=50, context=24)
DTYPES = (torch.float16, torch.float32, torch.bfloat16)


def config_of(fraction: float, bits: int = 8, group_size: int = 0) -> SalientConfig:
    return SalientConfig(fraction, bits, "hessian", scale="official", group_size=group_size or None)


def tellable(weight: Tensor, mask: Tensor, group_size: int) -> bool:
    """Whether the two most frequent values of every row group are the binarised ones."""
    for part, kept in zip(*(t.split(group_size or weight.shape[1], 1) for t in (weight, mask)), strict=True):
        for row, salient in zip(part, kept, strict=True):
            binarised, counts = row[~salient].unique(return_counts=True)
            others = row[salient].unique(return_counts=True)[1]
            if len(binarised) < 2 or (len(others) and counts.min() <= others.max()):
                return False
    return True


def assert_same_numbers(packed: PackedSalientLinear, linear: nn.Linear) -> None:
    assert torch.equal(packed.dequantize().weight.to(linear.weight.dtype), linear.weight)
    assert torch.equal(packed.bias, linear.bias.float())
    packed.validate()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_packs_without_loss(bits: int, group_size: int, dtype: torch.dtype) -> None:
    for n, k, fraction in ((24, 128, 0.1), (9, 77, 0.5), (3, 33, 0.02), (17, 64, 0.0)):
        weight, mask = pb_llm_weight(n, k, fraction, min(bits, 8), group_size)
        linear, config = linear_of(weight, dtype), config_of(fraction, bits, group_size)
        if bits == 16 and dtype == torch.float32:
            linear = linear_of(weight.half(), dtype)
        if bits == 8 and dtype == torch.bfloat16:
            with pytest.raises(
                ValueError, match=r"must be float16 or float32 for 8 bits, got bfloat16, .* take bits=16"
            ):
                import_linear(linear, config, mask)
            continue
        given = import_linear(linear, config, mask)
        assert_same_numbers(given, linear)
        assert torch.equal(given.mask(), mask)
        assert tellable(linear.weight, mask, group_size) or fraction == 0.5 or k < 64 or group_size
        if tellable(linear.weight, mask, group_size):
            found = import_linear(linear, config)
            assert_same_numbers(found, linear)
            assert not (found.mask() & ~mask).any()
        if bits == 16:
            assert torch.equal(given.dequantize().weight[mask], linear.weight.float()[mask])
        x = torch.randn(3, k)
        torch.testing.assert_close(given(x), nn.functional.linear(x, given.dequantize().weight, linear.bias.float()))


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_packs_what_the_program_wrote(variant: int, golden_folder: Path) -> None:
    path = golden_folder / "pbllm" / f"gptq-{variant}.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    case = np.load(path)
    for weight, binarised, low, size in zip(
        case["out_w"], case["out_mask"], case["hp_low_frac"], case["hp_groupsize"], strict=True
    ):
        if size > 0 and size % 32:
            continue
        linear = linear_of(torch.from_numpy(weight))
        mask = torch.from_numpy(binarised == 0)
        config = config_of(1 - float(low), int(case["hp_high_bits"]), max(int(size), 0))
        given = import_linear(linear, config, mask)
        assert_same_numbers(given, linear)
        assert torch.equal(given.mask(), mask)
        if tellable(linear.weight, mask, max(int(size), 0)):
            assert_same_numbers(import_linear(linear, config), linear)


def test_weights_without_a_mean_need_none() -> None:
    weight, mask = pb_llm_weight(8, 64, 0.1)
    weight = torch.where(mask, weight, 0.03 * torch.where(torch.rand(8, 64) < 0.5, 1.0, -1.0))
    linear = linear_of(weight)
    packed = import_linear(linear, config_of(0.1), mask)
    assert packed.mu is None and not packed.config.centre
    assert_same_numbers(packed, linear)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_other_weights_are_refused_with_the_row_and_the_reason() -> None:
    weight, mask = pb_llm_weight(24, 128, 0.1)
    config = config_of(0.1)
    third = weight.clone()
    third[7, int((~mask[7]).nonzero()[3])] *= 1.5
    with pytest.raises(ValueError, match="row 7 has 3 values outside of the mask in columns 0 to 127, not two; give"):
        import_linear(linear_of(third), config, mask)
    off = weight.clone()
    row = int(mask.sum(1).argmax())
    off[row, mask[row]] *= 1 + 0.2 * torch.rand(int(mask[row].sum()))
    for given in (mask, None):
        with pytest.raises(
            ValueError, match=rf"row {row} has \d+ salient values that are not whole multiples of a step"
        ):
            import_linear(linear_of(off), config, given)
    anything = linear_of(off)
    assert_same_numbers(import_linear(anything, config_of(0.1, 16), mask), anything)
    dense = linear_of(torch.randn(24, 128))
    with pytest.raises(ValueError, match=r"row \d+ has \d+ weights besides the two most frequent values \(9\d\.\d%"):
        import_linear(dense, config)
    with pytest.raises(ValueError, match=r"row 0 has \d+ values outside of the mask"):
        import_linear(dense, config, mask)
    grouped, kept = pb_llm_weight(24, 128, 0.1, group_size=32)
    with pytest.raises(ValueError, match=r"values outside of the mask .* give the mask, the group size"):
        import_linear(linear_of(grouped), config, kept)
    wide = linear_of(torch.full((2, 64), 1e6), torch.float32)
    with torch.no_grad():
        wide.weight[1, ::2] = 1e-6
    with pytest.raises(ValueError, match="row 1 has two values so far apart"):
        import_linear(wide, config)
    with torch.no_grad():
        wide.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="import_linear: weight must be finite"):
        import_linear(wide, config)
    for wrong in (mask[1:], mask.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"mask must be bool \[24, 128\], got (bool|uint8) \[2"):
            import_linear(linear_of(weight), config, wrong)
    with pytest.raises(ValueError, match=r"linear must be a torch\.nn\.Linear, got Identity"):
        import_linear(nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight must be float16, bfloat16 or float32, got float64; load"):
        import_linear(linear_of(weight, torch.float64))
    with pytest.raises(ValueError, match=r"weight must have rows and columns, got \[3, 0\]"):
        import_linear(linear_of(torch.zeros(3, 0)))


def checkpoint(folder: Path) -> Stories:
    """A whole model with the weights of the program, and the masks that it leaves."""
    model = Stories(SMALL).half().eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight, mask = pb_llm_weight(*module.weight.shape, 0.1)
            with torch.no_grad():
                module.weight.copy_(weight)
            torch.save(~mask, folder / f"mask_0.9_facebook_opt-125m{name}.pkl")
    return model


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    twin = Stories(SMALL).half().eval()
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(50, (2, 9))
    wanted = model(ids)
    masks = read_masks(tmp_path, model)
    assert len(masks) == 14 and all(0.08 < mask.float().mean() < 0.1 for mask in masks.values())
    assert import_(model, config_of(0.1), masks) == list(masks)
    assert not any(type(m) is nn.Linear for m in model.modules())
    torch.testing.assert_close(model(ids), wanted, rtol=2e-2, atol=2e-2)
    save(model, tmp_path / "packed.safetensors")
    loaded = Stories(SMALL).half().eval()
    load(loaded, tmp_path / "packed.safetensors")
    assert torch.equal(loaded(ids), model(ids))
    assert len(import_(twin, config_of(0.1))) == 14
    for name in masks:
        one, other = (m.get_submodule(name).dequantize().weight.half() for m in (model, twin))
        assert torch.equal(one, other)


def test_a_checkpoint_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    masks = read_masks(tmp_path, model)
    with torch.no_grad():
        model.layers[1].w2.weight[3] = torch.randn(64)
    with pytest.raises(ValueError, match=r"import_: layers\.1\.w2: .* row 3 has \d+ values outside of the mask"):
        import_(model, config_of(0.1), masks)
    assert type(model.layers[0].wq) is nn.Linear
    assert import_(model, config_of(0.1), masks, filter_fn=lambda module, name: name != "layers.1.w2")
    model = checkpoint(tmp_path)
    torch.save(torch.ones(32, 32, dtype=torch.bool), tmp_path / "mask_0.8_facebook_opt-125mlayers.0.wq.pkl")
    with pytest.raises(ValueError, match=r"must hold one file for layer layers\.0\.wq, got mask_0\.8.*, mask_0\.9"):
        read_masks(tmp_path, model)
    with pytest.raises(ValueError, match=r"must hold one file for layer layers\.0\.wq, got none"):
        read_masks(tmp_path / "nowhere", model)
