# SPDX-License-Identifier: Apache-2.0
"""Whether modules that something was planned from are still as they were then.

A plan for many modules saves calling them one by one, and would waste what it saves by asking each of them in Python
whether it still holds: it is asked in every call, after other work has pushed the modules out of the caches.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def all_unchanged_in_python(
    empty: list[dict[Any, Any]], tables: list[dict[str, Any]], keys: list[str], values: list[Any]
) -> bool:
    """Whether the first dictionaries are empty, and each of the others has the value for its key, or none for None."""
    return not any(empty) and all(map(operator.is_, map(dict.get, tables, keys), values))


try:
    from ._C import all_unchanged  # reads the dictionaries ahead
except ImportError:
    all_unchanged = all_unchanged_in_python

EVERYWHERE = tuple(vars(torch.nn.modules.module)[f"_global{name}"] for name in ("_forward_hooks", "_forward_pre_hooks"))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Held = tuple[nn.Module, str, str]  # a module, a dictionary of its own such as "_buffers" or "__dict__", and a key


def has_hooks(module: nn.Module) -> bool:
    """Whether someone looks at what this module computes, or has put a forward of its own into it."""
    own = module.__dict__  # twice as fast as attributes
    return any(own[hooks] for hooks in HOOKS) or "forward" in own


def held_by(modules: Iterable[nn.Module], *tables: str) -> Iterator[Held]:
    """All that these dictionaries of the modules hold."""
    for module in modules:
        for table in tables:
            for key in getattr(module, table):
                yield module, table, key


class Unchanged:
    """Answers, when called, whether nobody looks at what modules compute (`has_hooks`), they are in eval mode, and they
    hold the same objects as when this was made.

    A copy, made with the modules, looks at their copies.

    Args:
        modules: those that must be in eval mode and have no hooks.
        silent: those that must have no hooks, in whatever mode.
        same: what must be the same objects as now.
        numbers: tensors that must be the same with the same numbers: torch counts changes in place, but not those of
            its fused optimizers and through `.data`. A graph that `torch.compile` has made does not ask.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        silent: Iterable[nn.Module] = (),
        same: Iterable[Held] = (),
        numbers: Iterable[Held] = (),
    ) -> None:
        self.modules, self.numbers = tuple(modules), tuple(numbers)
        self.silent = tuple(dict.fromkeys((*self.modules, *silent)))
        wanted = dict.fromkeys((*same, *self.numbers))
        self.held = [(module, table, key, getattr(module, table)[key]) for module, table, key in wanted]
        tensors = [getattr(module, table)[key] for module, table, key in self.numbers]
        self.counted = [t for t in tensors if t is not None and not t.is_inference()]
        self.counts: list[int] | None = self._count()
        self._questions: Any = None

    def __call__(self) -> bool:
        if torch.compiler.is_compiling():  # which asks again by itself
            return not any(module.training for module in self.modules) and not any(map(has_hooks, self.silent))
        if self._questions is None:
            self._questions = self._asked()
        return all_unchanged(*self._questions) and self._count() == self.counts

    def _count(self) -> list[int]:
        return [t._version for t in self.counted]

    def _asked(self) -> tuple[list[dict[Any, Any]], list[dict[str, Any]], list[str], list[Any]]:
        """Dictionaries of hooks, and dictionaries, keys and what is to be there, or None, each as it lies in memory."""
        questions = [
            *((vars(module), "training", False) for module in self.modules),
            *((vars(module), "forward", None) for module in self.silent),
            *((getattr(module, table), key, value) for module, table, key, value in self.held),
        ]
        questions.sort(key=lambda question: id(question[0]))
        hooks = sorted((vars(module)[name] for module in self.silent for name in HOOKS), key=id)
        columns = zip(*questions, strict=True) if questions else ((), (), ())
        everywhere = EVERYWHERE if self.silent else ()
        return [*everywhere, *hooks], *(list(column) for column in columns)  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        same = self._count() == self.counts
        return {**vars(self), "_questions": None, "counts": None, "same": same}

    def __setstate__(self, state: dict[str, Any]) -> None:
        same = state.pop("same")
        vars(self).update(state)
        if same:  # changes of a copy are counted from 0 on
            self.counts = self._count()
