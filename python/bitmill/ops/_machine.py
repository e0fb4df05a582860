# SPDX-License-Identifier: Apache-2.0
"""The instruction set that the compiled CPU kernels run on: chosen by CPUID, overridable for tests and experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from . import _library as library

library.define("instruction_set", '(str name="") -> str')


@torch.library.register_fake("bitmill::instruction_set")
def _(name=""):
    raise ValueError("instruction_set: it describes this process and cannot be traced; call it outside the model")


def instruction_sets() -> list[str]:
    """Instruction sets that this machine and this build have; empty without compiled kernels."""
    try:
        from .. import _C
    except ImportError:
        return []
    return _C.instruction_sets()


def instruction_set() -> str | None:
    """The instruction set in use, or None without compiled kernels."""
    if library.failure("_ops_cpu") is not None:
        return None
    return torch.ops.bitmill.instruction_set.default("")


def kernel_of(op: str) -> str:
    """What runs for an op on CPU tensors: "avx512", "avx2", "neon", "generic", or "torch" for the default kernel."""
    op = library.MADE_OF.get(op, op)
    if not library.has_compiled_kernel(op):
        return "torch"
    product = ("binary_linear", "binary_matmul_bits", "binary_matmul_floats", "binary_conv2d")
    function = "binary_matmul" if op in product else op.removesuffix("_bits")
    try:
        from .. import _C
    except ImportError:
        return "compiled"
    chosen = instruction_set()
    return chosen if chosen is not None and chosen in _C.kernels().get(function, ()) else "generic"


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the compiled CPU kernels on another instruction set than the one chosen by CPUID, for this process.

    Raises:
        ValueError: if this machine or this build does not have it.
    """
    before = instruction_set()
    if before is None:
        raise ValueError(f"instruction_set: cannot select {name!r}, because the compiled kernels are not loaded")
    _select(name)
    try:
        yield
    finally:
        _select(before)


def _select(name: str) -> None:
    """For the ops, and for bitmill.arrays, whose library has its own copy of the kernels."""
    torch.ops.bitmill.instruction_set.default(name)
    with contextlib.suppress(ImportError):
        from .. import _C

        _C.instruction_set(name)
