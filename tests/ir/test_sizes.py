"""Sizes as letters: b for the batch, n for tokens, numbers where they are fixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatecc.capture import capture
from gatecc.ir.printer import graph_text, window
from gatecc.ir.sizes import described_shape, renamed, shape_text, size_names


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 4)

    def forward(self, x: Tensor, positions: Tensor, other: Tensor) -> Tensor:
        return (self.proj(x) + positions[..., None].float()).flatten(0, 1) @ other.mT


def test_the_axes_of_inputs_name_sizes() -> None:
    program = capture(Net(), (torch.randn(2, 5, 8), torch.arange(5)[None], torch.randn(7, 4)))
    names = size_names(program.graph)
    assert set(names.values()) <= {"b", "n", "m", "k"}
    x, positions, other = program.placeholders
    assert described_shape(x) == "b n 8"
    assert described_shape(positions) == "1 n"
    assert described_shape(other) == "m 4"
    last = program.outputs[0]
    assert described_shape(last) == "b*n m"
    assert shape_text((), names) == "scalar"
    text = graph_text(program)
    assert "# b n 8" in text
    assert not any(symbol in text for symbol in names)
    assert renamed(f"({next(iter(names))}, 4) of it", names) == f"({next(iter(names.values()))}, 4) of it"


def test_the_graph_around_a_node_names_weights_as_the_user_does() -> None:
    program = capture(Net(), (torch.randn(2, 5, 8), torch.arange(5)[None], torch.randn(7, 4)))
    node = next(n for n in program.calls() if "linear" in str(n.target))
    text = window(node)
    marked = [row for row in text.splitlines() if row.startswith("> ")]
    assert len(marked) == 1
    assert "linear(%x, @proj.weight, @proj.bias)" in marked[0]
    assert "m_proj" not in text + "".join(n.name for n in program.graph.nodes)
