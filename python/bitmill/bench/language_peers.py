# SPDX-License-Identifier: Apache-2.0
"""llama.cpp beside the decoders of `bitmill bench --model smollm2 --peers`, with the same weights in its own formats.

pip install gguf llama-cpp-python, the latter built from source on this machine; what it computes is checked like all
else, and it is timed in the same process, in turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMATS = ("Q4_0", "Q8_0")  # of the blocks; embedding and head are Q8_0, as llama.cpp makes them at this width
LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """A GGUF file of a Llama of transformers with tied embeddings, without a vocabulary's texts.

    Args:
        kind: of `FORMATS`.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config, parameters = model.config, dict(model.named_parameters())
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, weight: Tensor, kind: str) -> None:
        kept = GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", quants.quantize(weight.detach().numpy(), kept), raw_dtype=kept)

    add("token_embd", parameters["model.embed_tokens.weight"], "Q8_0")
    add("output_norm", parameters["model.norm.weight"], "F32")
    for i in range(config.num_hidden_layers):
        for ours, theirs in LAYERS.items():
            weight = parameters[f"model.layers.{i}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):  # they turn neighbours, transformers turns halves
                halves = weight.unflatten(0, (-1, 2, config.head_dim // 2))
                weight = halves.transpose(1, 2).reshape(weight.shape)
            add(f"blk.{i}.{theirs}", weight.contiguous(), kind)
        for ours, theirs in NORMS.items():
            add(f"blk.{i}.{theirs}", parameters[f"model.layers.{i}.{ours}.weight"], "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model of llama.cpp in the middle of a text, with the methods of `integrations.generation.Decoder`."""

    def __init__(self, model: Any, capacity: int, kind: str) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            self._llama = Llama(
                str(path),
                n_ctx=capacity,
                n_batch=capacity,
                n_threads=threads,
                n_threads_batch=threads,
                use_mmap=False,
                verbose=False,
            )

    def prefill(self, ids: Tensor) -> Tensor:
        self._llama.reset()
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        self._llama.eval(ids[0].tolist())
        logits = self._llama._ctx.get_logits()
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).copy()).unsqueeze(0)


PEERS: dict[str, Callable[[Any, int], LlamaCpp]] = {
    f"llama.cpp {kind}": partial(LlamaCpp, kind=kind) for kind in FORMATS
}
