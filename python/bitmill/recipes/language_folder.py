# SPDX-License-Identifier: Apache-2.0
"""`bitmill quantize`: a model's folder or GGUF file to a packed folder, resumable at every moment.

The folder of a run says in run.json what it is of, by digests where files could have changed. Finished decoder blocks
are kept in `blocks` until the packed file is whole; the same run again goes on from there, or, if all is done, only
answers what it found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import FP4Config, Int8Config, SalientConfig, pack_, quantize_, strict_json, summary
from ..integrations.four_bit import is_four_bit, read_four_bit
from ..integrations.language import (
    PACKED_FILE,
    LanguageModel,
    int8_tables_,
    is_causal,
    load_pretrained,
    read_pretrained,
    save_pretrained,
)
from . import arb_llm, billm, llm_fp4, pb_llm
from .encoder_folder import calibration_batches, evaluate
from .fpq_search import FORMATS, Search
from .language import measure_perplexity, random_windows, read_ids
from .layerwise import decoder_blocks

DTYPES = ("float32", "bfloat16", "float16")
RUN_FILE, BLOCKS = "run.json", "blocks"
FP4_FORMATS = ("mxfp4", "nvfp4", "nf4", "bnb-fp4")  # of FP4, and methods of their own
FOR_ENCODERS = ("llm-fp4", "fp4", *FP4_FORMATS)  # methods
ARB_LLM = {"arb": "arb", "arb-x": "arb_x", "arb-rc": "arb_rc"}  # methods, and what `arb_llm` calls them
DEFAULT_LENGTH = 2048  # tokens of a window, if the model takes as many


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does. Those that the method has no use for do not matter.

    Attributes:
        method: a key of `METHODS`.
        salient, bits, metric, structure, scale, group_size: of PB-LLM, `SalientConfig`.
        metric, rounding ("gptq" or "rtn"): of BiLLM and ARB-LLM too.
        format: of the method "fp4", and of "llm-fp4" with search "minmax".
        scale_rule: of MXFP4's scales, `FP4Config`.
        activations: "float" or "int8", of PB-LLM and FP4, and of the output head; "fp4" for "llm-fp4", "mxfp4" and
            "nvfp4", which leaves the head's floats.
        search, error, shift: of LLM-FP4, `fpq_search.Search`, whose metric is `error` here.
        tables: "int8" rounds the token embedding and the output head to 8-bit rows, "float" leaves them as they are.
        windows, length, seed: of the calibration text; windows of at most as many tokens as the model takes.
        dtype: of the model: "float32", "bfloat16" or "float16".
    """

    method: str = "pb-llm"
    salient: float = 0.1
    bits: int = 8
    metric: str = "hessian"
    structure: str = "element"
    scale: str = "unbiased"
    group_size: int | None = None
    rounding: str = "gptq"
    format: str = "e2m1"
    scale_rule: str = "floor"
    activations: str = "float"
    search: str = "scale"
    error: str = "l2"
    shift: bool = True
    tables: str = "int8"
    windows: int = 128
    length: int = 2048
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.activations == "fp4" and self.method not in ("llm-fp4", "mxfp4", "nvfp4"):
            raise ValueError(
                "quantize: activations must be one of float, int8 unless the method is llm-fp4, mxfp4 or nvfp4, got"
                f" 'fp4' for method {self.method!r}"
            )
        self.salient_config()
        self.fp4_config()
        self.fpq_search()
        choices = {"tables": ("int8", "float"), "dtype": DTYPES, "rounding": pb_llm.ROUNDING}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"quantize: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("windows", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"quantize: {name} must be at least 1, got {getattr(self, name)}")

    def salient_config(self) -> SalientConfig:
        return SalientConfig(
            self.salient,
            self.bits,
            self.metric,
            self.structure,
            self.scale,
            group_size=self.group_size,
            activations=self.head_activations,
        )

    def fp4_config(self) -> FP4Config:
        format = self.method if self.method in FP4_FORMATS else self.format
        fp4 = self.activations == "fp4" and self.method in FP4_FORMATS
        return FP4Config(format, self.scale_rule, format if fp4 else self.head_activations)

    def fpq_search(self) -> Search:
        formats = (self.format,) if self.search == "minmax" else FORMATS
        choices = self.activations, self.shift, self.search, self.error
        return Search(*choices, formats=formats, activation_formats=formats)

    @property
    def head_activations(self) -> str:
        """Of the output head, and of methods without 4-bit activations."""
        return "float" if self.activations == "fp4" else self.activations

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at a text."""
        plain = self.rounding == "rtn" and self.metric == "magnitude"
        return self.method in ("billm", "llm-fp4", *ARB_LLM) or (self.method == "pb-llm" and not plain)


def _pb_llm(model: nn.Module, windows: list[Tensor], settings: Settings, folder: Path) -> dict[str, float]:
    if not settings.calibrated:
        return _without_calibration(model, settings.salient_config())
    return pb_llm.quantize_(model, windows, settings.salient_config(), settings.rounding, folder=folder)


def _billm(model: nn.Module, windows: list[Tensor], settings: Settings, folder: Path) -> dict[str, float]:
    return billm.quantize_(model, windows, settings.metric, settings.rounding, folder=folder)


def _arb_llm(model: nn.Module, windows: list[Tensor], settings: Settings, folder: Path) -> dict[str, float]:
    variant = ARB_LLM[settings.method]
    return arb_llm.quantize_(model, windows, variant, metric=settings.metric, rounding=settings.rounding, folder=folder)


def _llm_fp4(model: nn.Module, windows: list[Tensor], settings: Settings, folder: Path) -> dict[str, float]:
    return llm_fp4.quantize_(model, windows, settings.fpq_search(), folder=folder)


def _fp4(model: nn.Module, windows: list[Tensor], settings: Settings, folder: Path) -> dict[str, float]:
    return _without_calibration(model, settings.fp4_config())


def _without_calibration(model: nn.Module, config: SalientConfig | FP4Config) -> dict[str, float]:
    """Pack the linear layers of the decoder blocks, each by itself."""
    prefix, _ = decoder_blocks(model)
    quantize_(model, config, lambda module, name: name.startswith(f"{prefix}."))
    pack_(model)
    return {}


METHODS: dict[str, Callable[[nn.Module, list[Tensor], Settings, Path], dict[str, float]]] = {
    "pb-llm": _pb_llm,
    "billm": _billm,
    **dict.fromkeys(ARB_LLM, _arb_llm),
    "llm-fp4": _llm_fp4,
    **dict.fromkeys(("fp4", *FP4_FORMATS), _fp4),
}


def quantize_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings,
    calibration: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Quantise the model at `source` and write the packed folder `out`.

    Args:
        source: of `integrations.language.read_pretrained`; methods with 4-bit floats take encoders too.
        out: a new folder, or that of the same run, which goes on.
        calibration: a text of `recipes.language.read_ids`; for encoders, of `encoder_folder.calibration_batches`.
        device: where to compute.
    Returns:
        seconds, cpu_seconds (of all threads) and peak_memory_bytes of the process that finished the run, file_bytes,
        bits_per_weight of the layers in the decoder blocks, and errors, |X W^T - X Q^T| / |X W^T| by layer on the
        calibration text, if there is one.
    Raises:
        ValueError: for a missing calibration text, a folder of another run, or what `read_pretrained` and the method
            refuse.
        OSError: if something cannot be read or written.
    """
    source, out = Path(source), Path(out)
    text = None if calibration is None or not settings.calibrated else Path(calibration)
    if settings.calibrated and text is None:
        raise ValueError(
            f"quantize: a calibration text must be given for method {settings.method!r}, got none; name one, or take"
            " rounding 'rtn' and metric 'magnitude' of pb-llm"
        )
    run = {
        "model": source.name,
        "model_digest": digest_of_model(source),
        "settings": dataclasses.asdict(settings),
        "calibration": text and text.name,
        "calibration_digest": text and digest_of_data(text),
    }
    result = _known(out, run)
    if result is None:
        _check_places(out, device)
        wall, cpu = time.perf_counter(), time.process_time()
        model, tokenizer = read_pretrained(source, getattr(torch, settings.dtype))
        if settings.method not in FOR_ENCODERS and not is_causal(model.config):
            raise ValueError(
                f"quantize: the model must be a causal language model for method {settings.method!r}, got"
                f" {type(model).__name__}; take one of {', '.join(FOR_ENCODERS)}"
            )
        model.to(device)
        windows = [w.to(device) for w in _windows(text, settings, model, tokenizer)] if text else []
        blocks, _ = decoder_blocks(model)
        out.mkdir(parents=True, exist_ok=True)
        strict_json.write(out / RUN_FILE, run)
        errors = METHODS[settings.method](model, windows, settings, out / BLOCKS)
        if settings.tables == "int8":
            int8_tables_(model, Int8Config(settings.head_activations))
        save_pretrained(model, tokenizer, out)
        times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        result = {**_facts(model, blocks, out), **times, "errors": errors}
        strict_json.write(out / RUN_FILE, {**run, "result": result})
    shutil.rmtree(out / BLOCKS, ignore_errors=True)
    return result


def open_folder(path: str | os.PathLike[str], activations: str | None = None) -> LanguageModel:
    """The model of a packed folder, of a 4-bit one of another project, or one that `read_pretrained` takes.

    Args:
        activations: of the packed layers, as `load_pretrained` takes it.
    Raises:
        ValueError: for activations of a model that is not packed, and for what the readers refuse.
    """
    path = Path(path)
    if any((path / name).exists() for name in (PACKED_FILE, RUN_FILE)):
        return load_pretrained(path, activations)
    if is_four_bit(path):
        return read_four_bit(path, activations or "float")
    if activations is not None:
        raise ValueError(f"activations go with a packed folder, got {activations!r} for {path}; quantise it first")
    return read_pretrained(path)


def evaluate_folder(
    folder: str | os.PathLike[str],
    text: str | os.PathLike[str],
    length: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    bos: bool = False,
    activations: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a folder of `open_folder`, as `language.measure_perplexity` counts it.

    Args:
        activations: of `open_folder`.
        length: tokens of a window; None for 2048, or what the model takes.
    Returns:
        perplexity, tokens (how many were predicted), windows, and the settings length, stride, bos.
    Raises:
        ValueError: for a text shorter than a window, or a tokenizer without a BOS token if `bos` asks for one.
    """
    model, tokenizer = open_folder(folder, activations)
    if not is_causal(model.config):
        raise ValueError(f"eval: perplexity is of causal language models, got {type(model).__name__}; name a task")
    most = getattr(model.config, "max_position_embeddings", DEFAULT_LENGTH)
    length = min(DEFAULT_LENGTH, most) if length is None else length
    if length > most:
        raise ValueError(f"eval: length must be at most {most}, which the model takes, got {length}")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError(f"eval: the tokenizer of {folder} has no BOS token; leave it out")
    found = measure_perplexity(
        model, read_ids(text, tokenizer), length, stride, windows, tokenizer.bos_token_id if bos else None
    )
    return {
        "perplexity": found.value,
        "tokens": found.tokens,
        "windows": found.windows,
        "length": length,
        "stride": stride or length - bos,
        "bos": bos,
    }


def evaluate_task(
    folder: str | os.PathLike[str], task: str, data: str | os.PathLike[str], activations: str | None = None
) -> dict[str, Any]:
    """The scores of `encoder_folder.evaluate` for a folder of `open_folder`, and the task's name."""
    model, tokenizer = open_folder(folder, activations)
    if is_causal(model.config):
        raise ValueError(f"eval: tasks are for encoders, got {type(model).__name__}; give a text for its perplexity")
    return {"task": task, **evaluate(model, tokenizer, task, data).scores}


def digest_of_model(source: Path) -> str:
    """Of the contents of a GGUF file, or of a folder's config and safetensors."""
    return _digest([source] if source.is_file() else [*source.glob("config.json"), *source.glob("*.safetensors")])


def digest_of_data(path: Path) -> str:
    """Of the contents of a text, or of the files of a folder.

    Raises:
        OSError: if there is none.
    """
    return _digest(path.iterdir() if path.is_dir() else [path])


def _digest(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in files if not path.is_dir()):
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                total.update(part)
    return total.hexdigest()


def _check_places(out: Path, device: str) -> None:
    """Before a model is read, which takes long: that the folder and the device are some."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"quantize: out must be a folder, got the file {out}")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"quantize: device must be one to compute on here, got {device!r}: {error}") from None


def _known(out: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the same run, if it has come to its end in this folder."""
    if (out / RUN_FILE).exists():
        known = _read(out / RUN_FILE)
        result = known.pop("result", None)
        for key in ("model_digest", "calibration_digest"):  # which older folders do not have
            known.setdefault(key, run[key])
        if known != run:
            old, new = ({**facts, **facts["settings"]} for facts in (known, run))
            changed = [key for key in {**new, **old} if key != "settings" and old.get(key) != new.get(key)]
            names = dict.fromkeys(key.removesuffix("_digest") for key in changed)
            raise ValueError(f"quantize: {out} holds a run with another {', '.join(names)}; take another folder")
        return result
    if (out / PACKED_FILE).exists() or (out / "config.json").exists():
        raise ValueError(f"quantize: {out} holds a model already; take another folder")
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        known = strict_json.read(file)
        if isinstance(known["settings"], dict):
            return known
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"quantize: {file} must say what the folder is of, it is damaged; take another folder")


def _windows(text: Path, settings: Settings, model: Any, tokenizer: Any) -> list[Tensor]:
    length = min(settings.length, getattr(model.config, "max_position_embeddings", settings.length))
    if not is_causal(model.config):
        padding = [
            getattr(m, "padding_idx", None) for n, m in model.named_modules() if n.endswith("position_embeddings")
        ]
        if padding and padding[0] is not None:  # RoBERTa's places begin after that of padding
            length = min(length, model.config.max_position_embeddings - padding[0] - 1)
        return calibration_batches(text, model, tokenizer, settings.windows, length, settings.seed)
    return random_windows(read_ids(text, tokenizer), settings.windows, length, settings.seed)


def _facts(model: nn.Module, blocks: str, out: Path) -> dict[str, Any]:
    """Sizes of the packed file; `blocks` is the name of the decoder blocks."""
    layers = [layer for layer in summary(model).layers if layer.name.startswith(f"{blocks}.")]
    weights = [math.prod(layer.shape) for layer in layers]
    bits = sum(layer.bits_per_weight * count for layer, count in zip(layers, weights, strict=True))
    file_bytes = (out / PACKED_FILE).stat().st_size
    return {
        "file_bytes": file_bytes,
        "bits_per_weight": bits / sum(weights) if weights else 32.0,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
