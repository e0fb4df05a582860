# SPDX-License-Identifier: Apache-2.0
"""Numbers on the command line: argparse makes a wrong usage of what is none."""

from __future__ import annotations

import argparse

from ..timing import check_shape


def parse_shape(text: str) -> tuple[int, int, int]:
    """Three sizes."""
    try:
        m, n, k = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three whole numbers like 128,768,768, got {text!r}") from None
    try:
        check_shape(m, n, k)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return m, n, k


def parse_threads(text: str) -> int:
    """No more than any machine has: OpenMP ends the process if it cannot start as many."""
    return parse_count(text, 1024)


def parse_count(text: str, most: int = 1 << 16) -> int:
    if not text.isdecimal() or not 0 < int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}, got {text!r}")
    return int(text)


def parse_lengths(text: str) -> tuple[int, int]:
    shortest, _, longest = text.partition("..")
    try:
        return int(shortest), int(longest)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two whole numbers like 5..128, got {text!r}") from None


def parse_seed(text: str) -> int:
    """What torch takes."""
    try:
        if -(1 << 63) <= (seed := int(text)) < 1 << 64:
            return seed
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text!r}")
