# SPDX-License-Identifier: Apache-2.0
"""The rings: who may include or import whom, and what still works when an outer ring is missing."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitmill
from bitmill.nn import BinaryLinear

ROOT = Path(__file__).parent.parent
PACKAGE = Path(bitmill.__file__).parent


ARITHMETIC = sorted(path for ring in ("core", "cuda") for path in (ROOT / "cpp" / ring).glob("*.*"))


@pytest.mark.parametrize("path", ARITHMETIC, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_arithmetic_knows_no_torch_and_no_python(path: Path) -> None:
    forbidden = re.findall(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)", path.read_text())
    assert not forbidden
    assert path.suffix not in (".h", ".cpp", ".cu", ".cuh") or not re.search(
        r"\b(throw|try|catch|printf|cout)\b", _code(path)
    )


def test_only_bindings_know_torch_or_python() -> None:
    for path in (ROOT / "cpp").rglob("*.cpp"):
        if re.search(r"#\s*include\s*[<\"](torch/|pybind11/)", path.read_text()):
            assert path.parent.name == "bindings", path


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda path: path.name)
def test_ops_import_no_layers(path: Path) -> None:
    inside = {"ops", "_C"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level >= 2:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            assert {name.split(".")[0] for name in names} <= inside, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("bitmill") for alias in node.names)


def test_transformers_is_imported_by_integrations_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "integrations":
            assert not re.search(r"^\s*(import|from) transformers\b", path.read_text(), re.MULTILINE), path


def _code(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ImportError(f"{name} is hidden")
sys.meta_path.insert(0, Hide())
"""


def test_without_compiled_libraries_the_default_kernels_serve() -> None:
    code = (
        'HIDDEN = {"bitmill._ops_cpu", "bitmill._C"}'
        + HIDE
        + """
import torch, bitmill
from bitmill.nn import BinaryLinear
torch.manual_seed(0)
layer, x = BinaryLinear(70, 20).eval(), torch.randn(3, 70)
assert torch.equal(layer.pack()(x), layer(x))
print("result", layer.pack()(x).view(torch.int32).tolist())
assert torch.ops.bitmill.binary_linear.default is not None
assert bitmill.cli.main(["info"]) == 0
""".replace("import torch, bitmill\n", "import torch, bitmill, bitmill.cli\n")
    )
    output = _run(code)
    assert output.count("the compiled CPU kernels are not in use") == 1
    torch.manual_seed(0)
    layer, x = BinaryLinear(70, 20).eval(), torch.randn(3, 70)
    assert f"result {layer.pack()(x).view(torch.int32).tolist()}\n" in output, "every bit of the compiled result"
    assert "bitmill._ops_cpu is hidden" in output
    assert re.search(r"binary_linear +torch", output)


def test_the_cuda_library_is_loaded_only_by_a_torch_with_cuda() -> None:
    code = """
import importlib.machinery, importlib.util, torch
torch.version.cuda = CUDA
loaded = []
torch.ops.load_library = loaded.append
find = importlib.util.find_spec
spec = importlib.machinery.ModuleSpec("bitmill._ops_cuda", None, origin="/somewhere/_ops_cuda.so")
importlib.util.find_spec = lambda name, package=None: FOUND if name == "bitmill._ops_cuda" else find(name, package)
import bitmill.ops
from bitmill.ops import _library
print(sum("_ops_cuda" in path for path in loaded), _library.failure("_ops_cuda"))
"""

    def load(cuda: str, found: str) -> str:
        return _run(code.replace("CUDA", cuda, 1).replace("FOUND", found, 1)).strip()

    assert load("None", "spec") == "0 this torch was built without CUDA"
    assert load("'13.0'", "None") == "0 bitmill was built without CUDA"
    assert load("'13.0'", "spec") == "1 None"


@pytest.mark.skipif(importlib.util.find_spec("bitmill._ops_cuda") is None, reason="built without the CUDA ops")
def test_the_cuda_library_finds_the_stream_as_in_a_torch_with_cuda(tmp_path: Path) -> None:
    """torch's own libraries are loaded so that only those who need them by name see what is in them."""
    source, library = tmp_path / "a.cpp", tmp_path / "libtorch_cuda.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }')
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run(["c++", str(source), *flags], check=True)
    code = f"""
import ctypes, importlib.util, torch
import bitmill.ops
from bitmill.ops._library import has_compiled_kernel
assert not has_compiled_kernel("binary_matmul", "CUDA")
ctypes.CDLL({str(library)!r}, ctypes.RTLD_LOCAL)
torch.ops.load_library(importlib.util.find_spec("bitmill._ops_cuda").origin)
print(has_compiled_kernel("binary_matmul", "CUDA"))
"""
    assert _run(code).strip() == "True"


def test_without_torch_the_arrays_remain() -> None:
    code = (
        'HIDDEN = {"torch"}'
        + HIDE
        + """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
import numpy as np, bitmill
assert bitmill.arrays.bitpack(np.ones((2, 40), np.float32))[0].shape == (2, 2)
assert "torch" not in sys.modules
try:
    bitmill.quantize_
except AttributeError as error:
    assert "needs torch" in str(error)
else:
    raise AssertionError("quantize_ exists without torch")
"""
    )
    _run(code)
