"""The compact text of a graph."""

from __future__ import annotations

import torch
from torch import nn

from gatecc.capture import capture
from gatecc.ir.printer import graph_text, operator_name
from tests.golden.reader import Reader

TEXT = """\
@act.weight                                                       # 8 8
%x = input                                                        # b n 8
%ids = input                                                      # b int64
%parts = split.Tensor(%x, 4, -1)
%left = getitem(%parts, 0)                                        # b n 4
%cat = cat([%left, %left], -1)                                    # b n 8
%soft = softmax.int(%cat, -1, float32)                            # b n 8
%y = linear(%soft, @act.weight, None)                             # b n 8 | act
%keys = scaled_dot_product_attention(%y, %y, %y, is_causal=True)  # b n 8
%mean = mean.dim(%ids, [0], dtype=float32)                        # scalar
return %keys, %mean"""


def test_text_is_read_back_as_it_is_printed() -> None:
    reader = Reader(TEXT)
    assert graph_text(reader.program, sizes=reader.sizes) == TEXT


def test_parts_of_a_graph_without_owners() -> None:
    reader = Reader(TEXT)
    text = graph_text(reader.program, sizes=reader.sizes, owners=False, keep=lambda node: node.name == "y")
    assert text == "%y = linear(%soft, @act.weight, None)  # b n 8"


def test_a_captured_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    rows = graph_text(capture(model, (torch.randn(2, 4),)), owners=True).splitlines()
    assert rows[0].split() == ["@0.weight", "#", "3", "4"]
    assert rows[-2].startswith("%relu = relu(%linear)")
    assert rows[-2].endswith("| 1")
    assert rows[-1] == "return %relu"


def test_names_of_operators() -> None:
    assert operator_name(torch.ops.aten.add.Tensor) == "add.Tensor"
    assert operator_name(torch.ops.aten.relu.default) == "relu"
    assert operator_name(torch.ops.gatecc.inject_bce.default) == "gatecc.inject_bce"
