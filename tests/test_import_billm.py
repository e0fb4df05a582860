# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that BiLLM's program wrote: the recorded ones, ones made by its formulas, and ones that are neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitmill import load, save
from bitmill.config import ZonedConfig
from bitmill.demo.model import Stories, StoriesConfig
from bitmill.integrations.billm import import_, import_linear
from bitmill.nn import PackedZonedLinear
from bitmill.recipes import billm
from fake_quantised_inputs import billm_weight, linear_of, pb_llm_weight

SMALL = StoriesConfig(dim=32, hidden=64, layers=2, heads=4, kv_heads=2, vocab=50, context=24)
HALVES = (torch.float16, torch.bfloat16)


def config_of(block: int = 128, split: bool = False) -> ZonedConfig:
    return ZonedConfig(block, split_salient=split, scale_bits=32)


def assert_same_numbers(packed: PackedZonedLinear, linear: nn.Linear) -> None:
    dense = packed.dequantize()
    assert torch.equal(dense.weight.to(linear.weight.dtype), linear.weight)
    assert torch.equal(packed.bias, linear.bias.float())
    packed.validate()
    x = torch.randn(3, linear.in_features)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, dense.weight, dense.bias))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "block", "salient"),
    [(300, 172, 128, 20), (40, 135, 32, 3), (24, 64, 64, 1), (24, 64, 96, 2), (17, 118, 64, 40)],
)
def test_packs_without_loss_and_finds_the_columns(n: int, k: int, block: int, salient: int, dtype: torch.dtype) -> None:
    weight, columns = billm_weight(n, k, salient, block)
    linear = linear_of(weight, dtype)
    for config in (config_of(block), config_of(block, split=True)):
        for known in (None, columns):
            packed = import_linear(linear, config, known)
            assert_same_numbers(packed, linear)
            assert packed.config == config
            if known is not None or not config.split_salient:
                assert torch.equal(packed._salient_columns(), columns)
    in_float32 = linear_of(linear.weight, torch.float32)
    assert_same_numbers(import_linear(in_float32, config_of(block, split=True)), in_float32)


@pytest.mark.parametrize(("scale_bits", "dtype"), [(16, torch.float16), (32, torch.float16), (16, torch.float32)])
def test_packs_what_the_recipe_makes(scale_bits: int, dtype: torch.dtype) -> None:
    for n, k, block in ((32, 80, 64), (1, 40, 32), (2, 32, 64), (5, 33, 32), (7, 1, 32)):
        result = billm.quantize_weight(torch.randn(n, k) * 0.05, torch.eye(k), block=block, scale_bits=scale_bits)
        linear = linear_of(result.value, dtype)
        assert_same_numbers(import_linear(linear, config_of(block)), linear)
        assert_same_numbers(import_linear(linear, config_of(block), result.weight.salient), linear)


@pytest.mark.parametrize("variant", [1, 2])
def test_packs_what_the_program_wrote(variant: int, golden_folder: Path) -> None:
    path = golden_folder / "billm" / f"gptq-{variant}.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    case = np.load(path)
    for weight, zone in zip(case["out_w"], case["out_mask"], strict=True):
        linear = linear_of(torch.from_numpy(weight))
        columns = torch.from_numpy(zone == billm.SALIENT)[0]
        for known in (None, columns):
            packed = import_linear(linear, config_of(int(case["hp_blocksize"])), known)
            assert_same_numbers(packed, linear)
            assert torch.equal(packed._salient_columns(), columns)


def test_rows_of_few_values() -> None:
    rows = torch.tensor([[0.0] * 8, [-0.02] * 8, [0.1] * 4 + [-0.1] * 4, [0.3, 0.1, 0.2] * 2 + [0.3, 0.3]])
    for k in (40, 1):
        linear = linear_of(rows.repeat(1, 5)[:, :k])
        assert_same_numbers(import_linear(linear, config_of(32)), linear)


def test_a_salient_value_may_be_one_of_the_others_too() -> None:
    weight, columns = billm_weight(64, 128, 9)
    weight = weight.half()
    for row in range(0, 64, 2):
        salient, other = weight[row, columns].unique(), weight[row, ~columns].unique()
        weight[row, ~columns] = torch.where(weight[row, ~columns] == other[0], salient[-1], weight[row, ~columns])
    linear = linear_of(weight)
    packed = import_linear(linear)
    assert_same_numbers(packed, linear)
    assert torch.equal(packed._salient_columns(), columns)


def test_any_four_values_fit_split_columns() -> None:
    weight, columns = billm_weight(12, 128, 30)
    weight[5, columns] = torch.tensor([-0.3, -0.01, 0.05, 0.11]).repeat(8)[:30]
    linear = linear_of(weight)
    for known in (None, columns):
        with pytest.raises(
            ValueError,
            match=r"row 5, columns 0 to 127, has -0.300049, .*, 0.109985 in the salient columns, which are not mu \+-"
            r" alpha \+- beta; load .* or take split_salient=True",
        ):
            import_linear(linear, salient_columns=known)
        assert_same_numbers(import_linear(linear, config_of(split=True), known), linear)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_other_weights_are_refused_with_the_row_and_the_reason() -> None:
    weight, columns = billm_weight(24, 200, 20)
    other = weight.clone()
    other[7, 128 + int((~columns[128:]).nonzero()[3])] = 0.5
    with pytest.raises(
        ValueError,
        match="import_linear: the weight must be as BiLLM's program writes it, row 7, columns 128 to 199, has 5 values"
        " in the other columns, not at most 4; give the block and the salient columns",
    ):
        import_linear(linear_of(other), salient_columns=columns)
    with pytest.raises(ValueError, match=r"row 7, columns 128 to 199, has 9 values, not at most 8; give"):
        import_linear(linear_of(other))
    with pytest.raises(ValueError, match=r"row \d+, columns 0 to 127, has [5-8] values in the (salient|other) columns"):
        import_linear(linear_of(weight), salient_columns=~columns.roll(1))
    with pytest.raises(ValueError, match=r"row \d+, columns 0 to 199, has \d+ values, not at most 8"):
        import_linear(linear_of(weight), config_of(256))
    eight = torch.randn(24, 8).gather(1, torch.randint(8, (24, 128)))
    with pytest.raises(ValueError, match=r"has 8 values, and no salient columns were found that leave every row at mo"):
        import_linear(linear_of(eight))
    for dense in (torch.randn(24, 128), pb_llm_weight(24, 128, 0.1)[0]):
        with pytest.raises(ValueError, match=r"row \d+, columns 0 to 127, has \d+ values, not at most 8"):
            import_linear(linear_of(dense))
    wide = torch.tensor([[1.1e-6, 1.1, 1.1e6, 1.1e12]] * 2)
    with pytest.raises(
        ValueError, match=r"row 0, columns 0 to 3, has .* in the other columns, which are not two zones"
    ):
        import_linear(linear_of(wide, torch.float32), salient_columns=torch.zeros(4, dtype=torch.bool))
    wide[1, 0] = torch.nan
    with pytest.raises(ValueError, match="import_linear: weight must be finite"):
        import_linear(linear_of(wide))
    with pytest.raises(ValueError, match="weight must be float16, bfloat16 or float32, got float64"):
        import_linear(linear_of(weight, torch.float64))
    with pytest.raises(ValueError, match=r"weight must have rows and columns, got \[0, 3\]"):
        import_linear(linear_of(torch.zeros(0, 3)))
    for wrong in (columns[1:], columns.to(torch.uint8)):
        with pytest.raises(ValueError, match=r"salient_columns must be bool \[200\], got (bool \[199|uint8 \[200)\]"):
            import_linear(linear_of(weight), salient_columns=wrong)
    for config in (ZonedConfig(), ZonedConfig(centre=False, scale_bits=32), ZonedConfig(column_scale=True)):
        with pytest.raises(ValueError, match="config must have scale_bits=32, centre=True and column_scale=False, got"):
            import_linear(linear_of(weight), config)

    class Own(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"linear must be a torch\.nn\.Linear, got Own"):
        import_linear(Own(4, 4))


def checkpoint() -> tuple[Stories, dict[str, Tensor]]:
    """A whole model with the weights of the program, and the salient columns, which it does not save."""
    model, columns = Stories(SMALL).half().eval(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight, columns[name] = billm_weight(*module.weight.shape, 5, 32)
            with torch.no_grad():
                module.weight.copy_(weight)
    return model, columns


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    model, columns = checkpoint()
    twin = Stories(SMALL).half().eval()
    twin.load_state_dict(model.state_dict())
    twin.layers[1].wq.weight = twin.layers[0].wq.weight  # tied: the numbers are packed twice
    ids = torch.randint(50, (2, 9))
    wanted = model(ids)
    assert import_(model, config_of(32)) == list(columns) and len(columns) == 14
    assert not any(type(m) is nn.Linear for m in model.modules())
    torch.testing.assert_close(model(ids), wanted, rtol=2e-2, atol=2e-2)
    save(model, tmp_path / "packed.safetensors")
    loaded = Stories(SMALL).half().eval()
    load(loaded, tmp_path / "packed.safetensors")
    assert torch.equal(loaded(ids), model(ids))
    columns["layers.1.wq"] = columns["layers.0.wq"]
    import_(twin, config_of(32), columns)
    for name in columns:
        same = model.get_submodule(name if name != "layers.1.wq" else "layers.0.wq")
        one, other = (module.dequantize().weight.half() for module in (twin.get_submodule(name), same))
        assert torch.equal(one, other)


def test_a_checkpoint_that_does_not_fit_is_left_alone() -> None:
    model, columns = checkpoint()
    with torch.no_grad():
        model.layers[1].w2.weight[3] = torch.randn(64)
    with pytest.raises(ValueError, match=r"import_: layers\.1\.w2: .* row 3, columns 0 to 31, has \d+ values"):
        import_(model, config_of(32))
    assert type(model.layers[0].wq) is nn.Linear
    hook = model.layers[0].wk.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"import_: layers\.0\.wk: it has hooks"):
        import_(model, config_of(32))
    hook.remove()
    names = import_(model, config_of(32), filter_fn=lambda module, name: name != "layers.1.w2")
    assert set(columns) - set(names) == {"layers.1.w2"}
