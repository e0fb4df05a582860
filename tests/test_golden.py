# SPDX-License-Identifier: Apache-2.0
"""Golden vectors: numbers recorded from the published implementations, compared with the library's public API.

`pytest tests/test_golden.py --golden DIR` takes another folder of vectors of any shapes. Each file is one case; a case
without a comparison is listed as not covered, never as passed. Definitions and tolerances: tests/golden/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitmill import BinaryConfig, binarize, ops
from bitmill.nn import BinaryEmbedding, BinaryLinear


class Case:
    """Arrays of one file; `case["out_y"]` is a tensor."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path, allow_pickle=False))

    def __getitem__(self, name: str) -> Tensor:
        array = self.arrays[name]
        unsigned = {np.dtype(np.uint32): np.int32, np.dtype(np.uint16): np.int16}.get(array.dtype)
        return torch.from_numpy(np.array(array if unsigned is None else array.view(unsigned)))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def number(self, name: str) -> float:
        return self.arrays[name].item()


def assert_exact(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan()) if want.is_floating_point() else got == want
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {want.numel()} differ"


def assert_relative(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """max |got - want| <= tolerance max |want|; where want is exactly 0 by a mask, see assert_zeros."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    error, limit = (got - want).abs().max().item(), tolerance * want.abs().max().item()
    assert error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}"


def assert_zeros(got: Tensor, want: Tensor, what: str) -> None:
    """Entries that a closed gradient window sets to 0 are exactly 0."""
    assert bool((got[want == 0] == 0).all()), f"{what}: an entry that must be exactly 0 is not"


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def linear_layer(case: Case, config: BinaryConfig) -> BinaryLinear:
    weight = case["par_weight"]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], "par_bias" in case)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if "par_bias" in case:
            linear.bias.copy_(case["par_bias"])
    return BinaryLinear.from_linear(linear, config)


def backward(layer: torch.nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    x = leaf(case["in_x"])
    y = layer(x)
    y.backward(case["gout_y"])
    return x, y


def check_packed(layer: BinaryLinear, case: Case, y: Tensor, gradient: bool = True) -> None:
    """The packed form of the same layer gives the same floats, bit for bit, and the same gradient to x."""
    layer.eval()
    packed = layer.pack()
    x = leaf(case["in_x"])
    got = packed(x)
    assert_exact(got, y.detach(), "packed output")
    got.backward(case["gout_y"])
    if gradient:
        assert_relative(x.grad, case["grad_x"], 2e-5, "packed grad_x")


def bibert_quantizers(case: Case) -> None:
    for name, function in (("sign", binarize.sign), ("bool", binarize.boolean)):
        x = leaf(case["in_x"])
        y = function(x, "clip_open")
        assert_exact(y, case[f"out_{name}"], name)
        y.backward(case["gout_y"])
        assert_exact(x.grad, case[f"grad_x_{name}"], f"gradient of {name}")


def bibert_linear(case: Case) -> None:
    layer = linear_layer(case, BinaryConfig("bibert"))
    x, y = backward(layer, case)
    weight = binarize.binarize_weight(layer.weight.detach(), binarize.method("bibert").weight)
    assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(weight.scale.flatten(), case["out_scale"], 1e-6, "scale")
    assert_exact(torch.sign(case["in_x"]).to(torch.int8), case["out_xsign"], "signs of x")
    sign, nonzero, _, _ = ops.bitpack(case["in_x"])
    n, k = layer.weight.shape
    planes = [ops.tile_pack(plane.to(torch.uint8), 1) for plane in (weight.signs > 0, weight.signs != 0)]
    assert_exact(ops.binary_matmul(sign, planes[0], n, k, nonzero, planes[1]), case["out_dot"], "dot")
    assert bool(((y - case["out_y"]).abs() <= 1e-4 * case["out_scale"]).all()), "y"
    for name, got in (("x", x.grad), ("weight", layer.weight.grad), ("bias", layer.bias.grad)):
        assert_relative(got, case[f"grad_{name}"], 1e-5, f"grad_{name}")
    assert_zeros(x.grad, case["grad_x"], "grad_x")
    check_packed(layer, case, y)


def embedding_case(case: Case, method: str, tolerance: float, gradient: float) -> None:
    table = torch.nn.Embedding(*case["par_weight"].shape, padding_idx=0)
    with torch.no_grad():
        table.weight.copy_(case["par_weight"])
    layer = BinaryEmbedding.from_embedding(table, BinaryConfig(method))
    y = layer(case["in_ids"])
    assert_relative(y, case["out_y"], tolerance, "y")
    y.backward(case["gout_y"])
    assert_relative(layer.weight.grad, case["grad_weight"], gradient, "grad_weight")
    assert_exact(layer.pack()(case["in_ids"]), y.detach(), "packed output")


def bit_weight(case: Case) -> None:
    method = binarize.method("bit")
    weight = leaf(case["in_weight"])
    result = binarize.binarize_weight(weight, method.weight if case.number("hp_layerwise") else method.embedding)
    assert_exact(result.signs.to(torch.int8), case["out_sign"], "signs")
    want = case["out_scale"]
    assert_relative(result.scale if want.dim() else result.scale[0, 0], want, 2e-5, "scale")
    assert_relative(result.value, case["out_y"], 2e-5, "value")
    result.value.backward(case["gout_y"])
    assert_exact(weight.grad, case["grad_weight"], "gradient")


def bit_elastic(case: Case, signed: bool) -> None:
    bits = int(case.number("hp_bits"))
    x, alpha = leaf(case["in_x"]), leaf(case["hp_alpha"].reshape(()))
    y = binarize.elastic(x, alpha, bits, signed)
    assert_relative(y, case["out_y"], 1e-6, "y")
    offset = x.min() if bits > 1 and not signed else 0
    assert_exact(((y - offset) / alpha).round().to(torch.int8), case["out_code"], "code")
    y.backward(case["gout_y"])
    assert_exact(x.grad, case["grad_x"], "grad_x")
    assert_relative(alpha.grad, case["grad_alpha"].reshape(()), 1e-5, "grad_alpha")
    first = binarize.elastic_alpha(case["in_x"], bits, signed)
    assert_relative(first, case["out_alpha_init"].reshape(()), 1e-5, "first alpha")


def bit_linear(case: Case) -> None:
    bits, signed = int(case.number("hp_bits")), bool(case.number("hp_symmetric"))
    layer = linear_layer(case, BinaryConfig("bit", act_bits=bits, signed=signed))
    with torch.no_grad():
        layer.shift.copy_(case["par_move"])
    layer(case["in_x"])  # the first training batch sets alpha
    assert_relative(layer.alpha.detach(), case["out_alpha_init"].reshape(()), 1e-5, "first alpha")
    with torch.no_grad():
        layer.alpha.copy_(case["hp_alpha"])
    x, y = backward(layer, case)
    weight = binarize.binarize_weight(layer.weight.detach(), binarize.method("bit").weight)
    assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(weight.scale[0, 0], case["out_wscale"].reshape(()), 2e-5, "scale")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients = {
        "x": x.grad,
        "weight": layer.weight.grad,
        "bias": layer.bias.grad,
        "move": layer.shift.grad,
        "alpha": layer.alpha.grad,
    }
    for name, got in gradients.items():
        assert_relative(got, case[f"grad_{name}"].reshape(got.shape), 2e-5, f"grad_{name}")
    if bits == 1:
        check_packed(layer, case, y)
    else:
        layer.eval()
        assert_relative(layer.pack()(case["in_x"]), case["out_y"], 2e-5, "packed output")


def bivit_linear(case: Case, method: str, act_bits: int) -> None:
    layer = linear_layer(case, BinaryConfig(method, act_bits=act_bits))
    if "par_scale" in case:
        with torch.no_grad():
            layer.weight_scale.copy_(case["par_scale"])
    x, y = backward(layer, case)
    weight = binarize.binarize_weight(layer.weight.detach(), binarize.method("bivit").weight)
    assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    if "grad_scale" in case:
        gradients["scale"] = layer.weight_scale.grad
    for name, got in gradients.items():
        assert_relative(got, case[f"grad_{name}"], 2e-5, f"grad_{name}")
    if act_bits == 1:
        assert_zeros(x.grad, case["grad_x"], "grad_x")
        check_packed(layer, case, y)
    else:
        layer.eval()
        assert_relative(layer.pack()(case["in_x"]), case["out_y"], 2e-5, "packed output")


def registry_linear(case: Case, method: str, **parameters: str) -> None:
    """A row of the registry; `parameters` names the file's learned parameters: ours = theirs."""
    layer = linear_layer(case, BinaryConfig(method))
    with torch.no_grad():
        for ours, theirs in parameters.items():
            parameter = layer.get_parameter(ours)
            parameter.copy_(case[f"par_{theirs}"].reshape(parameter.shape))
    x, y = backward(layer, case)
    if "out_wsign" in case:
        weight = binarize.binarize_weight(layer.weight.detach(), binarize.method(method).weight)
        assert_exact(weight.signs.to(torch.int8), case["out_wsign"], "signs")
    assert_relative(y, case["out_y"], 2e-5, "y")
    gradients = {"x": x.grad, "weight": layer.weight.grad}
    gradients |= {} if layer.bias is None else {"bias": layer.bias.grad}
    gradients |= {theirs: layer.get_parameter(ours).grad for ours, theirs in parameters.items()}
    for name, got in gradients.items():
        assert_relative(got.reshape(case[f"grad_{name}"].shape), case[f"grad_{name}"], 2e-5, f"grad_{name}")
        assert_zeros(got.reshape(case[f"grad_{name}"].shape), case[f"grad_{name}"], f"grad_{name}")
    check_packed(layer, case, y, gradient=method != "react_bibench")  # its packed form knows no shift


def named_linear(case: Case, name: str, config: BinaryConfig, **parameters: str) -> BinaryLinear:
    """The layer whose arrays are par_<name>_weight, par_<name>_bias, ..."""
    weight = case[f"par_{name}_weight"]
    layer = BinaryLinear(weight.shape[1], weight.shape[0], config=config)
    with torch.no_grad():
        for ours, theirs in {"weight": "weight", "bias": "bias", **parameters}.items():
            parameter = layer.get_parameter(ours)
            parameter.copy_(case[f"par_{name}_{theirs}"].reshape(parameter.shape))
    if layer.alpha_ready is not None:
        layer.alpha_ready.fill_(True)
    return layer


def heads_of(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merged(t: Tensor) -> Tensor:
    return t.transpose(-3, -2).flatten(-2)


def assert_gradients_of(case: Case, tolerance: float, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        want = case[f"grad_{name}"]
        assert_relative(t.grad.reshape(want.shape), want, tolerance, f"grad_{name}")


def bibert_attention(case: Case) -> None:
    heads = int(case.number("hp_heads"))
    layers = {name: named_linear(case, name, BinaryConfig("bibert")) for name in "qkv"}
    x, mask = leaf(case["in_x"]), case["in_mask"][:, None, None]
    q, k, v = (heads_of(layer(x), heads) for layer in layers.values())
    for name, t in zip("qkv", (q, k, v), strict=True):
        assert_relative(t, case[f"out_{name}"], 1e-4, name)
    context = merged(binarize.bool_attention(q, k, v, mask))
    assert_exact(context.detach(), case["out_ctx"], "context")
    keep = case["in_keep"].bool()[:, None, None]
    assert_exact(merged(binarize.bool_attention(q, k, v, keep)).detach(), case["out_ctx"], "context, boolean mask")
    similar = [t @ t.mT / t.shape[-1] ** 0.5 for t in (q, k, v)]
    for name, t in zip("qkv", similar, strict=True):
        assert_relative(t, case[f"out_s{name}"], 1e-5, f"similarity of {name}")
    torch.autograd.backward([context, *similar], [case["gout_ctx"], *(case[f"gout_s{name}"] for name in "qkv")])
    parameters = {f"{name}_{p}": layer.get_parameter(p) for name, layer in layers.items() for p in ("weight", "bias")}
    assert_gradients_of(case, 2e-5, x=x, **parameters)


def bit_attention(case: Case) -> None:
    heads = int(case.number("hp_heads"))
    learned = {"shift": "move", "alpha": "alpha"}
    layers = {name: named_linear(case, name, BinaryConfig("bit"), **learned) for name in "qkv"}
    steps = {f"alpha_{name}": leaf(case[f"par_alpha_{name}"].reshape(())) for name in "qkva"}
    x = leaf(case["in_x"])
    q, k, v = (heads_of(layer(x), heads) for layer in layers.values())
    context = binarize.elastic_attention(q, k, v, **steps, mask=case["in_mask"][:, None, None])
    whole = context.detach() / (steps["alpha_a"] * steps["alpha_v"]).detach()
    assert_exact(whole.round().int(), case["out_ctx_int"], "context as integers")
    assert_relative(merged(context), case["out_ctx"], 2e-5, "context")
    merged(context).backward(case["gout_ctx"])
    places = {"weight": "weight", "bias": "bias", **learned}
    parameters = {
        f"{name}_{theirs}": layer.get_parameter(ours)
        for name, layer in layers.items()
        for ours, theirs in places.items()
    }
    assert_gradients_of(case, 5e-5, x=x, **parameters, **steps)


def bivit_sab_mask(case: Case) -> None:
    logits = leaf(case["in_logits"])
    bits = binarize.softmax_aware_map(logits)
    assert_exact(bits.detach().to(torch.uint8), case["out_bits"], "bits")
    assert_exact(binarize.softmax_aware_map(logits.detach()).to(torch.uint8), case["out_bits"], "bits, no gradient")
    bits.backward(case["gout_bits"])
    assert_relative(logits.grad, case["grad_logits"], 2e-5, "grad_logits")


def bivit_attention(case: Case, method: str) -> None:
    heads, learned = int(case.number("hp_heads")), {"weight_scale": "scale"} if method == "bivit_pws" else {}
    qkv, proj = (named_linear(case, name, BinaryConfig(method), **learned) for name in ("qkv", "proj"))
    attention = binarize.softmax_aware_attention if learned else binarize.bool_attention
    x = leaf(case["in_x"])
    q, k, v = (heads_of(t, heads) for t in qkv(x).chunk(3, -1))
    z = merged(attention(q, k, v))
    assert_exact(z.detach().to(torch.int16), case["out_z"], "z")
    y = proj(z)
    assert_relative(y, case["out_y"], 2e-5, "y")
    y.backward(case["gout_y"])
    places = {"weight": "weight", "bias": "bias", **learned}
    parameters = {
        f"{name}_{theirs}": layer.get_parameter(ours)
        for name, layer in (("qkv", qkv), ("proj", proj))
        for ours, theirs in places.items()
    }
    assert_gradients_of(case, 5e-5, x=x, **parameters)


def fp4_cast_e2m1(case: Case) -> None:
    x = case["in_f32_bits"].view(torch.float32)
    if "out_table" in case:
        dtype = torch.float16 if case.number("hp_type") else torch.bfloat16
        every = torch.arange(65536).to(torch.int16).view(dtype)
        assert_exact(_codes(ops.fp4_cast(every)), case["out_table"], "codes of every 16-bit pattern")
    assert_exact(_codes(ops.fp4_cast(x), x.numel()), case["out_f32_cuda"], "codes of float32")
    numbers = ~x.isnan()
    assert_exact(_codes(ops.fp4_cast(x), x.numel())[numbers], case["out_f32_mldtypes"][numbers], "codes, ml_dtypes")
    assert_exact(_codes(ops.fp4_cast(x), x.numel())[numbers], case["out_f32_torchao"][numbers], "codes, torchao")
    values = ops.fp4_uncast(torch.arange(0, 256, 17, dtype=torch.uint8), 32)[::2]
    if "out_values" in case:
        assert_exact(values, case["out_values"], "values")
    if "out_values_half_bits" in case:
        assert_exact(values.half().view(torch.int16), case["out_values_half_bits"], "float16 values")


def _codes(packed: Tensor, k: int | None = None) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., : k or 2 * packed.shape[-1]]


def fp4_pack(case: Case) -> None:
    packed = ops.fp4_cast(case["in_x"])
    assert_exact(packed, case["out_packed"], "bytes")
    assert_exact(_codes(packed), case["out_codes"], "codes")


def fp4_e8m0(case: Case) -> None:
    x = case["in_f32_bits"].view(torch.float32)
    assert_exact(ops.e8m0_cast(x, "down"), case["out_rz"], "toward zero")
    assert_exact(ops.e8m0_cast(x, "up"), case["out_rp"], "toward infinity")
    every = ops.e8m0_uncast(torch.arange(256, dtype=torch.uint8))
    assert_exact(every, case["out_decode_bf16_bits"].view(torch.bfloat16).float(), "values")


def fp4_mxfp4(case: Case) -> None:
    x = case["in_x_bits"].view(torch.float32)
    rules = ("floor", "rceil", "ceil", "even")
    for i, mode in enumerate(case["hp_modes"].tolist()):
        packed, scale = ops.mxfp4_quantize(x, rules[mode])
        assert_exact(scale, case["out_scale"][i], f"scales of {rules[mode]}")
        valid = (scale != 255).repeat_interleave(16, -1)
        assert_exact(packed[valid], case["out_packed"][i][valid], f"bytes of {rules[mode]}")
        values = ops.mxfp4_dequantize(packed, scale, x.shape[-1])
        assert_exact(values, case["out_dequant"][i], f"values of {rules[mode]}")


COMPARISONS: dict[str, Callable[[Case], None]] = {
    "bibert/quantizers": bibert_quantizers,
    "bibert/linear": bibert_linear,
    "bibert/embedding": lambda case: embedding_case(case, "bibert", 1e-6, 1e-5),
    "bit/weight": bit_weight,
    "bit/elastic-signed": lambda case: bit_elastic(case, True),
    "bit/elastic-unsigned": lambda case: bit_elastic(case, False),
    "bit/linear": bit_linear,
    "bit/embedding": lambda case: embedding_case(case, "bit", 1e-5, 1e-6),
    "bibert/attention": bibert_attention,
    "bit/attention": bit_attention,
    "bivit/sab-mask": bivit_sab_mask,
    "bivit/sab-attention": lambda case: bivit_attention(case, "bivit_pws"),
    "bivit/bool-attention": lambda case: bivit_attention(case, "bivit"),
    "bivit/linear-w1a1": lambda case: bivit_linear(case, "bivit", 1),
    "bivit/linear-pws": lambda case: bivit_linear(case, "bivit_pws", 1),
    "bivit/linear-w1a32": lambda case: bivit_linear(case, "bivit", 32),
    "bivit/linear-pws-w1a32": lambda case: bivit_linear(case, "bivit_pws", 32),
    "bibench/bnn-linear": lambda case: registry_linear(case, "bnn"),
    "bibench/xnor-linear": lambda case: registry_linear(case, "xnor"),
    "bibench/dorefa-linear": lambda case: registry_linear(case, "dorefa"),
    "bibench/bireal-linear": lambda case: registry_linear(case, "bireal"),
    "bibench/xnorplusplus-linear": lambda case: registry_linear(case, "xnorpp", weight_scale="o_scale"),
    "bibench/react-linear": lambda case: registry_linear(case, "react_bibench", shift="threshold"),
    "fp4/cast-e2m1": fp4_cast_e2m1,
    "fp4/pack": fp4_pack,
    "fp4/e8m0": fp4_e8m0,
    "fp4/mxfp4": fp4_mxfp4,
}


def case_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem.rpartition('-')[0]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden"))
    files = sorted(folder.glob("*/*.npz"))
    if "covered_file" in metafunc.fixturenames:
        covered = [path for path in files if case_of(path) in COMPARISONS]
        metafunc.parametrize("covered_file", covered, ids=[f"{p.parent.name}/{p.stem}" for p in covered])


def test_golden(covered_file: Path) -> None:
    COMPARISONS[case_of(covered_file)](Case(covered_file))


def test_golden_folder_has_vectors(golden_folder: Path) -> None:
    assert any(case_of(path) in COMPARISONS for path in golden_folder.glob("*/*.npz")), f"no vectors in {golden_folder}"


def test_golden_cases_not_covered(golden_folder: Path) -> None:
    """One counted line with the names of the cases that have no comparison yet."""
    missing = sorted({case_of(path) for path in golden_folder.glob("*/*.npz")} - set(COMPARISONS))
    if missing:
        pytest.skip(f"{len(missing)} golden cases have no comparison yet: {', '.join(missing)}")
