# SPDX-License-Identifier: Apache-2.0
"""LLM-FP4: the search in one layer, whole models of texts and images, and training on. The golden vectors have the
published search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitmill import FP4Config, load, pack_, save
from bitmill import quantize_ as train_form_
from bitmill.demo.model import Stories, StoriesConfig
from bitmill.nn import PackedFP4Linear
from bitmill.recipes import llm_fp4
from bitmill.recipes.fpq_search import FORMATS, Cast, Search, _Layer, search_layer


def layer(n: int = 24, k: int = 40, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight, and inputs whose channels differ in magnitude, as in language models."""
    return torch.randn(n, k), torch.randn(tokens, k) * torch.exp2(torch.randint(-4, 4, (k,)).float())


def test_the_default_search_does_not_depend_on_magnitudes() -> None:
    weight, inputs = layer()
    found = search_layer(weight, inputs)
    for factor in (2.0**-7, 2.0**9):
        other = search_layer(weight * factor, inputs / factor)
        assert other.weight.format == found.weight.format and other.activation.format == found.activation.format
        assert torch.equal(other.weight.scale, found.weight.scale * factor)
        assert torch.equal(other.activation.scale, found.activation.scale / factor)
        assert torch.equal(other.activation.shift, found.activation.shift) and other.error == found.error


def test_the_published_search_is_none_where_the_bias_is_0() -> None:
    weight, inputs = layer(1)
    weight *= 12 / weight.abs().max()
    paper = Search("float", search="paper", formats=("e2m1",))
    assert len(torch.stack(list(paper.scales(torch.tensor(12.0), "e2m1"))).unique()) == 1
    scale = Search("float", formats=("e2m1",))
    assert search_layer(weight, inputs, None, scale).error < search_layer(weight, inputs, None, paper).error


def test_every_step_of_the_method_helps() -> None:
    weight, inputs = layer(48, 64, 400)
    minmax = search_layer(weight, inputs, None, Search(shift=False, search="minmax", formats=("e1m2",)))
    baseline = search_layer(weight, inputs, None, Search(shift=False))
    found = search_layer(weight, inputs)
    assert found.error < 0.9 * baseline.error and baseline.error < minmax.error
    assert found.activation.shift.max() > 0 and baseline.activation.shift is None
    weights = search_layer(weight, inputs, None, Search("float"))
    assert weights.activation is None and weights.error < found.error
    for metric in ("l1", "cosine"):
        other = search_layer(weight, inputs, None, Search(metric=metric))
        assert found.error <= 1.02 * other.error < baseline.error
    again = search_layer(weight, inputs)
    assert again.error == found.error and torch.equal(again.weight.scale, found.weight.scale)


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_the_best_scale_of_a_row_has_the_least_error(metric: str) -> None:
    """Also the one of "l2", which never multiplies with a token."""
    weight, inputs = layer(5, 20, 60)
    search = Search(metric=metric, candidates=12)
    cast = Cast("e2m1", torch.tensor(0.3), torch.randint(0, 4, (20,), dtype=torch.uint8))
    found, _ = _Layer(weight, inputs, inputs.abs().amax(0), search).search_weights(cast)
    outputs, got = inputs @ weight.T, cast(inputs)
    for format in FORMATS:
        for row in range(5):
            errors, scales = [], list(search.scales(weight[row].abs().max(), format))
            for scale in scales:
                y = got @ Cast(format, scale)(weight[row])
                difference = outputs[:, row] - y
                errors.append(
                    {
                        "l2": difference.square().mean(),
                        "l1": difference.abs().mean(),
                        "cosine": -torch.cosine_similarity(outputs[:, row], y, dim=0),
                    }[metric]
                )
            assert found[format].scale[row, 0] == scales[int(torch.stack(errors).argmin())]


def test_rows_and_channels_of_zeros() -> None:
    weight, inputs = layer()
    weight[3], inputs[:, 5] = 0.0, 0.0
    for search in (Search(), Search(search="paper"), Search("float"), Search(search="minmax", shift=False)):
        found = search_layer(weight, inputs, None, search)
        assert found.error < 0.5 and found.weight.scale.isfinite().all() and (found.weight(weight)[3] == 0).all()
    assert search_layer(weight * 0, inputs).error == 0


def test_a_candidate_whose_products_are_no_numbers_is_not_taken() -> None:
    weight, inputs = torch.tensor([[0.0, 1.0]]), torch.tensor([[torch.finfo(torch.float32).max, 1.0]])
    for metric in ("l1", "l2"):
        search = Search(shift=False, metric=metric, activation_formats=("e1m2",))
        casts, errors = _Layer(weight, inputs, inputs[0], search).search_activations(Cast("e1m2", torch.ones(1, 1)))
        assert casts["e1m2"](inputs).isfinite().all()  # the first candidate's largest value is infinite
        assert errors == {"e1m2": 1.0}  # the small channel is lost in the steps of the large one


def test_the_packed_layer_is_what_was_found() -> None:
    linear, (_, inputs) = nn.Linear(40, 24), layer()
    for search in (Search(), Search(shift=False, activation_formats=("e3m0",)), Search("int8"), Search("float")):
        found = search_layer(linear.weight, inputs, None, search)
        packed = llm_fp4.pack_linear(linear, found, search.activations)
        packed.validate()
        assert torch.equal(packed.dequantize().weight, found.weight(linear.weight.detach()))
        x = torch.randn(7, 40)
        values = x if found.activation is None else found.activation(x)
        want = nn.functional.linear(values, found.weight(linear.weight), linear.bias)
        assert (packed(x) - want).norm() < (0.02 if search.activations == "int8" else 1e-5) * want.norm()


FAST = Search(candidates=6)


def stories() -> nn.Module:
    return Stories(StoriesConfig(dim=32, hidden=48, layers=3, heads=4, kv_heads=2, vocab=50, context=24)).eval()


@pytest.mark.parametrize("parallel", [False, True])
def test_a_language_model_is_packed_saved_and_resumed(parallel: bool, tmp_path: Path) -> None:
    start, ids = stories(), [torch.randint(50, (2, 20)) for _ in range(3)]

    def run(model: nn.Module, **options: Any) -> dict[str, float]:
        options = {"search": FAST, **options}
        return llm_fp4.quantize_(model, ids, parallel=parallel, progress=False, **options)

    class Killed(BaseException):
        pass

    models = []
    for _ in range(3):
        models.append(stories())
        models[-1].load_state_dict(start.state_dict())
    whole, doomed, resumed = models
    errors = run(whole)
    assert len(errors) == 21 and all(0 < error < 0.4 for error in errors.values())
    kinds = {type(module) for module in whole.layers.modules()}
    assert PackedFP4Linear in kinds and nn.Linear not in kinds
    assert whole.layers[0].w1.config.static_activations
    calls = 0

    def die_later(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > len(ids):  # the first pass of all blocks records only
            raise Killed

    doomed.layers[1].register_forward_pre_hook(die_later)
    with pytest.raises(Killed):
        run(doomed, folder=tmp_path)
    assert run(resumed, folder=tmp_path) == errors
    assert torch.equal(resumed(ids[0]), whole(ids[0]))
    with pytest.raises(ValueError, match="folder must hold a run with the same settings"):
        run(stories(), folder=tmp_path, search=Search(search="paper"))
    save(whole, tmp_path / "packed")
    fresh = stories()
    load(fresh, tmp_path / "packed")
    assert torch.equal(fresh(ids[0]), whole(ids[0]))
    assert (whole(ids[0]) - start(ids[0])).norm() < 0.5 * start(ids[0]).norm()


def bert() -> tuple[nn.Module, list[Any]]:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    batch = {"input_ids": torch.randint(50, (3, 12)), "attention_mask": mask}
    return transformers.BertModel(config, add_pooling_layer=False), [batch]


def vit() -> tuple[nn.Module, list[Any]]:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4)
    return transformers.ViTModel(config, add_pooling_layer=False), [torch.randn(4, 3, 16, 16)]


@pytest.mark.parametrize("build", [bert, vit], ids=["bert", "vit"])
def test_encoders_of_texts_and_images(build: Any, tmp_path: Path) -> None:
    model, batches = build()
    model.eval()

    def states(model: nn.Module) -> Tensor:
        batch = batches[0]
        with torch.no_grad():
            return (model(**batch) if isinstance(batch, dict) else model(batch)).last_hidden_state

    before = states(model)
    errors = llm_fp4.quantize_(model, batches, FAST, progress=False)
    assert len(errors) == 12 and all(0 < error < 0.4 for error in errors.values())
    after = states(model)
    assert 0 < (after - before).norm() < 0.4 * before.norm()
    save(model, tmp_path / "packed")
    fresh, _ = build()
    load(fresh.eval(), tmp_path / "packed")
    assert torch.equal(states(fresh), after)


def test_calibrated_layers_learn_and_pack() -> None:
    model = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(64, 40) * torch.exp2(torch.randint(-3, 3, (40,)).float())
    train_form_(model, FP4Config("e2m1", activations="e2m1"))
    floats = nn.functional.linear(x, model[0].weight, model[0].bias).relu()
    assert llm_fp4.calibrate_(model, [x[:32], x[32:]]) == ["0", "2"]
    assert model[0].input_scale == x.abs().max() / 6
    assert model[2].input_scale == floats.abs().max() / 6
    target, optimizer = torch.randn(64, 8), torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(model(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    trained = model(x).detach()
    assert pack_(model) == ["0", "2"] and model[0].kernel == "fp4_fp4_linear"
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)


def test_says_what_is_wrong() -> None:
    weight, inputs = layer()
    for call, message in (
        (lambda: Search("fp8"), "Search: activations must be one of fp4, float, int8, got 'fp8'"),
        (lambda: Search(search="grid"), "Search: search must be one of scale, paper, minmax, got 'grid'"),
        (lambda: Search(metric="l3"), "Search: metric must be one of l2, l1, cosine, got 'l3'"),
        (lambda: Search(formats=("nf4",)), r"Search: formats must be some of e3m0, e2m1, e1m2, got \('nf4',\)"),
        (lambda: Search(activation_formats=()), r"Search: activation_formats must be some of .* got \(\)"),
        (lambda: Search(rounds=0), "Search: rounds must be at least 1, got 0"),
        (lambda: Search(candidates=0), "Search: candidates must be at least 1, got 0"),
        (lambda: search_layer(weight, inputs[:, 1:]), r"inputs must have shape \[tokens, 40\].* got \[200, 39\]"),
        (lambda: search_layer(weight, inputs[:0]), r"with a token at least .* got \[0, 40\]"),
        (lambda: search_layer(weight * torch.nan, inputs), "search_layer: weight must be finite"),
        (lambda: search_layer(weight, inputs / 0), "search_layer: inputs must be finite"),
        (lambda: search_layer(weight, inputs, inputs[0, 1:]), r"amax must have shape \[40\], got \[39\]"),
        (lambda: search_layer(weight, inputs, torch.full((40,), torch.inf)), "search_layer: amax must be finite"),
        (lambda: llm_fp4.quantize_(stories(), [], tokens=0), "quantize_: tokens must be None or at least 1, got 0"),
        (lambda: llm_fp4.quantize_(stories(), []), "quantize_: batches must hold calibration text, got none"),
        (lambda: llm_fp4.calibrate_(stories(), []), "the model must have FP4Linear layers with static activations"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model = nn.Sequential(nn.Linear(4, 4))
    train_form_(model, FP4Config(activations="e1m2"))
    with pytest.raises(ValueError, match="calibrate_: 0: the batches must reach every layer, they never call this one"):
        llm_fp4.calibrate_(model, [])
    with pytest.raises(ValueError, match="calibrate_: 0: FP4Linear: amax must be finite"):
        llm_fp4.calibrate_(model, [torch.full((2, 4), torch.inf)])
