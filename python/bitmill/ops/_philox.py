# SPDX-License-Identifier: Apache-2.0
"""The random numbers of stochastic rounding: Philox4x32-10 (Salmon et al., SC 2011), as cpp/core/philox.h has them.

The number of element e of a tensor, e its index in row-major order, is word e % 4 of what these four words become:
  counter: lower and upper half of e / 4, lower and upper half of offset;   key: lower and upper half of seed.
It depends on nothing else: neither on threads or the order of work, nor on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import ceil_div

_LOWER = 0xFFFFFFFF  # half of 64 bits


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """The four words, each int64 of 32 bits, of a counter of four such words."""

    def halves(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        product = a * factor  # wraps, as it should
        return product >> 32 & _LOWER, product & _LOWER

    key = [seed & _LOWER, seed >> 32 & _LOWER]
    for _ in range(10):
        (a_upper, a_lower), (b_upper, b_lower) = halves(counter[0], 0xD2511F53), halves(counter[2], 0xCD9E8D57)
        counter = [b_upper ^ counter[1] ^ key[0], b_lower, a_upper ^ counter[3] ^ key[1], a_lower]
        key = [key[0] + 0x9E3779B9 & _LOWER, key[1] + 0xBB67AE85 & _LOWER]
    return counter


def random_words(like: Tensor, seed: int, offset: int) -> Tensor:
    """A number of 32 bits for each element of a tensor: int64 of its shape."""
    block = torch.arange(ceil_div(like.numel(), 4), device=like.device)
    counter = [block & _LOWER, block >> 32]
    counter += [torch.full_like(block, half & _LOWER) for half in (offset, offset >> 32)]
    words = torch.stack(philox(counter, seed), -1).flatten()
    return words[: like.numel()].view(like.shape)
