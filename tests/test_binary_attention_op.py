# SPDX-License-Identifier: Apache-2.0
"""The op of binary attention: every kernel against the default kernel bit for bit, and both against the forms that
train; masks of every form, layouts, lengths, special values.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitmill import binarize, ops
from bitmill.ops._library import has_compiled_kernel
from bitmill.ops.binary_attention import RULES, _binary_attention_reference
from problems import LAYOUTS, assert_same_bits, on_every_machine

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEPS = tuple(torch.tensor(a) for a in (0.9, 1.1, 0.7, 0.06))
every_rule = pytest.mark.parametrize("rule", RULES)


pytestmark = pytest.mark.usefixtures("one_thread")


def steps_of(rule: str) -> tuple[Tensor | None, ...]:
    return STEPS if rule == "elastic" else (None,) * 4


def operands(*leading: int, n: int, m: int, d: int, e: int, zeros: str = "", dtype: torch.dtype = torch.float32):
    """q, k, v; those named in `zeros` hold exact zeros."""
    made = []
    for name, rows, columns in (("q", n, d), ("k", m, d), ("v", m, e)):
        t = torch.randn(*leading, rows, columns).to(dtype)
        made.append(t * (torch.rand(t.shape) < 0.9) if name in zeros else t)
    return made


def masks(*leading: int, n: int, m: int) -> dict[str, Tensor | None]:
    lengths = torch.randint(0, m + 1, (*leading[:1], *(1 for _ in leading)))
    padding = (torch.arange(m) < lengths).unsqueeze(-2)
    causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    bias = torch.randn(*leading[1:], n, m).masked_fill(torch.rand(*leading[1:], n, m) < 0.2, -torch.inf)
    return {
        "none": None,
        "padding": padding,
        "padding, expanded": padding.expand(*leading, n, m),
        "causal": causal,
        "padding and causal": padding & causal,
        "additive": torch.where(padding, 0.0, -1e4),
        "lowest": torch.where(padding & causal, 0.0, torch.finfo(torch.float32).min),
        "nothing": torch.zeros(n, m, dtype=torch.bool),
        "one column": torch.rand(n, 1) < 0.5,
        "bias": bias,
        "half bias": bias.bfloat16(),
    }


def assert_alike(*arguments: object, what: object = "") -> None:
    want = _binary_attention_reference(*arguments)
    for machine, got in on_every_machine(lambda: ops.binary_attention(*arguments)):
        assert_same_bits(got, want, f"binary_attention on {machine}, {what}")
        assert got.stride() == want.stride()


SHAPES = (  # n, m, d, e around the word (32), the vector (16) and the blocks of the kernels (4 rows, 64 channels)
    (1, 1, 1, 1),
    (5, 33, 15, 9),
    (33, 64, 32, 64),
    (6, 31, 64, 17),
    (4, 97, 65, 80),
    (2, 200, 100, 33),
    (3, 16, 130, 130),
    (0, 5, 7, 3),
    (5, 0, 7, 3),
    (5, 7, 7, 0),
)


@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_binary_attention_equals_default(rule: str, shape: tuple[int, int, int, int]) -> None:
    """Every mask with every place of exact zeros; scaling, zero policy and dtype take turns."""
    n, m, d, e = shape
    turns = itertools.cycle(itertools.product((None, 0.3), ("torch", "plus"), FLOATS))
    for (name, mask), zeros in itertools.product(masks(2, 3, n=n, m=m).items(), ("", "q", "k", "v", "qkv")):
        scaling, zero, dtype = next(itertools.islice(turns, 6, None))
        q, k, v = operands(2, 3, n=n, m=m, d=d, e=e, zeros=zeros, dtype=dtype)
        what = (shape, name, zeros, scaling, zero, dtype)
        assert_alike(q, k, v, mask, rule, scaling, 0.4, zero, *steps_of(rule), what=what)


@every_rule
def test_binary_attention_equals_the_training_form(rule: str) -> None:
    """The float form, which a gradient asks for; its float32 softmax is only near for the elastic rule."""
    attention = {
        "bool": binarize.bool_attention,
        "softmax_aware": binarize.softmax_aware_attention,
        "elastic": lambda q, k, v, mask, scaling: binarize.elastic_attention(q, k, v, *STEPS, mask, scaling),
    }[rule]
    for name, mask in masks(2, 3, n=20, m=41).items():
        for d, scaling in ((64, None), (64, 0.125), (33, None), (33, 33**-0.5)):
            q, k, v = operands(2, 3, n=20, m=41, d=d, e=16, zeros="qkv")
            trained = attention(q.requires_grad_(), k, v, mask, scaling)
            assert trained.grad_fn is not None
            with torch.no_grad():
                packed = attention(q, k, v, mask, scaling)
            assert packed.transpose(1, 2).is_contiguous(), "the op has another layout than the float form"
            assert torch.equal(trained, packed), (name, d, scaling)


def test_softmax_aware_ties_and_thresholds() -> None:
    """All distances between a row's scores, at every width: the integer gap is that of the float expression."""
    for d in (1, 2, 3, 7, 16, 33, 64, 80, 128, 192):
        k = torch.where(torch.arange(d) < torch.arange(d + 1)[:, None], 1.0, -1.0)  # dots -d, -d + 2, ..., d
        q, v = torch.ones(1, d), torch.eye(d + 1) * 2 - 1
        for beta, scaling in itertools.product((0.01, 0.25, 0.6065306597, 1.0), (None, d**-0.5, 0.25)):
            rows = k[: d + 1].flip(0)
            for keys in (rows, rows[1:], torch.cat((rows[:1], rows[:1], rows[2:]))):
                values = v[: len(keys), : len(keys)]
                assert_alike(
                    q, keys, values, None, "softmax_aware", scaling, beta, "torch", *(None,) * 4, what=(d, beta)
                )


def test_elastic_ties_under_a_bias() -> None:
    """Weights that are exactly the threshold's share of their sum, and those one rounding of alpha away from it."""
    for m in (2, 16, 64, 256):
        q, k, v = torch.ones(5, 32), torch.ones(m, 32), torch.randn(m, 16)
        bias = torch.arange(5.0)[:, None].expand(5, m)
        for alpha in (2 / m, 2 / m * (1 - 2**-23), 2 / m * (1 + 2**-23)):
            steps = (*STEPS[:3], torch.tensor(alpha))
            for mask in (bias, bias.clone(), bias.bfloat16().contiguous()):
                assert_alike(q, k, v, mask, "elastic", None, 0.25, "torch", *steps, what=(m, alpha))


@pytest.mark.parametrize("shape", SHAPES)
def test_value_addend_equals_default(shape: tuple[int, int, int, int]) -> None:
    """Every broadcast of it, every mask, and floats that lose bits in a sum."""
    n, m, d, e = shape
    whole = torch.randn(2, 3, m, 1) * 10.0 ** torch.randint(-6, 6, (2, 3, m, 1))
    strided = torch.randn(m, 3, 2).permute(2, 1, 0).unsqueeze(-1)
    addends = (whole, whole[:, :1], whole[0], whole[0, 0], whole[:, :, :1], strided)
    for (name, mask), addend in itertools.product(masks(2, 3, n=n, m=m).items(), addends):
        for zeros, dtype in (("", torch.float32), ("qkv", torch.bfloat16)):
            q, k, v = operands(2, 3, n=n, m=m, d=d, e=e, zeros=zeros, dtype=dtype)
            arguments = (q, k, v, mask, "elastic", None, 0.25, "torch", *STEPS, addend)
            assert_alike(*arguments, what=(shape, name, addend.shape, zeros))


@every_rule
def test_binary_attention_of_every_layout(rule: str) -> None:
    q, k, v = operands(n=37, m=45, d=33, e=20)
    want = ops.binary_attention(q, k, v, None, rule, None, 0.25, "torch", *steps_of(rule))
    for name, lay_out in LAYOUTS.items():
        got = ops.binary_attention(lay_out(q), lay_out(k), lay_out(v), None, rule, None, 0.25, "torch", *steps_of(rule))
        assert_same_bits(got, want, name)
    heads = [torch.randn(2, t, 3 * w).view(2, t, 3, w).transpose(1, 2) for t, w in ((37, 33), (45, 33), (45, 20))]
    mask = (torch.rand(45, 37) < 0.7).T
    assert_alike(*heads, mask, rule, None, 0.25, "torch", *steps_of(rule))
    assert_alike(*heads, torch.where(mask, 0.5, -1e9), rule, None, 0.25, "torch", *steps_of(rule))
    shared = [heads[0], heads[1][:, :1].expand(2, 3, 45, 33), heads[2][:1, :1].expand(2, 3, 45, 20)]
    assert_alike(*shared, mask, rule, None, 0.25, "torch", *steps_of(rule))


def test_heads_merge_without_a_copy() -> None:
    q, k, v = operands(2, 3, n=5, m=7, d=16, e=8)
    y = ops.binary_attention(q, k, v)
    assert y.transpose(1, 2).reshape(2, 5, 24).data_ptr() == y.data_ptr()


@every_rule
def test_long_sequences(rule: str) -> None:
    q, k, v = operands(1, n=4096, m=4096, d=32, e=16)
    causal = torch.ones(4096, 4096, dtype=torch.bool).tril()
    steps = (*STEPS[:3], torch.tensor(0.001)) if rule == "elastic" else (None,) * 4
    y = ops.binary_attention(q, k, v, causal, rule, None, 0.25, "torch", *steps)
    for rows in (slice(0, 4), slice(2000, 2004), slice(4092, 4096)):
        part = (q[:, rows], k, v, causal[rows], rule, None, 0.25, "torch", *steps)
        assert_same_bits(y[:, rows], _binary_attention_reference(*part), str(rows))


@every_rule
def test_special_values(rule: str) -> None:
    """NaN and infinities anywhere are signs like others, or no sign; in a bias they are what the formula says."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 3e38, -1.0])
    q, k, v = (special[torch.randint(8, (40, 40))] for _ in range(3))
    for mask in (None, special[torch.randint(8, (40, 40))], torch.randn(40, 40).mul(3e38)):
        for zero in ("torch", "plus"):
            assert_alike(q, k, v, mask, rule, None, 0.25, zero, *steps_of(rule), what=(mask is None, zero))
    steps = (torch.tensor(torch.nan), torch.tensor(torch.inf), torch.tensor(0.0), torch.tensor(-3.0))
    for order in itertools.permutations(steps) if rule == "elastic" else ():
        assert_alike(q, k, v, None, rule, None, 0.25, "torch", *order, what=order)


@every_rule
def test_opcheck(rule: str) -> None:
    assert has_compiled_kernel("binary_attention")
    q, k, v = operands(2, 3, n=5, m=7, d=33, e=9)
    for mask in (None, torch.rand(2, 1, 1, 7) < 0.8, torch.randn(5, 7)):
        arguments = (q, k, v, mask, rule, 0.2, 0.3, "plus", *steps_of(rule))
        torch.library.opcheck(torch.ops.bitmill.binary_attention.default, arguments)
        if rule == "elastic":
            arguments = (*arguments, torch.randn(2, 1, 7, 1))
            torch.library.opcheck(torch.ops.bitmill.binary_attention.default, arguments)


@every_rule
def test_compiles_without_a_graph_break(rule: str) -> None:
    @torch.compile(fullgraph=True)
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        y = ops.binary_attention(q, k, v, mask, rule, None, 0.25, "torch", *steps_of(rule))
        return y.transpose(1, 2).reshape(2, 5, -1) + 1

    q, k, v = operands(2, 3, n=5, m=7, d=33, e=9)
    mask = torch.rand(2, 1, 1, 7) < 0.8
    want = ops.binary_attention(q, k, v, mask, rule, None, 0.25, "torch", *steps_of(rule))
    assert torch.equal(run(q, k, v, mask), want.transpose(1, 2).reshape(2, 5, -1) + 1)


def test_errors() -> None:
    q, k, v = operands(2, 3, n=5, m=7, d=16, e=9)
    one = torch.tensor(1.0)
    elastic = {"rule": "elastic", "alpha_q": one, "alpha_k": one, "alpha_v": one, "alpha_a": one}
    wrong: tuple[tuple[dict[str, object], str], ...] = (
        ({"q": q[0, 0, 0]}, r"expected q \[..., n, d\], k \[..., m, d\] and v"),
        ({"q": q[..., :8]}, r"got \[2, 3, 5, 8\], \[2, 3, 7, 16\] and \[2, 3, 7, 9\]"),
        ({"q": q[..., :0], "k": k[..., :0]}, "with d > 0"),
        ({"q": q.double()}, "q must be float32, bfloat16 or float16, got float64"),
        ({"k": k.bfloat16()}, "k must be float32, got bfloat16"),
        ({"k": k[:1]}, r"k must have shape \[2, 3, 7, 16\], got \[1, 3, 7, 16\]"),
        ({"v": v[:, :, :6]}, r"v must have shape \[2, 3, 7, 9\], got \[2, 3, 6, 9\]"),
        ({"mask": torch.ones(5, 7, dtype=torch.int64)}, "mask must be bool, float32, bfloat16 or float16, got int64"),
        ({"mask": torch.ones(5, 6)}, r"mask must be broadcastable to \[2, 3, 5, 7\], got shape \[5, 6\]"),
        ({"mask": torch.ones(1, 2, 3, 5, 7)}, r"broadcastable to \[2, 3, 5, 7\], got shape \[1, 2, 3, 5, 7\]"),
        ({"rule": "softmax"}, 'rule must be "bool", "softmax_aware" or "elastic", got "softmax"'),
        ({"zero": "minus"}, 'zero must be "torch" or "plus", got "minus"'),
        ({"scaling": 0.0}, "scaling must be a positive, finite float32, got 0"),
        ({"scaling": float("nan")}, "scaling must be a positive, finite float32, got nan"),
        ({"scaling": 1e39}, "scaling must be a positive, finite float32, got 1e"),
        ({"beta": 1.5}, r"beta must lie in \(0, 1\], got 1.5"),
        ({"value_addend": torch.ones(7, 1)}, 'value_addend goes with rule "elastic", got "bool"'),
        ({**elastic, "value_addend": torch.ones(7, 9)}, r"broadcastable to \[2, 3, 7, 1\], got shape \[7, 9\]"),
        ({**elastic, "value_addend": torch.ones(7, 1).double()}, "value_addend must be float32, got float64"),
        ({"alpha_q": one}, 'alpha_q goes with rule "elastic" only, and is needed there; got rule "bool"'),
        ({"rule": "elastic", "alpha_q": one, "alpha_k": one, "alpha_v": one}, "alpha_a goes with rule"),
        ({"rule": "elastic", "alpha_q": torch.ones(1)}, r"alpha_q must have shape \[\], got \[1\]"),
    )
    for changes, message in wrong:
        arguments = {"q": q, "k": k, "v": v, **changes}
        with pytest.raises(ValueError, match=message):
            ops.binary_attention(**arguments)
        names = ("q", "k", "v", "mask", "rule", "scaling", "beta", "zero")
        names += ("alpha_q", "alpha_k", "alpha_v", "alpha_a", "value_addend")
        defaults = {"mask": None, "rule": "bool", "scaling": None, "beta": 0.25, "zero": "torch"}
        with pytest.raises(ValueError, match=message):
            _binary_attention_reference(*({**defaults, **arguments}.get(name) for name in names))
