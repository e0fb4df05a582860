# SPDX-License-Identifier: Apache-2.0
"""A language model of a few thousand parameters on disk and a text of its words, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = " ".join(f"the {a} saw the {b} ." for a in ("cat", "dog", "bird") for b in ("tree", "house")) + " "
WORDS = ["<unk>", "<s>", *sorted(set(TEXT.split()))]


def write_text(path: Path) -> Path:
    path.write_text(TEXT * 20)
    return path


def write_model(folder: Path, kind: str = "llama", **options: Any) -> Path:
    """A random model and a tokenizer of words; transformers has to be installed."""
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>")
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": None}
    if kind == "gpt2":
        config = transformers.GPT2Config(**sizes, n_positions=32, n_embd=32, n_layer=2, n_head=4, **options)
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(**sizes, max_position_embeddings=32, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far enough from uniform that quantising shows
    model.save_pretrained(folder)
    return folder
