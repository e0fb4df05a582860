# SPDX-License-Identifier: Apache-2.0
"""The walk through a model's blocks: what every layer is measured on, what stays as it was, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitmill import SalientConfig
from bitmill.demo.model import Stories, StoriesConfig
from bitmill.recipes import pb_llm
from bitmill.recipes.gptq import Hessian
from bitmill.recipes.layerwise import decoder_blocks, quantize_blocks_

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def stories() -> nn.Module:
    return Stories(StoriesConfig(dim=32, hidden=48, layers=3, heads=4, kv_heads=2, vocab=50, context=24))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=48))


def opt() -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=24, word_embed_proj_dim=32)
    )


def gemma() -> nn.Module:
    """Its blocks are not called alike: some attend to a window only."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **sizes, layer_types=kinds))


MODELS = {"stories": stories, "llama": llama, "opt": opt, "gemma": gemma}


def batches_for(name: str) -> list[Any]:
    """Of several shapes; where the model knows a padding mask, one of them has padding."""
    ids = [torch.randint(50, shape) for shape in ((2, 12), (2, 12), (1, 20), (3, 7))]
    if name == "stories":
        return ids
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    return [{"input_ids": ids[0], "attention_mask": mask}, *ids[1:]]


def forward(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    return output if isinstance(output, Tensor) else output.logits


def coarse(linear: nn.Linear) -> nn.Linear:
    twin = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    twin.load_state_dict({name: torch.round(t * 20) / 20 for name, t in linear.state_dict().items()})
    return twin


def with_packed_layers(model: nn.Module, batches: list[Any], **arguments: Any) -> dict[str, float]:
    return pb_llm.quantize_(model, batches, SalientConfig(0.3, metric="hessian"), progress=False, **arguments)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_measured_behind_the_quantised_blocks(name: str) -> None:
    model, batches = MODELS[name]().eval(), batches_for(name)
    twin = MODELS[name]()
    twin.load_state_dict(model.state_dict())
    given: dict[nn.Linear, Hessian] = {}

    def quantise(linear: nn.Linear, hessian: Hessian) -> tuple[nn.Module, float]:
        given[linear] = hessian
        return coarse(linear), 0.5

    originals = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    errors = quantize_blocks_(model, batches, quantise, {}, progress=False)
    prefix, _ = decoder_blocks(twin)
    assert list(errors) == [n for n in originals if n.startswith(prefix)] and set(errors.values()) == {0.5}
    # The slow way: the whole model anew for every block, those before it quantised.
    for index in range(3):
        block = twin.get_submodule(f"{prefix}.{index}")
        measured: dict[str, Hessian] = {}

        def adder(hessian: Hessian) -> Callable[..., None]:
            return lambda module, args: hessian.add(args[0], sequences)  # noqa: B023

        handles = []
        for path, layer in block.named_modules():
            if type(layer) is nn.Linear:
                measured[path] = Hessian(layer.in_features)
                handles.append(layer.register_forward_pre_hook(adder(measured[path])))
        with torch.no_grad():
            for batch in batches:
                sequences = len(batch["input_ids"] if isinstance(batch, dict) else batch)
                forward(twin.eval(), batch)
        for handle in handles:
            handle.remove()
        for path, want in measured.items():
            got = given[originals[f"{prefix}.{index}.{path}"]]
            assert got.sequences == want.sequences == 8
            torch.testing.assert_close(got.matrix, want.matrix, rtol=1e-4, atol=1e-5 * want.matrix.max().item())
            parent, _, child = path.rpartition(".")
            setattr(block.get_submodule(parent), child, coarse(block.get_submodule(path)))
    for batch in batches:
        torch.testing.assert_close(forward(model, batch), forward(twin, batch), rtol=1e-4, atol=1e-5)


def test_layers_with_one_input_share_its_hessian() -> None:
    model = stories()
    given: dict[str, Hessian] = {}
    names = {m: n for n, m in model.named_modules()}

    def quantise(linear: nn.Linear, hessian: Hessian) -> tuple[nn.Module, float]:
        given[names[linear]] = hessian
        return linear, 0.0

    quantize_blocks_(model, batches_for("stories"), quantise, {}, progress=False)
    one = {name.removeprefix("layers.1."): h for name, h in given.items() if name.startswith("layers.1.")}
    assert one["wq"] is one["wk"] is one["wv"] and one["w1"] is one["w3"]
    assert len({id(h) for h in one.values()}) == 4


def test_a_forward_that_a_host_has_put_into_a_block_stays() -> None:
    """Such as those that move weights between devices."""
    model = stories()
    block, calls = model.layers[1], []
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    block.forward = forward
    with_packed_layers(model, batches_for("stories"))
    assert block.forward is forward and "forward" not in vars(model.layers[0])
    calls.clear()
    model(batches_for("stories")[0])
    assert calls


@pytest.mark.parametrize("fails", [False, True])
def test_the_rest_of_the_model_stays_as_it_was(fails: bool) -> None:
    model = llama().train()
    model.model.layers[1].mlp.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    if fails:
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj: .* must be finite"):
            with_packed_layers(model, batches_for("llama"))
    else:
        with_packed_layers(model, batches_for("llama"))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert model.config.use_cache
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, t in model.state_dict().items():
        if name in before and "proj" not in name:
            assert torch.equal(t, before[name]), name


def test_resume_after_a_kill_gives_the_same_model(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    start, batches = llama().eval(), batches_for("llama")

    def fresh() -> nn.Module:
        model = llama()
        model.load_state_dict(start.state_dict())
        return model

    whole, doomed, resumed = fresh(), fresh(), fresh()
    errors = with_packed_layers(whole, batches)
    calls = 0

    def die_in_the_measuring_pass(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > len(batches):  # the first pass of all blocks records only
            raise Killed

    doomed.model.layers[1].post_attention_layernorm.register_forward_pre_hook(die_in_the_measuring_pass)
    with pytest.raises(Killed):
        with_packed_layers(doomed, batches, folder=tmp_path)
    assert (tmp_path / "block-000.safetensors").exists() and not (tmp_path / "block-001.safetensors").exists()
    assert with_packed_layers(resumed, batches, folder=tmp_path) == errors
    again = fresh()
    assert with_packed_layers(again, batches, folder=tmp_path) == errors
    for model in (resumed, again):
        assert model.state_dict().keys() == whole.state_dict().keys()
        for name, t in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], t), name

    with pytest.raises(ValueError, match="folder must hold a run with the same text"):
        with_packed_layers(fresh(), batches[1:], folder=tmp_path)
    for arguments in ({"damping": 0.1}, {"filter_fn": lambda module, name: "mlp" in name}):
        with pytest.raises(ValueError, match="folder must hold a run with the same settings"):
            with_packed_layers(fresh(), batches, folder=tmp_path, **arguments)
    other = fresh()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"folder must hold a run of the same model, .* has another block 1"):
        with_packed_layers(other, batches, folder=tmp_path)


def test_a_full_disk_and_a_broken_folder_lose_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    start, batches = llama().eval(), batches_for("llama")

    def run(**arguments: Any) -> nn.Module:
        model = llama()
        model.load_state_dict(start.state_dict())
        with_packed_layers(model, batches, folder=tmp_path, **arguments)
        return model

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"save: .*block-000\.safetensors cannot be written: "):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())  # not even a part of a file
    whole = run()

    blocks = [tmp_path / f"block-{i:03}.safetensors" for i in range(3)]
    kept, record = blocks[1].read_bytes(), (tmp_path / "run.json").read_text()
    blocks[1].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=r"block-001\.safetensors"):
        run()
    blocks[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"block-001\.safetensors"):
        run()
    blocks[1].write_bytes(kept)
    changed = json.loads(record)
    del changed["blocks"][1]["errors"]
    empty = json.dumps({**changed, "blocks": {}})
    for broken in (record[: len(record) // 2], "[]", "{}", json.dumps(changed), empty):
        (tmp_path / "run.json").write_text(broken)
        with pytest.raises(ValueError, match=r"run\.json is cut off or damaged; delete it to begin anew"):
            run()
    (tmp_path / "run.json").unlink()
    for model in (run(), run()):
        assert all(torch.equal(t, whole.state_dict()[name]) for name, t in model.state_dict().items())


def test_a_hessian_that_cannot_be_inverted_names_its_layer() -> None:
    model, batches = stories(), batches_for("stories")
    with pytest.raises(ValueError, match=r"layers\.0\.wq: factor: hessian must be positive definite, .* damping=0.0"):
        with_packed_layers(model, batches[2:3], damping=0.0)
    assert type(model.layers[0].wq) is nn.Linear
    with torch.no_grad():
        model.layers[0].attention_norm.weight.fill_(1e30)
    with pytest.raises(ValueError, match=r"layers\.0\.wq: factor: hessian must be finite"):
        with_packed_layers(model, batches)
    assert type(model.layers[0].wq) is nn.Linear


def test_a_filter_leaves_layers_and_whole_blocks_alone() -> None:
    model = stories()
    errors = with_packed_layers(
        model, batches_for("stories"), filter_fn=lambda module, name: "w1" in name and "layers.1" not in name
    )
    assert list(errors) == ["layers.0.w1", "layers.2.w1"]
    assert type(model.layers[0].w2) is nn.Linear and type(model.layers[1].w1) is nn.Linear


class Two(nn.Module):
    """Two lists of blocks, one of which has a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.second = nn.ModuleList(nn.ModuleDict({"used": nn.Linear(4, 4), "spare": nn.Linear(4, 4)}) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = block(x)
        return x


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(2, 4, 4))


def test_a_run_with_other_masks_is_another_run(tmp_path: Path) -> None:
    def run(masked: int) -> None:
        torch.manual_seed(0)
        ids, mask = torch.randint(50, (1, 9)), torch.ones(1, 9, dtype=torch.long)
        mask[:, :masked] = 0
        batches = [{"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(9)[None]}]
        with_packed_layers(llama().eval(), batches, folder=tmp_path)

    run(2)
    with pytest.raises(ValueError, match="must hold a run with the same text"):
        run(3)


def test_lists_of_blocks_and_hooks_that_do_not_fit() -> None:
    model, x = Two(), [torch.randn(2, 3, 4)]
    with pytest.raises(ValueError, match=r"in one nn\.ModuleList, got the lists first, second; name it"):
        with_packed_layers(model, x)
    with pytest.raises(ValueError, match=r"must name an nn\.ModuleList of the model, got 'third'"):
        with_packed_layers(model, x, blocks="third")
    with pytest.raises(ValueError, match="must reach its last block, it did not"):
        with_packed_layers(model, x, blocks="second")
    model = stories()
    model.layers[2] = model.layers[0]
    with pytest.raises(ValueError, match=r"blocks must be different modules, layers has one of them more than once"):
        with_packed_layers(model, batches_for("stories"))
    model = stories()
    model.layers[1].spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"layers\.1\.spare: the calibration text must reach every layer"):
        with_packed_layers(model, batches_for("stories"))
    model = stories()
    model.layers[2].w1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.2\.w1: it has hooks"):
        with_packed_layers(model, batches_for("stories"))
    with pytest.raises(ValueError, match="without a key-value cache"):
        with_packed_layers(llama(), [{"input_ids": torch.randint(50, (1, 9)), "use_cache": True}])
    model = stories()
    model.layers[1].experts = Experts()
    with pytest.raises(ValueError, match=r"nn\.Linear layers, got layers\.1\.experts\.up of shape \[2, 4, 4\]; split"):
        with_packed_layers(model, batches_for("stories"))
    done = stories()
    with_packed_layers(done, batches_for("stories"))
    with pytest.raises(ValueError, match=r"quantised has no nn\.Linear left"):
        with_packed_layers(done, batches_for("stories"))
