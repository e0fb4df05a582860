# SPDX-License-Identifier: Apache-2.0
"""`bitmill quantize` and `eval --task` on encoders of a few thousand parameters, and the table of all formats."""

from __future__ import annotations

import gzip
import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.nn import PackedFP4Linear, PackedInt8Embedding
from bitmill.nn._module import PackedModule

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
tokenizers = pytest.importorskip("tokenizers")

from bitmill.integrations.language import load_pretrained, read_pretrained  # noqa: E402
from bitmill.recipes.encoder_folder import calibration_batches, evaluate  # noqa: E402
from bitmill.recipes.language_folder import Settings, _windows  # noqa: E402
from bitmill.recipes.scripts import encoder_table  # noqa: E402

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *("the", "a", "cat", "dog", "bird", "saw", "heard", "tree", "house", ".")]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
Run = Callable[..., dict[str, Any]]


def tokenizer_of_words() -> Any:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def write_model(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3)
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=16, num_labels=2)
        model = {"bert": transformers.BertModel, "sst2": transformers.BertForSequenceClassification}[kind](config)
        tokenizer_of_words().save_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far enough from constant that quantising shows
    model.save_pretrained(folder)
    return folder


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = struct.pack(f">{1 + values.dim()}i", 0x800 + values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + values.to(torch.uint8).numpy().tobytes()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A text, and the folders of three tasks."""
    generator = torch.Generator().manual_seed(1)
    words = [WORDS[i] for i in torch.randint(4, len(WORDS), (400,), generator=generator)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    sentences = [" ".join(words[i : i + 5 + i % 4]) for i in range(0, 120, 4)]
    for name in ("sst2", "stsb", "images"):
        (tmp_path / name).mkdir()
    lines = [f"{text}\t{i % 2}" for i, text in enumerate(sentences)]
    (tmp_path / "sst2" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    lines = ["\t".join([*"0123456", a, b, str(i % 6)]) for i, (a, b) in enumerate(itertools.pairwise(sentences))]
    (tmp_path / "stsb" / "dev.tsv").write_text("\n".join(["\t".join("0123456789"), *lines]))
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(256, (count, 8, 8), generator=generator)
        write_idx(tmp_path / "images" / f"{split}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / "images" / f"{split}-labels-idx1-ubyte.gz", torch.arange(count) % 3)
    return tmp_path


KINDS = {"bert": "stsb", "sst2": "sst2", "vit": "images"}
METHODS = {
    "nvfp4": [],
    "mxfp4": ["--activations", "fp4"],
    "nf4": ["--tables", "float"],
    "llm-fp4": ["--activations", "fp4", "--windows", 4, "--length", 16],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_encoders_are_quantised_and_scored(kind: str, method: str, data: Path, run: Run, tmp_path: Path) -> None:
    model, task = write_model(tmp_path / "model", kind), KINDS[kind]
    text = data / "images" if kind == "vit" else data / "text.txt"
    made = run(
        "quantize", model, "--out", tmp_path / "out", "--method", method, "--calibration", text, *METHODS[method]
    )
    assert 4 <= made["bits_per_weight"] < 6
    assert (len(made["errors"]) == 12) == (method == "llm-fp4")  # query, key, value, output and two of the MLP
    packed, _ = load_pretrained(tmp_path / "out")
    layers = [m for m in packed.modules() if isinstance(m, PackedModule)]
    tables = kind != "vit" and "--tables" not in METHODS[method]
    assert sum(isinstance(m, PackedFP4Linear) for m in layers) == 12
    assert sum(isinstance(m, PackedInt8Embedding) for m in layers) == tables
    scores = run("eval", tmp_path / "out", "--task", task, "--data", data / task)
    assert scores["task"] == task and scores["examples"] == {"stsb": 29, "sst2": 30, "images": 20}[task]
    original, of_words = read_pretrained(model)
    assert (of_words is None) == (kind == "vit")
    wanted, got = (evaluate(m, of_words, task, data / task).outputs for m in (original, packed))
    assert 0 < (got - wanted).norm() < 0.6 * wanted.norm()


def test_every_row_of_the_table(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", "bert")
    places = {"model": model, "calibration": data / "text.txt", "data": data / "stsb", "out": tmp_path / "table"}
    sizes = {"task": "stsb", "windows": 3, "length": 16}
    arguments = [word for key, value in {**places, **sizes}.items() for word in (f"--{key}", str(value))]
    assert encoder_table.main(arguments) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    assert [line[0] for line in lines] == [*encoder_table.ROWS] and len({*map(len, printed.splitlines())}) == 1
    cosines = {line[0]: float(line[2]) for line in lines}
    assert cosines["float32"] == 1 and all(0.5 < cosine < 1 for name, cosine in cosines.items() if name != "float32")
    assert encoder_table.main([*arguments, "--rows", "nf4"]) == 0  # from its file
    assert capsys.readouterr().out.splitlines()[2] in printed


def test_windows_of_a_text_have_its_special_tokens(data: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=len(WORDS)))
    batches = calibration_batches(data / "text.txt", model, tokenizer_of_words(), 3, 9, 0)
    assert [batch.shape for batch in batches] == [(1, 9)] * 3
    assert all(batch[0, 0] == 1 and batch[0, -1] == 2 and (batch[0, 1:-1] > 2).all() for batch in batches)


def test_windows_fit_a_model_whose_places_begin_after_that_of_padding(data: Path) -> None:
    sizes = {**SIZES, "max_position_embeddings": 20, "pad_token_id": 1}
    config = transformers.RobertaConfig(**sizes, vocab_size=len(WORDS), architectures=["RobertaModel"])
    model = transformers.RobertaModel(config)
    windows = _windows(data / "text.txt", Settings(windows=2), model, tokenizer_of_words())
    assert [window.shape for window in windows] == [(1, 18)] * 2
    model(torch.full((1, 18), 3))


def test_what_does_not_go_together(data: Path, tmp_path: Path, complaint: Callable[..., str]) -> None:
    bert, vit, sst2 = (write_model(tmp_path / kind, kind) for kind in ("bert", "vit", "sst2"))
    assert "must be a causal language model for method 'pb-llm', got BertModel; take one of llm-fp4" in complaint(
        "quantize", bert, "--out", tmp_path / "x", "--rounding", "rtn", "--metric", "magnitude"
    )
    assert "perplexity is of causal language models, got BertModel" in complaint(
        "eval", bert, "--text", data / "text.txt"
    )
    assert "--task and --data go together" in complaint("eval", bert, "--task", "stsb")
    assert "--windows goes with --text, got --task" in complaint(
        "eval", bert, "--task", "stsb", "--data", data / "stsb", "--windows", 3
    )
    assert "a model of texts has no outputs for images" in complaint(
        "eval", bert, "--task", "images", "--data", data / "images"
    )
    assert "a model of images has no outputs for sst2" in complaint("eval", vit, "--task", "sst2", "--data", data)
    assert "sst2 needs a model with a classification head" in complaint(
        "eval", bert, "--task", "sst2", "--data", data / "sst2"
    )
    with pytest.raises(ValueError, match=r"eval: task must be one of sst2, .*, images, got 'qqp'"):
        evaluate(None, None, "qqp", data)
    assert "stsb needs 1 outputs, the model has 2" in complaint("eval", sst2, "--task", "stsb", "--data", data / "stsb")
    for split in ("train", "t10k"):
        write_idx(data / "images" / f"{split}-images-idx3-ubyte.gz", torch.zeros(40 if split == "train" else 20, 6, 8))
    assert "the images must have the 8 x 8 pixels that the model takes, got [6, 8]" in complaint(
        "eval", vit, "--task", "images", "--data", data / "images"
    )
