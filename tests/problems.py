# SPDX-License-Identifier: Apache-2.0
"""The one list of shapes for tests and benchmarks; how to run a kernel, lay out an input and compare a result.

A problem is m rows of activations [m, k] times a weight [n, k]. A kernel bug that a shape shows puts the shape here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitmill.ops import _machine

T = TypeVar("T")
DEVICE: str | None = None  # of --device


class Problem(NamedTuple):
    """m, n, k of one linear layer, and where it comes from."""

    name: str
    m: int
    n: int
    k: int


# Widths around the word (32), the vector (16 lanes) and the page of real layers; heights around the tile (16 rows) and
# the block of the kernels (4 rows x 4 tiles).
WIDTHS = (1, 7, 31, 32, 33, 63, 64, 65, 100, 197, 768, 3072)
HEIGHTS = (1, 2, 15, 16, 17, 100)

# Few enough to combine with every option of an op.
UGLY = (
    Problem("one", 1, 1, 1),
    Problem("below a word", 2, 15, 31),
    Problem("exact", 4, 64, 64),
    Problem("past a word", 5, 17, 33),
    Problem("past a block", 7, 81, 197),
    Problem("no rows", 0, 17, 33),
    Problem("no columns", 3, 5, 0),
    Problem("no outputs", 3, 0, 40),
)


def _transformer(model: str, tokens: int, hidden: int, inner: int) -> tuple[Problem, ...]:
    return (
        Problem(f"{model} projection", tokens, hidden, hidden),
        Problem(f"{model} up", tokens, inner, hidden),
        Problem(f"{model} down", tokens, hidden, inner),
    )


# One image of 224 x 224 (197 tokens; Swin-T from 56 x 56 patches down), one text of 128 tokens, or one new token.
MODELS = (
    *_transformer("BERT-base", 128, 768, 3072),
    *_transformer("MiniLM-L6-H384", 128, 384, 1536),
    *_transformer("DeiT-T", 197, 192, 768),
    *_transformer("DeiT-S", 197, 384, 1536),
    *_transformer("DeiT-B", 197, 768, 3072),
    Problem("Swin-T stage 1 qkv", 3136, 288, 96),
    Problem("Swin-T stage 2 up", 784, 768, 192),
    Problem("Swin-T stage 3 down", 196, 384, 1536),
    Problem("Swin-T stage 4 projection", 49, 768, 768),
    Problem("Swin-T patch merging 1", 784, 192, 384),
    *_transformer("SmolLM2-135M", 128, 576, 1536),
    Problem("SmolLM2-135M key or value", 128, 192, 576),
    *_transformer("SmolLM2-135M one token", 1, 576, 1536),
    *_transformer("LLaMA-7B", 128, 4096, 11008),
    *_transformer("LLaMA-7B one token", 1, 4096, 11008),
)

# Convolutions of one image: output positions, output channels and values of a patch, and how they come about: image,
# kernel, stride, padding. Patch embeddings of ViT-S and DeiT-S, and the blocks of ResNet-18.
CONVS = {
    Problem("ViT-S patch embedding 16 x 16", 196, 384, 768): ((3, 224, 224), 16, 16, 0),
    Problem("ResNet-18 stage 1, 3 x 3", 3136, 64, 576): ((64, 56, 56), 3, 1, 1),
    Problem("ResNet-18 stage 3, 3 x 3", 196, 256, 2304): ((256, 14, 14), 3, 1, 1),
}

# What the benchmarks report, with batches that no model above has: 8 texts at once, a few tokens, one attention head of
# an image (query times keys, probabilities times values).
HEADLINE = (
    Problem("BERT-base projection", 128, 768, 768),
    Problem("BERT-base up", 128, 3072, 768),
    Problem("BERT-base down", 128, 768, 3072),
    Problem("BERT-base projection, 8 texts", 1024, 768, 768),
    Problem("TinyBERT-4L-312 projection", 128, 312, 312),
    Problem("DeiT-S projection", 197, 384, 384),
    Problem("DeiT attention scores", 197, 197, 64),
    Problem("DeiT attention output", 197, 64, 197),
    Problem("LLaMA-7B projection, 32 tokens", 32, 4096, 4096),
    *(
        Problem(f"LLaMA-7B {part}, {count} token{'s' * (count > 1)}", count, n, 4096)
        for part, n in (("projection", 4096), ("up", 11008))
        for count in (1, 8, 128)
    ),
)

# What is packed and cast besides: a weight that no cache holds.
OUT_OF_CACHE = Problem("LLaMA-7B up, its weight", 11008, 4096, 4096)

# What the benchmarks report of a GPU: a square, the layers of 32 texts of 128 tokens, and one token of a large model.
GPU_PRODUCTS = (Problem("square", 8192, 8192, 8192), *_transformer("BERT-base, 32 texts", 32 * 128, 768, 3072))
GPU_CALLS = tuple(problem for problem in HEADLINE if problem.m == 1)

# Attention: m tokens, n = 2 x heads x tokens, k columns a head, so m n k counts both of its products.
ATTENTION = tuple(
    Problem(f"{name} attention", tokens, 2 * heads * tokens, width)
    for name, tokens, heads, width in (
        ("BERT-base", 128, 12, 64),
        ("BERT-base 16 texts", 128, 16 * 12, 64),
        ("MiniLM-L6-H384", 128, 12, 32),
        ("DeiT-S", 197, 6, 64),
        ("DeiT-B", 197, 12, 64),
        ("Swin-T stage 3", 49, 4 * 12, 32),
        ("BERT-base 512 tokens", 512, 12, 64),
    )
)


class OnDevice(TorchDispatchMode):
    """Computes bitmill's ops of CPU tensors on a device: what goes in is copied there, strides and all, what comes out,
    or was written into, is copied back."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "bitmill":
            return func(*args, **(kwargs or {}))
        there, others = torch.utils._pytree.tree_map_only(Tensor, self._there, (args, kwargs or {}))
        results = func(*there, **others)
        for argument, here, written in zip(func._schema.arguments, args, there, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                here.copy_(written)
        return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, results)

    def _there(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        copy = torch.UntypedStorage(storage.nbytes(), device=self.device).copy_(storage)
        return torch.empty(0, dtype=t.dtype, device=self.device).set_(copy, t.storage_offset(), t.size(), t.stride())


def on_every_machine(call: Callable[[], T]) -> list[tuple[str, T]]:
    """What `call` answers on every instruction set that this machine has, with one and with two threads, and on the
    device of --device, unless an op says that it is one for the CPU alone."""
    results = []
    if DEVICE is not None:
        try:
            with OnDevice(DEVICE):
                results.append((DEVICE, call()))
        except ValueError as error:
            if "on a GPU" not in str(error) and "no CUDA kernel" not in str(error):
                raise
    threads = torch.get_num_threads()
    try:
        for instruction_set in _machine.instruction_sets():
            for count in (1, 2):
                torch.set_num_threads(count)
                with _machine.use_instruction_set(instruction_set):
                    results.append((f"{instruction_set}, {count} threads", call()))
    finally:
        torch.set_num_threads(threads)
    return results


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def assert_same_bits(got: Tensor, want: Tensor, what: str = "") -> None:
    """Equal shape, dtype and every bit, the sign of 0 too; any NaN equals any NaN."""
    assert got.dtype == want.dtype, f"{what}: got {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what}: got shape {list(got.shape)}, expected {list(want.shape)}"
    same = got == want
    if got.dtype in _BITS:
        bits = _BITS[got.dtype]
        same = (got.contiguous().view(bits) == want.contiguous().view(bits)) | (got.isnan() & want.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {want.numel()} differ"


def _offset(x: Tensor) -> Tensor:
    """The same values one element into a longer buffer: rows are not aligned to anything."""
    buffer = x.new_empty(x.numel() + 3)
    view = buffer[1 : 1 + x.numel()].view(x.shape)
    return view.copy_(x)


# The same values [m, k] in every memory layout that a caller may hand over.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second column": lambda x: torch.stack((x, -x), -1).flatten(-2)[..., ::2],
    "every second row": lambda x: torch.stack((x, -x), 1).flatten(0, 1)[::2],
    "odd offset": _offset,
    "lazily negated": lambda x: torch._neg_view(-x),
    "sliced columns": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
}
