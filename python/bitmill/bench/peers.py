# SPDX-License-Identifier: Apache-2.0
"""int8 models of other engines, for `bitmill bench --model NAME --peers`: one function each, imported when called.

pip install openvino nncf onnx onnxruntime
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Inputs

CALIBRATION = 8  # random batches that OpenVINO's activation ranges are taken from


class Logits(nn.Module):
    """The model with its inputs by position, which exporters follow."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn about each other, and draw progress bars."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def openvino_int8(model: nn.Module, draw: Callable[[], Inputs]) -> Callable[[Inputs], Callable[[], Tensor]]:
    """OpenVINO's model, its weights and activations quantised by NNCF with a few random batches."""
    os.environ.setdefault("NNCF_CI", "1")  # it would send usage statistics
    with quiet():
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        converted = openvino.convert_model(Logits(model, list(draw())), example_input=tuple(draw().values()))
        batches = [[t.numpy() for t in draw().values()] for _ in range(CALIBRATION)]
        quantised = nncf.quantize(
            converted, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION
        )
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        request = openvino.Core().compile_model(quantised, "CPU", settings).create_infer_request()

    def bind(inputs: Inputs) -> Callable[[], Tensor]:
        arrays = [t.numpy() for t in inputs.values()]
        return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return bind


def onnxruntime_int8(model: nn.Module, draw: Callable[[], Inputs]) -> Callable[[Inputs], Callable[[], Tensor]]:
    """ONNX Runtime's model, its weights quantised, its activations in the call (`quantize_dynamic`)."""
    names = list(draw())
    axes: dict[str, Any] = {name: {0: "batch"} if name == "pixel_values" else {0: "batch", 1: "n"} for name in names}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path, quantised = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(
            Logits(model, names),
            tuple(draw().values()),
            path,
            input_names=names,
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        quantize_dynamic(path, quantised, weight_type=QuantType.QInt8)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
        session = onnxruntime.InferenceSession(quantised.read_bytes(), settings, providers=["CPUExecutionProvider"])

    def bind(inputs: Inputs) -> Callable[[], Tensor]:
        feed = {name: t.numpy() for name, t in inputs.items()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return bind


PEERS = {"OpenVINO int8": openvino_int8, "ONNX Runtime int8": onnxruntime_int8}
