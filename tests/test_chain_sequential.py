# SPDX-License-Identifier: Apache-2.0
"""Chains in a Sequential: layers, batch normalisations and activation functions, equal to the modules one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill import BinaryConfig, pack_, quantize_
from bitmill.chained import Chained, chains

pytestmark = pytest.mark.usefixtures("one_thread")


def network(*between: Any, width: int = 70, layers: int = 3, method: str = "bibert", **linear: Any) -> nn.Sequential:
    """A float layer, binary layers with these modules between them, and a float layer, in eval mode."""
    modules: list[nn.Module] = [nn.Linear(20, width), nn.BatchNorm1d(width)]
    for i in range(layers):
        modules.append(nn.Linear(width, width, **linear))
        if i < layers - 1:
            modules += [module() for module in between]
    model = nn.Sequential(*modules, nn.LayerNorm(width), nn.Linear(width, 4))
    quantize_(model, BinaryConfig(method), filter_fn=lambda _, name: 1 < int(name) < len(model) - 2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.5)
            elif p.dim() == 1:
                p.uniform_(-1, 2)
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_(0, 10), module.running_var.uniform_(0.1, 200)
    return model.eval()


def both(model: nn.Module, connected: int = 1) -> tuple[nn.Module, nn.Module]:
    plain, chained = copy.deepcopy(model), copy.deepcopy(model)
    pack_(plain, chain=False)
    pack_(chained)
    assert list(dict(chains(chained)).values()) == [""] * connected, dict(chains(chained))
    return plain, chained


def ops_of(model: nn.Module, x: Tensor) -> set[str]:
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    return {event.key.removeprefix("bitmill::") for event in profile.key_averages() if event.key.startswith("bitmill")}


NORM = lambda width: lambda: nn.BatchNorm1d(width)  # noqa: E731
FUNCTIONS = [
    (),
    (nn.ReLU,),
    (nn.GELU,),
    (nn.Tanh,),
    (NORM(70), nn.Hardtanh),
    (NORM(70), nn.ReLU, nn.Dropout),
    (lambda: nn.PReLU(70), NORM(70)),
    (lambda: nn.BatchNorm1d(70, affine=False), lambda: nn.ReLU(inplace=True)),
]


@pytest.mark.parametrize("between", FUNCTIONS)
@pytest.mark.parametrize("layers", [2, 3, 4])
def test_chain_equals_modules_and_training_form(between: tuple[Any, ...], layers: int) -> None:
    for method in ("bibert", "react"):
        model = network(*between, layers=layers, method=method)
        plain, chained = both(model)
        for rows in (1, 7, 100, 0):
            x = torch.randn(rows, 20)
            with torch.no_grad():
                want = plain(x)
                assert torch.equal(chained(x), want), (method, rows)
                assert torch.equal(model(x), want), (method, rows)
        expected = {"binary_mlp"} if layers == 2 else {"bitpack", "binary_matmul_bits", "binary_matmul_floats"}
        assert ops_of(chained, x) == expected


def test_two_runs_and_what_stands_between_them() -> None:
    model = nn.Sequential(
        *(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 40), nn.LayerNorm(40), nn.Linear(40, 40)),
        *(nn.Softmax(-1), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.Identity()),
    )
    quantize_(model, BinaryConfig("bibert"))
    plain, chained = both(model.eval())
    assert [len(step.modules) for step in chained.chain.steps] == [0, 3, 4, 3, 1]
    x = torch.randn(9, 40)
    with torch.no_grad():
        assert torch.equal(chained(x), plain(x))


def test_more_dimensions_are_chained_without_channels() -> None:
    x = torch.randn(2, 5, 40)
    for between, expected in ((nn.ReLU(), {"binary_mlp"}), (nn.BatchNorm1d(5), {"binary_linear"})):
        model = nn.Sequential(nn.Linear(40, 5 if expected == {"binary_linear"} else 40), between, nn.Linear(5, 5))
        if expected == {"binary_mlp"}:
            model[2] = nn.Linear(40, 5)
        quantize_(model, BinaryConfig("bibert"))
        plain, chained = both(model.eval())
        assert ops_of(chained, x) == expected
        with torch.no_grad():
            assert torch.equal(chained(x), plain(x))


def test_modules_stay_the_users() -> None:
    plain, chained = both(network(nn.ReLU))
    assert list(chained.state_dict()) == list(plain.state_dict())
    assert len(chained) == len(plain) and [name for name, _ in chained.named_children()] == [*map(str, range(9))]
    x = torch.randn(6, 20)
    with torch.no_grad():
        assert torch.equal(chained[-2:](chained[:-2](x)), plain(x))
        chained.append(nn.Softmax(-1))
        assert torch.equal(chained(x), plain(x).softmax(-1))
        del chained[-1]
        assert torch.equal(chained(x), plain(x))
        chained[2], plain[2] = chained[4], plain[4]
        assert torch.equal(chained(x), plain(x))


@torch.no_grad()
def test_what_is_watched_is_called() -> None:
    plain, chained = both(network(lambda: nn.BatchNorm1d(70), nn.ReLU))
    x, seen = torch.randn(6, 20), []
    want = plain(x)
    for module in (chained[2], chained[3], chained[4]):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(chained(x), want)
        handle.remove()
    assert len(seen) == 3
    assert torch.equal(chained(x), want) and len(seen) == 3
    hooked = network(nn.ReLU)
    pack_(hooked, chain=False)
    hooked[2].register_forward_hook(lambda *_: None)
    bitmill.chained.chain_(hooked)
    assert "has hooks" in dict(chains(hooked))[""] and "computes layer by layer" in str(bitmill.summary(hooked))


def test_gradients_of_what_stands_between() -> None:
    plain, chained = both(network(lambda: nn.BatchNorm1d(70)))
    x = torch.randn(6, 20)
    for model in (plain, chained):
        model(x).sum().backward()
    assert torch.equal(chained[3].weight.grad, plain[3].weight.grad)
    inner = network(lambda: nn.BatchNorm1d(70, affine=False))[2:5].eval()
    plain, chained = both(inner)
    for model in (plain, chained):
        inputs = torch.randn(6, 70, requires_grad=True)
        assert model(inputs).requires_grad
    assert ops_of(chained, torch.randn(6, 70)) == {"binary_mlp"}


def train_steps(model: nn.Sequential, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
    steps = optimizer(model.parameters(), lr=0.5, **options)
    for _ in range(2):
        steps.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        steps.step()


def in_training_mode(change: Callable[[nn.Sequential], Any]) -> Callable[[nn.Sequential], Any]:
    return lambda model: (model.train(), change(model), model.eval())


def trained() -> nn.Sequential:
    """Packed, with statistics of its inputs."""
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(70), nn.BatchNorm1d(64)
    model = nn.Sequential(
        *(nn.Linear(20, 64), nn.Identity(), nn.Linear(64, 70), norms[0], nn.PReLU(70)),
        *(nn.Linear(70, 64), norms[1], nn.Hardtanh(), nn.Linear(64, 4)),
    )
    quantize_(model, BinaryConfig("bibert"))
    for _ in range(5):
        model(torch.randn(64, 20))
    pack_(model.eval())
    return model


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "statistics": in_training_mode(lambda model: model(5 * torch.randn(64, 20))),
    "statistics that begin anew": lambda model: model[3].reset_running_stats(),
    "a bias in place": lambda model: model[3].bias.add_(2),
    "a slope in place": lambda model: model[4].weight.mul_(-1),
    "the bias of a packed layer": lambda model: model[2].bias.add_(3),
    "the scale of a packed layer": lambda model: model[2].scale.neg_(),
    "another tensor": lambda model: setattr(model[2], "bias", torch.randn_like(model[2].bias)),
    "the state of a packed layer": lambda model: model[2].load_state_dict(
        {key: t.neg() if t.is_floating_point() else t for key, t in model[2].state_dict().items()}
    ),
    "another type and back": lambda model: (model.double(), model[3].bias.add_(1), model.float()),
    "through .data, in training": in_training_mode(lambda model: model[3].bias.data.add_(2)),
}
STEPS: dict[str, Callable[[nn.Sequential], Any]] = {
    "SGD": lambda model: train_steps(model, torch.optim.SGD),
    "fused steps": in_training_mode(lambda model: train_steps(model, torch.optim.AdamW, fused=True)),
}


@pytest.mark.parametrize("what", [*CHANGES, *STEPS])
def test_other_numbers_have_other_ranges(what: str) -> None:
    model, x = trained(), torch.randn(16, 20)
    with torch.no_grad():
        before = model(x)
    change = {**CHANGES, **STEPS}[what]
    with torch.set_grad_enabled(what in STEPS):
        change(model)
    plain = copy.deepcopy(model)
    bitmill.chained.unchain_(plain)
    with torch.no_grad():
        for each in (model, copy.deepcopy(model)):
            assert torch.equal(each(x), plain(x)), what
            assert not torch.equal(each(x), before)
            assert "binary_linear" not in ops_of(each, x)


@pytest.mark.parametrize("layers", [2, 3])
def test_rows_of_another_width_are_an_error(layers: int) -> None:
    _, model = both(network(nn.ReLU, layers=layers)[2 : 1 + 2 * layers].eval())
    for width in (69, 71):  # as many words as the 70 columns
        with torch.no_grad(), pytest.raises(ValueError, match="last dimension of x must be in_features = 70"):
            model(torch.randn(3, width))


def test_state_of_one_call() -> None:
    model, x = trained(), torch.randn(16, 20)
    state = {key: t * 2 + 0.1 if t.is_floating_point() else t for key, t in model.state_dict().items()}
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(torch.func.functional_call(model, state, (x,)), loaded(x))
        assert torch.equal(model(x), before)


def test_numbers_without_ranges_compute_layer_by_layer() -> None:
    _, model = both(network(lambda: nn.PReLU(70), layers=2))
    x = torch.randn(16, 20)
    with torch.no_grad():
        model[2].scale.fill_(torch.nan)
        for _ in range(2):
            model(x)
        model[2].scale.fill_(0.5)
        plain = copy.deepcopy(model)
        bitmill.chained.unchain_(plain)
        assert torch.equal(model(x), plain(x))


def test_packing_in_training_mode_leaves_statistics() -> None:
    model = network(lambda: nn.BatchNorm1d(70), nn.Dropout).train()
    before = model[3].running_mean.clone()
    plain, chained = both(model)
    assert torch.equal(chained[3].running_mean, before)
    x = torch.randn(6, 20)
    with torch.no_grad():
        assert torch.equal(chained.eval()(x), plain.eval()(x))
        assert not torch.equal(chained.train()(x), plain.eval()(x))


def test_save_load_copy_compile_export(tmp_path: Path) -> None:
    model = network(lambda: nn.BatchNorm1d(70), nn.Hardtanh)
    plain, chained = both(model)
    x = torch.randn(6, 20)
    with torch.no_grad():
        want = plain(x)
        bitmill.save(chained, tmp_path / "file")
        fresh = network(lambda: nn.BatchNorm1d(70), nn.Hardtanh)
        bitmill.load(fresh, tmp_path / "file")
        assert isinstance(fresh, Chained) and torch.equal(fresh(x), want)
        for other in (copy.deepcopy(chained), pickle.loads(pickle.dumps(chained))):
            assert other.chain.planned[2] is other[2] and torch.equal(other(x), want)
        other.load_state_dict(both(network(lambda: nn.BatchNorm1d(70), nn.Hardtanh))[1].state_dict())
        assert not torch.equal(other(x), want) and torch.equal(other.plain.forward(other, x), other(x))
        assert chained.to("meta").chain.chains[0].ranges[0].get().positive.is_meta
    compiled = torch.compile(other, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), other(x), atol=1e-5)
        exported = torch.export.export(other, (x,))
        assert torch.equal(exported.module()(x), other(x))


def test_unlike_shapes_and_bad_widths() -> None:
    bad = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(41), nn.Linear(40, 40))
    quantize_(bad, BinaryConfig("bibert"))
    pack_(bad.eval())
    assert dict(chains(bad)) == {"": "a BatchNorm1d of 41 follows a layer of 40 outputs"}
    for between, reason in (
        (nn.BatchNorm1d(40).double(), "a BatchNorm1d is float64, not float32"),
        (nn.PReLU(3), "a PReLU of 3 follows a layer of 40 outputs"),
    ):
        other = nn.Sequential(nn.Linear(40, 40), between, nn.Linear(40, 40))
        quantize_(other, BinaryConfig("bibert"))
        pack_(other.eval())
        assert dict(chains(other)) == {"": reason}
    broken = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(41, 40))
    quantize_(broken, BinaryConfig("bibert"))
    pack_(broken.eval())
    assert dict(chains(broken)) == {"": "a layer of 40 outputs is followed by one of 41 inputs"}
    lonely = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40, track_running_stats=False), nn.Linear(40, 40))
    quantize_(lonely, BinaryConfig("bibert"))
    pack_(lonely)
    assert not dict(chains(lonely))
