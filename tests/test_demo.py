# SPDX-License-Identifier: Apache-2.0
"""The demo: its model against the text its author printed, its tokenizer against the plain algorithm, its
perplexity against known values, and the whole road quantise - pack - save - load - measure on two variants.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bitmill.demo import DATA
from bitmill.demo.model import BOS, KVCache, Stories, StoriesConfig, load_stories
from bitmill.demo.run import VARIANTS, plot, render, run
from bitmill.demo.text import count_tokens, encode_pieces, perplexity, read_text, split_stories
from bitmill.demo.tokenizer import Tokenizer

# What llama2.c prints for this model at temperature 0 (doc/stories260K.md).
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want to "
    "play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she said, \"I'm sorry, mom. I didn't know what to do.\" Her mom said, "
    "\"Don't worry, Lily. We can help you."
)
# A prefix short enough to run whole variants in a test.
TOKENS = 4_000


@pytest.fixture(scope="module")
def model() -> Stories:
    return load_stories()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture(scope="module")
def text() -> str:
    return read_text()


def test_greedy_text_is_the_authors(model: Stories, tokenizer: Tokenizer) -> None:
    ids = model.generate([BOS], len(tokenizer.encode(GREEDY)) - 1)
    assert tokenizer.decode(ids) == GREEDY
    assert ids == tokenizer.encode(GREEDY)


def test_model_has_the_sizes_and_the_tied_head_it_claims(model: Stories) -> None:
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == 35
    assert set(Stories().state_dict()) == set(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 7), (4, 1, 3, 4)])
def test_cache_equals_full_recomputation(model: Stories, tokenizer: Tokenizer, cuts: tuple[int, ...]) -> None:
    ids = torch.tensor([tokenizer.encode(GREEDY)[:12], tokenizer.encode("One day Tom saw a very big dog.")[:12]])
    cache, parts, start = KVCache(), [], 0
    for cut in cuts:
        parts.append(model(ids[:, start : start + cut], cache))
        start += cut
        assert len(cache) == start
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-4, atol=1e-4)


def test_context_ends_with_an_error(model: Stories) -> None:
    with pytest.raises(ValueError, match="context of 512 tokens, got 513"):
        model(torch.full((1, 513), BOS))


def _header(**changes: int) -> bytes:
    sizes = {"dim": 64, "hidden": 172, "layers": 5, "heads": 8, "kv_heads": 4, "vocab": 512, "context": 512}
    return struct.pack("<7i", *(sizes | changes).values())


WHOLE = (DATA / "stories260K.bin").read_bytes()
BAD_FILES = {
    "empty": b"",
    "half a header": WHOLE[:13],
    "header only": WHOLE[:28],
    "truncated": WHOLE[:-4],
    "truncated within a float": WHOLE[:-1],
    "too long": WHOLE + bytes(4),
    "no layers": _header(layers=0) + WHOLE[28:],
    "negative size": _header(hidden=-172) + WHOLE[28:],
    "untied head": _header(vocab=-512) + WHOLE[28:],
    "heads do not divide": _header(heads=7) + WHOLE[28:],
    "kv heads do not divide": _header(kv_heads=3) + WHOLE[28:],
    "absurd sizes": _header(dim=2**30, hidden=2**31 - 1, layers=2**31 - 1, vocab=2**31 - 1) + WHOLE[28:],
    "text": b"this is not a model " * 100,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_model_file_is_one_value_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(ValueError, match=r"bad\.bin"):
        load_stories(path)


def test_config_rejects_odd_head_size() -> None:
    with pytest.raises(ValueError, match="even head size"):
        StoriesConfig(dim=24, heads=8)


@pytest.mark.parametrize("cut", [0, 3, 11, 2000, -1])
def test_bad_tokenizer_file_is_one_value_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes((DATA / "tok512.bin").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"bad\.bin"):
        Tokenizer.load(path)


ODD_TEXTS = [
    "",
    " ",
    "   three spaces  and two \n\n newlines\t",
    "Zoë naïvely said: \u201cçà et là\u201d \u2014 日本語 🐈.",
    "<unk> <s> <0x41> \x00\x7f @#^{}",
    "word" * 50,
    "\n\n",
]


def test_tokenizer_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    for sample in [*ODD_TEXTS, text]:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.encode("") == [BOS]
    assert tokenizer.encode("", bos=False) == []


def test_tokenizer_cut_at_spaces_is_exact(tokenizer: Tokenizer, text: str) -> None:
    for sample in [*ODD_TEXTS, *(text[start : start + 700] for start in range(0, len(text), 80_000))]:
        assert tokenizer.encode(sample) == tokenizer.encode_plain(sample)


def test_tokenizer_refuses_a_vocabulary_whose_tokens_cross_spaces(tokenizer: Tokenizer) -> None:
    tokens = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % byte for byte in range(256)] + [b"a", b" ", b"a a"]
    with pytest.raises(ValueError, match="inner space"):
        Tokenizer(tokens, [0.0] * len(tokens))


def test_stories_and_pieces_lose_nothing(tokenizer: Tokenizer, text: str) -> None:
    stories = split_stories(text)
    assert "".join(stories) == text
    assert 700 < len(stories) < 1000
    pieces = encode_pieces(tokenizer, stories)
    assert all(piece[0] == BOS and 2 <= len(piece) <= 512 for piece in pieces)
    assert [i for piece in pieces for i in piece[1:]] == [i for s in stories for i in tokenizer.encode(s, bos=False)]
    prefix = encode_pieces(tokenizer, stories, tokens=TOKENS)
    assert prefix == pieces[: len(prefix)]
    assert count_tokens(prefix[:-1]) < TOKENS <= count_tokens(prefix)
    for bad in (0, -2):
        with pytest.raises(ValueError, match="tokens must be at least 1"):
            encode_pieces(tokenizer, stories, tokens=bad)


@torch.no_grad()
def test_padding_does_not_change_the_loss(model: Stories, tokenizer: Tokenizer, text: str) -> None:
    pieces = encode_pieces(tokenizer, split_stories(text), tokens=1_500)
    pieces += [[BOS, 300], pieces[0][:40]]
    seen: list[int] = []
    result = perplexity(model, pieces, progress=seen.append, batch=4)
    alone = sum(
        float(F.cross_entropy(model(torch.tensor([p[:-1]]))[0], torch.tensor(p[1:]), reduction="sum")) for p in pieces
    )
    assert result.tokens == sum(seen) == count_tokens(pieces)
    assert result.loss == pytest.approx(alone / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    with pytest.raises(ValueError, match="at least one token"):
        perplexity(model, [[BOS]])


def test_fp32_perplexity_of_the_default_prefix(model: Stories, tokenizer: Tokenizer, text: str) -> None:
    pieces = encode_pieces(tokenizer, split_stories(text), tokens=28_000)
    result = perplexity(model, pieces)
    assert result.tokens == 28_242
    assert result.loss == pytest.approx(1.3363, abs=5e-4)


def test_run_two_variants_end_to_end(tmp_path: Path) -> None:
    result = run(["fp32", "FP4 e2m1"], tokens=TOKENS, save_dir=tmp_path / "models", progress=False)
    assert json.loads(json.dumps(result)) == result
    fp32, fp4 = result["rows"]
    assert [fp32["name"], fp4["name"]] == ["fp32", "FP4 e2m1"]
    assert fp32["ratio_to_fp32"] == 1.0
    assert 1.0 < fp4["ratio_to_fp32"] == fp4["perplexity"] / fp32["perplexity"] < 1.3
    assert (fp32["layers"], fp4["layers"]) == (0, 35)
    assert fp4["file_bytes"] < 0.3 * fp32["file_bytes"]
    assert fp32["bits_per_weight"] == 32
    assert fp32["sentence"] == GREEDY[: GREEDY.index(".") + 1]
    assert sorted(p.stat().st_size for p in (tmp_path / "models").iterdir()) == [fp4["file_bytes"], fp32["file_bytes"]]
    table = render(result)
    assert all(len(line) <= 120 for line in table.splitlines())
    for part in ("fp32", "FP4 e2m1", fp32["sentence"], "KB", "tokens/s"):
        assert part in table
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_run_rejects_unknown_variants() -> None:
    with pytest.raises(ValueError, match=r"variants must be some of fp32, .*, got fp3"):
        run(["fp3"])
    with pytest.raises(ValueError, match="got none"):
        run([])


def test_render_survives_what_a_broken_model_writes() -> None:
    row = {"perplexity": 1e300, "file_bytes": 10**9, "bits_per_weight": 1.0, "tokens_per_second": 1e6, "layers": 35}
    rows = [row | {"name": name, "sentence": "\x1b[2J\n\x00" + "x " * 200, "ratio_to_fp32": None} for name in VARIANTS]
    text = {"name": "t", "stories": 1, "tokens": 1, "statement": "s"}
    table = render({"model": "m", "text": text, "torch": "2", "cpu": "c" * 150, "threads": 1, "rows": rows})
    assert all(len(line) <= 120 and line.isprintable() for line in table.split("\n"))
