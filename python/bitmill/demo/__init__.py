# SPDX-License-Identifier: Apache-2.0
"""The demo of `bitmill demo`: one real pretrained language model, one real text, six ways to store its weights.

This file only says where the embedded data lies. `bitmill.demo.run` does the job; `model`, `tokenizer` and
`text` are its parts. Nothing here imports torch, so `import bitmill.demo` stays free.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
