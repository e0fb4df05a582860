# SPDX-License-Identifier: Apache-2.0
"""bitmill: packed binary matmul, salient-weight scatter and FP4 casting as drop-in PyTorch layers.

The public names are below, and in `bitmill.nn`, `ops` and `binarize`; `bitmill.arrays` holds the same kernels for
NumPy arrays. Where torch is not installed, `bitmill.arrays` is all there is.
"""

import importlib
import importlib.util

__version__ = "0.1.0"

if importlib.util.find_spec("torch") is not None:
    from . import binarize, nn, ops  # noqa: F401
    from .checkpoint import load, save
    from .config import BinaryConfig, FP4Config, Int8Config, OneBitConfig, SalientConfig
    from .convert import dequantize_, pack_, quantize_
    from .report import summary

    __all__ = [
        "BinaryConfig",
        "FP4Config",
        "Int8Config",
        "OneBitConfig",
        "SalientConfig",
        "dequantize_",
        "load",
        "pack_",
        "quantize_",
        "save",
        "summary",
    ]
else:
    __all__ = []


def __getattr__(name: str) -> object:
    if name == "arrays":
        return importlib.import_module(".arrays", __name__)
    if importlib.util.find_spec("torch") is None:
        raise AttributeError(f"bitmill.{name} needs torch, which is not installed: pip install torch")
    raise AttributeError(f"module 'bitmill' has no attribute {name!r}")
