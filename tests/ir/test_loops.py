"""Recurrent layers leave the length of a graph free, and are traced as ever where their insides are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from gatecc.capture import capture
from gatecc.ir.loops import free_lengths
from gatecc.ir.ops import opname
from gatecc.ir.sizes import symbols

X = torch.randn(2, 7, 4)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "layers",
    [
        nn.GRU(4, 6, batch_first=True),
        nn.LSTM(4, 6, num_layers=2, batch_first=True, proj_size=3),
        nn.RNN(4, 6, batch_first=True, bidirectional=True),
        nn.RNN(4, 6, nonlinearity="relu", batch_first=True),
    ],
    ids=["gru", "lstm", "rnn", "relu"],
)
def test_one_node_whose_shapes_hold_at_any_length(layers: Any) -> None:
    program = capture(layers, (X,))
    assert program.guards == ["L['leaves'][0].size()[2] == 4"], "the channels alone"
    (node,) = [n for n in program.graph.nodes if opname(n) in ("gru", "lstm", "rnn_tanh", "rnn_relu")]
    length = symbols(program.placeholders[0].meta["val"].shape[1])
    assert symbols(node.meta["val"][0].shape[1]) == length != set()
    assert all(not symbols(size) & length for state in node.meta["val"][1:] for size in state.shape)
    expected: list[Tensor] = pytree.tree_leaves(layers(X))
    assert [y.dim() for y in expected] == [y.dim() for y in node.meta["val"]]
    assert [y.shape[-1] for y in expected] == [y.shape[-1] for y in node.meta["val"]]


def test_numbers_and_traces_are_as_ever() -> None:
    layer = nn.GRU(4, 6, batch_first=True)
    weights = [weight.detach() for weight in layer.parameters()]

    def loop(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.gru(x, x.new_zeros(1, 2, 6), list(weights), True, 1, 0.0, False, False, True)[0]

    before = dict(torch.ops.aten.gru.input.py_kernels)
    expected, _ = layer(X)
    with free_lengths():
        assert torch.equal(layer(X)[0], expected)
        traced = make_fx(loop, tracing_mode="fake")(X, *weights)
    assert torch.allclose(traced(X + 1, *weights), layer(X + 1)[0], atol=1e-6)
    assert torch.ops.aten.gru.input.py_kernels == before
