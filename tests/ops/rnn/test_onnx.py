"""RNN, GRU and LSTM layers in ONNX: every option of torch's layers, any length; and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gatecc
from gatecc.errors import ExportError
from gatecc.ops import registry
from gatecc.ops.rnn import rnn

pytest.importorskip("onnxruntime")
C, H = 3, 5


class Layers(nn.Module):
    """All options of torch's layers, from zero and from given states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(C, H, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * H, H, 2, bias=False, bidirectional=True)
        self.tanh = nn.RNN(2 * H, H, bidirectional=True, batch_first=True)
        self.relu = nn.RNN(2 * H, H, nonlinearity="relu")
        self.one = nn.LSTM(H, H)
        self.start = nn.Parameter(torch.randn(2, 4, 1, H))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, N, C)"""
        start = self.start.expand(-1, -1, x.shape[0], -1)
        y, (h, c) = self.lstm(x, (start[0], start[1]))
        z, last = self.gru(y.transpose(0, 1), start[0])
        t, _ = self.tanh(z.transpose(0, 1))
        r, end = self.relu(t.transpose(0, 1))
        weights = [self.one.get_parameter(f"{w}_l0") for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        s, state = rnn(r.transpose(0, 1), *weights, "lstm", start[:, 0])
        return y, h, c, z, last, t, r, end, s, state


def test_every_option_at_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    made = gatecc.export(model, tmp_path / "layers", (torch.randn(2, 4, C),))
    assert made.dims == ("batch", "sequence")
    assert {k: n for k, n in made.operators.items() if k in ("LSTM", "GRU", "RNN")} == {"LSTM": 3, "GRU": 2, "RNN": 2}
    assert len({c.sizes["sequence"] for c in made.compared}) == 4
    assert len({c.sizes["batch"] for c in made.compared}) == 2
    assert max(c.error for c in made.compared) <= 1e-5


class First(nn.Module):
    """The outputs of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C)"""
        return self.layer(x)[0]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (First(nn.LSTM(C, H, proj_size=2)), "proj_size"),
        (First(nn.GRU(C, H).double()), "float64"),
    ],
    ids=["projection", "float64"],
)
def test_what_the_nodes_lack_is_refused(model: nn.Module, found: str, tmp_path: Path) -> None:
    x = torch.randn(2, 4, C, dtype=next(model.parameters()).dtype)
    with pytest.raises(ExportError, match=found):
        gatecc.export(model.eval(), tmp_path / "refused", (x,))


@pytest.mark.parametrize("layer", [nn.LSTM(C, H, 2, bidirectional=True), nn.GRU(C, H, bias=False), nn.RNN(C, H)])
def test_flops_are_those_of_its_products(layer: Any) -> None:
    name = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[type(layer).__name__]
    x = torch.randn(4, 2, C)
    overload = getattr(torch.ops.aten, name).input
    formula: Any = registry.find(overload)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        layer.to("meta")(x.to("meta"))
    assert formula.flops(x.shape, None, [w.shape for w in layer.parameters()]) == counter.get_total_flops()
