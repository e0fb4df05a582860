# SPDX-License-Identifier: Apache-2.0
"""Whole encoders and embeddings in a call: that they notice whatever is changed, watched or replaced after packing."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import BinaryConfig, FP4Config, pack_
from bitmill.chained import chains
from bitmill.unchanged import Unchanged, all_unchanged_in_python, held_by

transformers = pytest.importorskip("transformers")

from bitmill.recipes import bibert  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"vocab_size": 300, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192}


def pair(config: BinaryConfig | FP4Config | None = None, host: Any = None) -> tuple[nn.Module, nn.Module]:
    """A small BERT packed layer by layer, and in chains; `config` is that of its words."""
    host = host or transformers.BertModel
    plain = host(host.config_class(**SIZES, num_hidden_layers=2, max_position_embeddings=48)).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    if config is not None:
        bitmill.quantize_(plain, config, lambda module, name: name.endswith("word_embeddings"))
    bibert.binarize_(plain)
    chained = copy.deepcopy(plain)
    pack_(plain, chain=False)
    pack_(chained)
    assert set(dict(chains(chained)).values()) == {""}
    return plain, chained


def states(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).last_hidden_state


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Dropout()
        self.register_buffer("step", torch.ones(1))


def watched() -> tuple[Two, Unchanged]:
    module = Two().eval()
    everything = list(module.modules())
    held = [*held_by(everything, "_modules", "_parameters", "_buffers"), (module.second, "__dict__", "p")]
    return module, Unchanged((module, module.second), everything, held)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "child": lambda two: setattr(two, "first", nn.Linear(2, 2)),
    "no child": lambda two: delattr(two, "first"),
    "parameter": lambda two: setattr(two.first, "weight", nn.Parameter(torch.ones(2, 2))),
    "buffer": lambda two: setattr(two, "step", torch.ones(1)),
    "number": lambda two: setattr(two.second, "p", 0.25),
    "training": lambda two: two.second.train(),
    "hook": lambda two: two.first.register_forward_hook(print),
    "hook before": lambda two: two.first.register_forward_pre_hook(print),
    "hook of gradients": lambda two: two.first.register_full_backward_hook(print),
    "forward": lambda two: setattr(two.first, "forward", torch.relu),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unchanged_notices(change: Callable[[Any], Any]) -> None:
    module, unchanged = watched()
    copied, copy_unchanged = copy.deepcopy((module, unchanged))
    assert unchanged() and copy_unchanged()
    copied_again, copy_again_unchanged = copy.deepcopy((copied, copy_unchanged))
    change(copied)
    assert not copy_unchanged() and unchanged() and copy_again_unchanged()
    change(copied_again)  # before it was asked again: a copy holds what its original did
    assert not copy_again_unchanged()
    change(module)
    assert not unchanged()


def test_unchanged_ignores_modes_of_the_silent_and_writing_in_place() -> None:
    module, unchanged = watched()
    module.first.train()
    with torch.no_grad():
        module.first.weight.zero_()
        module.step.zero_()
    module.third = nn.Identity()
    assert unchanged()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not unchanged()
    handle.remove()
    assert unchanged()


def test_many_dictionaries_at_once() -> None:
    """The compiled loop against that of Python."""
    _C = pytest.importorskip("bitmill._C")
    for count in (0, 1, 23, 24, 25, 47, 48, 49, 500):
        tables = [{str(key): object() for key in range(i % 40 + 1)} for i in range(count)]
        keys = [str(i % 7) for i in range(count)]
        values = [table.get(key) for table, key in zip(tables, keys, strict=True)]
        empty: list[dict[str, Any]] = [OrderedDict() for _ in range(count)]
        assert (
            _C.all_unchanged(empty, tables, keys, values)
            is all_unchanged_in_python(empty, tables, keys, values)
            is True
        )
        for i in {0, count // 2, count - 1} if count else ():
            for key in (keys[i], "another"):
                before = tables[i].pop(key, None)
                tables[i][key] = object()
                same = key == "another"
                assert _C.all_unchanged(empty, tables, keys, values) is same
                assert all_unchanged_in_python(empty, tables, keys, values) is same
                del tables[i][key]
                if before is not None:
                    tables[i][key] = before
            empty[i]["hook"] = print
            assert not _C.all_unchanged(empty, tables, keys, values)
            assert not all_unchanged_in_python(empty, tables, keys, values)
            empty[i].clear()
    for bad in (
        ([], [{}], [], []),
        ([], [{}], ["a"], []),
        ([1], [], [], []),
        ([], [1], ["a"], [1]),
        ([], [{}], [1], [1]),
    ):
        with pytest.raises((TypeError, ValueError), match="all_unchanged: "):
            _C.all_unchanged(*bad)


REPLACED = ("attention.self.query", "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense")
REPLACED += ("output.dense", "output.dropout", "output.LayerNorm", "attention.self", "intermediate", "")


@torch.no_grad()
@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("before", [True, False], ids=["before", "between"])
def test_a_module_replaced_after_packing_is_called(name: str, before: bool) -> None:
    """Before the first call, or between two."""
    plain, chained = pair()
    ids = torch.randint(300, (2, 20))
    if not before:
        assert torch.equal(states(chained, ids), states(plain, ids))
    for model in (plain, chained):
        parent, _, child = f"1.{name}".rstrip(".").rpartition(".")
        inside = model.encoder.layer.get_submodule(parent)
        torch.manual_seed(0)
        old = getattr(inside, child)
        setattr(inside, child, Negative(old))
    assert torch.equal(states(chained, ids), states(plain, ids))


class Negative(nn.Module):
    """A module whose results have the other sign."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.module(*args, **kwargs)
        return (-result[0], *result[1:]) if isinstance(result, tuple) else -result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modules["module"], name) if name != "module" else super().__getattr__(name)


@torch.no_grad()
def test_other_tensors_are_read() -> None:
    plain, chained = pair()
    ids = torch.randint(300, (2, 20))
    changes: list[Callable[[Any], Any]] = [
        lambda layer: setattr(layer.output.LayerNorm, "weight", nn.Parameter(torch.full((128,), 0.5))),
        lambda layer: layer.output.LayerNorm.weight.mul_(3),
        lambda layer: setattr(layer.output.LayerNorm, "eps", 4.0),
        lambda layer: setattr(layer.output.dense, "bias", torch.ones(128)),
        lambda layer: setattr(layer.attention.output.dense, "scale", torch.full((128, 1), 0.7)),
        lambda layer: setattr(layer.intermediate.dense, "weight", layer.intermediate.dense.weight.roll(1, 0)),
    ]
    last = states(plain, ids)
    for i, change in enumerate(changes):
        change(plain.encoder.layer[0]), change(chained.encoder.layer[0])
        now = states(chained, ids)
        assert torch.equal(now, states(plain, ids)), i
        assert not torch.equal(now, last), i
        last = now
    bfloat16 = copy.deepcopy(chained).bfloat16()
    assert torch.equal(states(bfloat16, ids), states(copy.deepcopy(plain).bfloat16(), ids))
    assert torch.equal(states(bfloat16.float(), ids), states(plain.bfloat16().float(), ids))
    other = pickle.loads(pickle.dumps(chained))
    other.encoder.layer[0].output.dense.bias.zero_()
    assert torch.equal(states(chained, ids), last) and not torch.equal(states(other, ids), last)


@pytest.mark.parametrize("host", [transformers.BertModel, transformers.ElectraModel])
@pytest.mark.parametrize("config", [None, FP4Config("e2m1", embeddings=True)])
def test_embeddings(host: Any, config: Any) -> None:
    plain, chained = pair(config, host)
    assert dict(chains(chained))["embeddings"] == ""
    ids, types = torch.randint(300, (2, 20)), torch.randint(2, (2, 20))
    a, b = plain.embeddings, chained.embeddings
    with torch.no_grad():
        for inputs in (
            {"input_ids": ids},
            {"input_ids": ids, "token_type_ids": types},
            {"input_ids": ids, "cache_length": 9},
            {"input_ids": ids[:, :1], "token_type_ids": types[:, :1], "cache_length": 47},
            {"input_ids": ids, "token_type_ids": types[:1]},
            {"input_ids": ids.int(), "token_type_ids": types.int()},
            {"input_ids": ids, "position_ids": torch.randint(48, (1, 20))},
            {"inputs_embeds": torch.randn(2, 20, 128), "token_type_ids": types},
        ):
            assert torch.equal(b(**inputs), a(**inputs)), inputs.keys()
        seen: list[Tensor] = []
        handle = b.word_embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(b(ids), a(ids)) and torch.equal(seen[0], a.word_embeddings(ids))
        handle.remove()
        handle = b.LayerNorm.register_forward_hook(lambda module, args, output: seen.append(output))
        assert torch.equal(b(ids), a(ids)) and torch.equal(seen[1], a(ids))
        handle.remove()
        with torch.profiler.profile() as profile:
            b(ids)
        whole = any(event.name == "bitmill::binary_embedding_norm" for event in profile.events())
        assert whole is (config is None)
        for message, bad in (
            ("size", torch.zeros(1, 49, dtype=torch.long)),
            ("ids must lie in", torch.full((1, 2), 300)),
        ):
            for each in (a, b):
                with pytest.raises((RuntimeError, IndexError), match=message):
                    each(bad)
    b(ids, types).sum().backward()
    assert b.position_embeddings.weight.grad.abs().sum() > 0
    with torch.no_grad():
        half = copy.deepcopy(b).bfloat16()
        assert torch.equal(half(ids), copy.deepcopy(a).bfloat16()(ids))
        assert torch.allclose(torch.compile(b, fullgraph=True)(ids), a(ids), atol=1e-5)


def test_embeddings_that_are_not_plain() -> None:
    for change, reason in (
        (lambda e: setattr(e, "position_embeddings", nn.Embedding(48, 128, max_norm=1.0)), "position_embeddings are"),
        (lambda e: e.token_type_ids.fill_(1), "its token types are not 0"),
    ):
        model = transformers.BertModel(transformers.BertConfig(**SIZES, num_hidden_layers=1)).eval()
        change(model.embeddings)
        bitmill.quantize_(model, BinaryConfig("bibert", embeddings=True), lambda module, name: "word" in name)
        pack_(model)
        assert reason in dict(chains(model))["embeddings"]
