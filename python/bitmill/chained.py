# SPDX-License-Identifier: Apache-2.0
"""Modules of hosts that run a chain (`bitmill.chain`): who they are, and how they come into a model and out of it.

A chain adds nothing to the state: a block keeps its modules and their names, and gets a child `chain` without
persistent buffers. A block whose chain does not hold for an input (gradients, hooks, another dtype) computes layer by
layer.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .chain import NotChained
from .nn._module import PackedModule
from .unchanged import Unchanged, held_by


class Chained:
    """Mixin of a host's module whose forward can run `self.chain`; see `register_chain`."""

    plain: ClassVar[Any]  # the host's own class, whose methods compute layer by layer
    chain: Any
    training: bool

    @classmethod
    def plan(cls, module: Any) -> nn.Module:
        """The chain of a module.

        Raises:
            NotChained: if it has none.
        """
        raise TypeError(f"{cls.__name__} does not say what its chain is")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        """Whether a module of the host's class is one that a chain is for at all."""
        return True

    @classmethod
    def keep(cls, module: Any, chain: nn.Module) -> None:
        """Put the chain where `module.chain` finds it."""
        module.chain = chain

    @classmethod
    def passed(cls, module: Any) -> tuple[nn.Module, ...]:
        """The modules that a chain does not call: that one of them has hooks, trains or was replaced is a reason not to
        run it."""
        return tuple(module.children())

    def takes(self, x: Tensor, *others: Tensor) -> bool:
        """Whether a chain can compute this input; `others` are tensors that may want a gradient."""
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
        return x.dtype == torch.float32 and not self.training and not gradients

    def runs(self, x: Tensor, *others: Tensor) -> bool:
        """Whether the chain may compute this input, because the modules that it passes are as they were, too.

        If they hold other numbers, it is planned again.
        """
        if not self.takes(x, *others) or not (self.chain.current() or _plan_again(self)):
            return False
        return self._passes()

    def holds(self) -> bool:
        """Whether the modules that the chain passes are as they were, numbers and all."""
        return self.chain.current() and self._passes()

    def _passes(self) -> bool:
        passed = self.chain.passed
        if not passed():
            return False
        parameters = (p for m in passed.modules for p in m.parameters(False))
        return not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters)

    def train(self, mode: bool = True) -> Any:
        trained = self.training
        super().train(mode)  # type: ignore[misc]
        if trained and not mode and self.chain.learns:  # not all changes of a training are counted
            _plan_again(self)
        return self


PLANES = ("weight", "weight_nonzero")  # of a packed layer: a chain reads them in every call
_CHAINED: dict[type[nn.Module], type[Chained]] = {}
_REGISTERED_IN = {  # of the modules that define a host's classes: what is imported when `chain_` meets one of them
    "torch.nn.modules.container": "bitmill.integrations._torch_chain",
    "timm.layers.mlp": "bitmill.integrations._timm_chain",
    "timm.models.vision_transformer": "bitmill.integrations._timm_chain",
    "bitmill.integrations.timm": "bitmill.integrations._timm_chain",
    **{
        f"transformers.models.{name}.modeling_{name}": f"bitmill.integrations._transformers_chain_{name}"
        for name in ("bert", "vit")
    },
    **{
        f"transformers.models.{name}.modeling_{name}": "bitmill.integrations._transformers_chain_relatives"
        for name in ("deit", "electra", "roberta", "xlm_roberta")
    },
}


def register_chain(chained: type[Chained]) -> type[Chained]:
    """Let `pack_` chain the modules of `chained.plain`, by turning them into `chained`, a subclass of both.

    Used as a decorator. The class says in `plan` what to chain, and in `forward` when.
    """
    _CHAINED[chained.plain] = chained
    return chained


def chain_(model: nn.Module) -> dict[str, str]:
    """Chain every packed block that a host has registered, in place.

    Returns:
        Of each block that could be chained by its class: its name, and the reason why it is not, or "".
    """
    modules: list[Any] = list(model.modules())
    for module in reversed(modules):  # a block asks whether its parts are chained
        chained = _chained(type(module))
        if chained is None or not chained.concerns(module):
            continue
        try:
            _connect(module, chained)
        except NotChained as reason:
            vars(module)["not_chained"] = str(reason)
            continue
        vars(module).pop("not_chained", None)
        module.__class__ = chained
        if _plan_for_new_weights not in module._load_state_dict_post_hooks.values():
            module.register_load_state_dict_post_hook(_plan_for_new_weights)
    return dict(chains(model))


def _chained(host: type[nn.Module]) -> type[Chained] | None:
    if host.__module__ in _REGISTERED_IN:
        with contextlib.suppress(ImportError):  # of a host in another version
            importlib.import_module(_REGISTERED_IN[host.__module__])
    return _CHAINED.get(host)


def unchain_(model: nn.Module) -> list[str]:
    """Take every chain off, in place: the layers compute one by one. Returns the names of the blocks."""
    names = []
    for name, module in list(model.named_modules()):
        vars(module).pop("not_chained", None)
        if isinstance(module, Chained):
            _unchain(module)
            names.append(name)
    return names


def _connect(module: Any, chained: type[Chained]) -> None:
    chain: Any = chained.plan(module).train(module.training)
    chained.keep(module, chain)
    passed = chained.passed(module)
    chain.passed = Unchanged(passed, same=held_by((module, *passed), "_modules"))
    others = [inner for inner in passed if not isinstance(inner, PackedModule)]
    held = held_by(passed, "_parameters", "_buffers")
    chain.current = Unchanged(numbers=(at for at in held if not (isinstance(at[0], PackedModule) and at[2] in PLANES)))
    chain.learns = any(True for inner in others for _ in (*inner.parameters(False), *inner.buffers(False)))


def _unchain(module: Any) -> None:
    del module.chain
    module.__class__ = module.plain


def chains(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Of each block that a host has registered: its name, and the reason why it is not chained, or ""."""
    for name, module in model.named_modules():
        if isinstance(module, Chained) or "not_chained" in vars(module):
            yield name, vars(module).get("not_chained", "")


def _plan_for_new_weights(module: Any, incompatible_keys: Any) -> None:
    if isinstance(module, Chained):
        _plan_again(module)


def _plan_again(module: Any) -> bool:
    """Other numbers have other ranges. Without any the chain stays, but does not run until they are others again.

    Returns:
        Whether there are ranges.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            _connect(module, type(module))
    except NotChained as reason:
        vars(module)["not_chained"] = str(reason)
        module.chain.passed, module.chain.current = _never, Unchanged(numbers=module.chain.current.numbers)
        return False
    vars(module).pop("not_chained", None)
    return True


def _never() -> bool:
    return False
