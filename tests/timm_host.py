# SPDX-License-Identifier: Apache-2.0
"""timm for the tests: its models import torchvision, of which ViT and Swin need nothing; a stand-in lets them load."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest


class _AnyName(type):
    """A class that has every attribute, each its own name: what timm reads from torchvision while it is imported."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return _AnyName(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_timm() -> Any:
    """timm with its models, or skip the test with a sentence."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install timm")
    try:
        import timm.models
    except ImportError:
        finder = _StandIn()
        sys.meta_path.insert(0, finder)
        try:
            import timm.models
        except ImportError as error:
            pytest.skip(f"timm cannot be imported here: {error}")
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    return timm
