# SPDX-License-Identifier: Apache-2.0
"""BinaryLinear and its packed form under torch.compile and torch.export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitmill import BinaryConfig
from nn_binary_inputs import K, assert_agree, assert_close, every_graph, inputs, name, trained
from problems import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def train_step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one batch, for x and for every parameter."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def check_compiled(layer: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = inputs(6, K)
    for got, want in zip(train_step(compiled, x), train_step(plain, x), strict=True):
        assert_close(got, want)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (6, 11):
            x = inputs(batch, K)
            for got, want in zip(train_step(compiled, x), train_step(plain, x), strict=True):
                assert_close(got, want)


@every_graph
def test_layers_compile_without_graph_break_or_recompile(config: BinaryConfig) -> None:
    layer = trained(config)
    check_compiled(layer.train(), "aot_eager")
    check_compiled(layer.eval().pack(), "eager")  # test_layers_export traces what is inside


@pytest.mark.parametrize("config", [BinaryConfig("xnor", group_size=32), BinaryConfig("bit")], ids=name)
def test_layers_compile_with_inductor(config: BinaryConfig) -> None:
    layer = trained(config)
    check_compiled(layer.train(), "inductor")
    check_compiled(layer.eval().pack(), "inductor")


def test_compiled_inference_does_not_recompile() -> None:
    torch._dynamo.reset()
    packed = trained(BinaryConfig()).pack()
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        assert_same_bits(compiled(x := inputs(4, K)), packed(x))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same_bits(compiled(x := inputs(9, K)), packed(x))


@every_graph
def test_layers_export(config: BinaryConfig) -> None:
    layer = trained(config)
    for module in (layer, layer.pack()):
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(module, (inputs(4, K),), dynamic_shapes=({0: batch},))
        for m in (4, 9):
            x = inputs(m, K)
            assert_agree(program.module()(x), module(x), config)
    calls = [node.target for node in program.graph.nodes if "bitmill" in str(node.target)]
    planes = config.weight_rule.planes if module.kernel == "binary_weight_linear" else 1
    assert [str(call).split(".")[1] for call in calls] == [module.kernel] * planes, "the op stays one node"
