# SPDX-License-Identifier: Apache-2.0
"""Texts, their windows, and perplexity."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitmill.recipes.language import measure_perplexity, perplexity, random_windows, read_ids


def test_random_windows_follow_the_seed() -> None:
    ids = torch.arange(100)
    first, again, other = (torch.cat(random_windows(ids, 20, 10, seed)) for seed in (0, 0, 1))
    assert first.shape == (20, 10) and torch.equal(first, again) and not torch.equal(first, other)
    assert (first.diff() == 1).all() and (first[:, 0].max() > 60) and (first[:, 0].min() < 30)
    assert torch.equal(random_windows(ids, 1, 100)[0][0], ids)
    for wrong in (ids[:9], ids.view(10, 10)):
        with pytest.raises(ValueError, match=r"ids must be one-dimensional with at least 10 tokens, got \["):
            random_windows(wrong, 1, 10)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        random_windows(ids, 1, 0)


class Bigrams(nn.Module):
    """Logits that depend on the last token only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_perplexity_is_over_all_predicted_tokens_of_whole_windows() -> None:
    model, ids = Bigrams(), torch.randint(11, (47,))
    chance = model.table.weight.detach().softmax(1)
    losses = [-math.log(chance[ids[i - 1], ids[i]]) for i in range(40) if i % 10]
    assert perplexity(model, ids, 10) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    with torch.no_grad():
        model.table.weight.fill_(0)
    assert perplexity(model, ids, 47) == pytest.approx(11, rel=1e-5)
    with torch.no_grad():
        model.table.weight[:, 0] = 1e6
    assert perplexity(model, ids, 47) == math.inf
    with pytest.raises(ValueError, match="perplexity: ids must be one-dimensional with at least 48 tokens"):
        perplexity(model, ids, 48)
    with pytest.raises(ValueError, match="perplexity: length must be at least 2, got 1"):
        perplexity(model, ids, 1)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("stride", [None, 4, 1])
def test_strides_and_bos_predict_every_token_once(stride: int | None, bos: int | None) -> None:
    model, ids = Bigrams(), torch.randint(11, (47,))
    chance = model.table.weight.detach().softmax(1)
    found = measure_perplexity(model, ids, 10, stride, 4, bos)
    width = 10 if bos is None else 9
    predicted: dict[int, float] = {}
    for start in range(0, 4 * (stride or width), stride or width):
        for place in range(start + (bos is None), start + width):
            given = bos if place == start else int(ids[place - 1])
            predicted.setdefault(place, -math.log(chance[given, ids[place]]))
    assert found.windows == 4 and found.tokens == len(predicted)
    assert found.value == pytest.approx(math.exp(sum(predicted.values()) / len(predicted)), rel=1e-5)


def test_strides_and_windows_say_what_is_wrong() -> None:
    model, ids = Bigrams(), torch.randint(11, (47,))
    for stride in (0, 11):
        with pytest.raises(ValueError, match=f"stride must be from 1 to the tokens of a window, 10, got {stride}"):
            measure_perplexity(model, ids, 10, stride)
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        measure_perplexity(model, ids, 10, windows=0)


def test_texts_are_utf8(tmp_path: Path) -> None:
    class Letters:
        def __call__(self, text: str, **_: object) -> Letters:
            self.input_ids = [ord(letter) for letter in text]
            return self

    plain, packed, broken, cut = (tmp_path / name for name in ("a.txt", "a.gz", "b.txt", "b.gz"))
    plain.write_text("aé\n", encoding="utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_ids(plain, Letters()).tolist() == read_ids(packed, Letters()).tolist() == [97, 233, 10]
    broken.write_bytes(b"\xff\xfe")
    cut.write_bytes(packed.read_bytes()[:-9])
    for path in (broken, cut):
        with pytest.raises(ValueError, match="must be UTF-8 text, gzip-ed in a"):
            read_ids(path, Letters())


def test_a_damaged_text_is_one_sentence(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b"the cat saw the tree . " * 20))
    data[20] ^= 0xFF
    for name, written in (("a.gz", bytes(data)), ("b.gz", data[:-9]), ("c.gz", b"text"), ("d.txt", b"\xff")):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(ValueError, match=f"read_ids: .*{name} must be UTF-8 text, gzip-ed in a .gz: "):
            read_ids(tmp_path / name, None)
