# SPDX-License-Identifier: Apache-2.0
"""How an op is declared, and how the compiled kernels are found.

A schema is defined here in Python, with its default kernel in plain torch, so every op exists and works without a
compiled library. `load` then adds the compiled kernels; if it cannot, it keeps the reason and warns once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MADE_OF = {"integer_linear": "binary_matmul"}  # an op without a kernel: the one that says what runs for it
_SCHEMAS: dict[str, str] = {}
_failure: dict[str, str | None] = {"_ops_cpu": "not loaded yet", "_ops_cuda": "not loaded yet"}


def define(name: str, schema: str) -> None:
    """Declare `torch.ops.bitmill.<name>` with a schema such as "(Tensor x, int k) -> Tensor"."""
    _SCHEMAS[name] = schema
    torch.library.define(f"bitmill::{name}", schema)


def default(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the kernel that serves every device without a compiled one. It runs outside autocast."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def outside_autocast(*args: Any, **kwargs: Any) -> Any:
            with without_autocast(next((a for a in args if isinstance(a, Tensor)), None)):
                return kernel(*args, **kwargs)

        torch.library.impl(f"bitmill::{name}", "CompositeExplicitAutograd", outside_autocast)
        return kernel

    return register


def without_autocast(t: Tensor | None) -> contextlib.AbstractContextManager[Any]:
    """Turns autocast off on the device of `t` (None: the CPU), in forward and backward; a meta tensor has none."""
    device = "cpu" if t is None else t.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def op_names() -> list[str]:
    """Names of all ops, in the order of their definition."""
    return list(_SCHEMAS)


def has_compiled_kernel(name: str, key: str = "CPU") -> bool:
    """Whether the op has a compiled kernel for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bitmill::{name}", key)


def load() -> None:
    """Load the compiled kernels: those for the CPU, and those for CUDA if torch has CUDA and they were built."""
    _load("_ops_cpu", "the compiled CPU kernels are not in use, so packed layers run slowly in plain torch")
    if torch.version.cuda is None:
        _failure["_ops_cuda"] = "this torch was built without CUDA"
    elif importlib.util.find_spec("bitmill._ops_cuda") is None:
        _failure["_ops_cuda"] = "bitmill was built without CUDA"
    else:
        _load("_ops_cuda", "the compiled CUDA kernels are not in use, so packed layers on GPUs run in plain torch")


def _load(library: str, warning: str) -> None:
    try:
        spec = importlib.util.find_spec(f"bitmill.{library}")
        if spec is None or spec.origin is None:
            raise ImportError(f"bitmill was installed without its compiled library {library}")
        torch.ops.load_library(spec.origin)
        _failure[library] = None
    except Exception as error:  # whatever the loader says, the default kernels still work
        _failure[library] = f"{type(error).__name__}: {error}"
        warnings.warn(f"bitmill: {warning}; `bitmill info` says why", stacklevel=3)


def failure(library: str) -> str | None:
    """Why a library is not loaded, or None if it is."""
    return _failure[library]
