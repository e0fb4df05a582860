# SPDX-License-Identifier: Apache-2.0
"""The encodings of the salient part hold what was given, and the smaller one is taken."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bitmill.ops import _salient_encoding as encoding
from salient_inputs import every_encoding


@every_encoding
def test_encodings_hold_what_was_given(kind: str) -> None:
    for n, k, fraction, bits in (
        (17, 70, 0.2, 8),
        (40, 3000, 0.002, 16),
        (5, 300, 1.0, 8),
        (3, 256, 0.0, 8),
        (17, 71, 0.2, 4),
        (5, 301, 1.0, 4),
        (40, 3000, 0.002, 4),
        (3, 256, 0.0, 4),
    ):
        salient = torch.rand(n, k) < fraction
        if kind == "columns":
            salient = (torch.rand(k) < fraction).expand(n, k)
        value = torch.randn(n, k).half() if bits == 16 else torch.randint(1 << bits, (n, k), dtype=torch.uint8)
        if kind == "columns":
            encoded = encoding.encode_columns(salient.any(0), value, bits)
        else:
            encoded = (encoding.encode_list if kind == "list" else encoding.encode_bitmap)(salient, value, bits)
        assert encoding.encoding_of("test", encoded[0]) == kind
        assert encoded[1].numel() == math.prod(
            encoding.value_shape(kind, n, encoding.entries_of(kind, encoded[0], encoded[1], bits), bits)
        )
        where, stored = encoding.decode("test", encoded, n, k, bits)
        assert torch.equal(where, salient)
        assert torch.equal(stored, torch.where(salient, value.float(), 0.0))


def test_list_of_every_distance() -> None:
    """An entry that lies 1 ... 800 columns after the one before it."""
    for distance in (1, 2, 254, 255, 256, 257, 509, 510, 511, 512, 766, 800):
        salient = torch.zeros(3, 2000, dtype=torch.bool)
        salient[1, ::distance] = True
        salient[2, distance - 1] = True
        value = torch.randint(0, 256, (3, 2000), dtype=torch.uint8)
        encoded = encoding.encode_list(salient, value, 8)
        where, stored = encoding.decode("test", encoded, 3, 2000, 8)
        assert torch.equal(where, salient) and torch.equal(stored, torch.where(salient, value.float(), 0.0))


@pytest.mark.parametrize("integers,last_list", [(False, 0.1), (True, 0.08)])
def test_encode_takes_the_smaller_but_for_integers_the_faster(integers: bool, last_list: float) -> None:
    for fraction, bits in itertools.product((0.02, 0.05, 0.08, 0.1, 0.15, 0.4), (4, 8)):
        salient, value = torch.rand(64, 4096) < fraction, torch.zeros(64, 4096, dtype=torch.uint8)
        chosen = encoding.encode(salient, value, bits, integers)
        assert encoding.encoding_of("test", chosen[0]) == ("list" if fraction <= last_list else "bitmap")
        others = encoding.encode_list(salient, value, bits), encoding.encode_bitmap(salient, value, bits)
        size, *sizes = (64 * 4096 / 8 + sum(t.nbytes for t in arrays if t is not None) for arrays in (chosen, *others))
        assert size <= min(sizes) * (17 / 16 if integers else 1)
    wide = torch.zeros(1, 70000, dtype=torch.bool)
    assert encoding.encode(wide, wide.to(torch.uint8), 8)[0].dim() == 3
