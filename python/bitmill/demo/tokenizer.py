# SPDX-License-Identifier: Apache-2.0
"""The SentencePiece-style BPE of tok512.bin, fast enough to encode the whole demo text in a moment.

Encoding merges the neighbouring pair whose union has the highest score, leftmost first, until no union is in the
vocabulary. In this vocabulary a space only ever begins a token, so no merge crosses the front of a space: cutting
the text there and caching each piece gives the same ids. `load` checks that property of the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from bitmill.demo import DATA
from bitmill.demo.model import BOS

_FIRST_BYTE = 3  # ids 3..258 are the raw bytes 0x00..0xFF; 0, 1, 2 are <unk>, BOS, EOS
_FIRST_TEXT = _FIRST_BYTE + 256
_PIECE = re.compile(r" ?[^ ]*")


class Tokenizer:
    """Text to ids and back. Characters outside the vocabulary become their UTF-8 bytes, so no text is lost."""

    def __init__(self, tokens: list[bytes], scores: list[float]) -> None:
        self._tokens = [bytes([i - _FIRST_BYTE]) if _FIRST_BYTE <= i < _FIRST_TEXT else t for i, t in enumerate(tokens)]
        self._scores = scores
        # The names of the 259 special tokens ("<0x41>") are no text: a story that contains one must not become it.
        self._ids = {token: i for i, token in enumerate(tokens) if i >= _FIRST_TEXT}
        if any(b" " in token[1:] for token in self._ids):
            raise ValueError("Tokenizer: expected tokens with a space at most in front, got one with an inner space")
        self._pieces: dict[str, list[int]] = {}

    @classmethod
    def load(cls, path: str | PathLike[str] | None = None) -> Tokenizer:
        """Reads `path`, or the package's own tok512.bin: int32, then per token float32 score, int32 length, bytes."""
        path = Path(path) if path is not None else DATA / "tok512.bin"
        data, offset = path.read_bytes(), 4
        tokens, scores = [], []
        while offset + 8 <= len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if length < 0 or offset + length > len(data):
                break
            tokens.append(data[offset : offset + length])
            scores.append(score)
            offset += length
        if offset != len(data) or len(tokens) <= _FIRST_TEXT:
            raise ValueError(
                f"{path}: expected a llama2.c tokenizer of more than {_FIRST_TEXT} tokens that ends with the file, "
                f"got {len(tokens)} tokens in {offset} of {len(data)} bytes; copy the file again"
            )
        return cls(tokens, scores)

    @property
    def vocab(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """BOS, then the ids of " " + text; an empty text gives BOS alone."""
        ids = [BOS] if bos else []
        for piece in _PIECE.findall(" " + text if text else ""):
            if piece not in self._pieces:
                self._pieces[piece] = self._merge(piece)
            ids += self._pieces[piece]
        return ids

    def encode_plain(self, text: str, bos: bool = True) -> list[int]:
        """What `encode` must equal: the same merges over the uncut text, in time quadratic in its length."""
        return ([BOS] if bos else []) + self._merge(" " + text if text else "")

    def _merge(self, text: str) -> list[int]:
        ids = []
        for character in text:
            raw = character.encode("utf-8")
            ids += [self._ids[raw]] if raw in self._ids else [_FIRST_BYTE + byte for byte in raw]
        while True:
            best: tuple[float, int, int] | None = None
            for i in range(len(ids) - 1):
                union = self._ids.get(self._tokens[ids[i]] + self._tokens[ids[i + 1]])
                if union is not None and (best is None or self._scores[union] > best[0]):
                    best = (self._scores[union], i, union)
            if best is None:
                return ids
            _, i, union = best
            ids[i : i + 2] = [union]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; BOS, EOS and <unk> give nothing, and the space that `encode` put in front goes."""
        text = b"".join(self._tokens[i] for i in ids if i >= _FIRST_BYTE).decode("utf-8", errors="replace")
        return text.removeprefix(" ")
