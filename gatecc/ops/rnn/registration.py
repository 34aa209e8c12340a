"""What decoder, ONNX and cost know of RNN, GRU and LSTM layers."""

from __future__ import annotations

import torch
from torch import fx

from gatecc.ir.ops import named
from gatecc.ops.registry import Carry, Operator, StepRule, Unfit, register

_aten = torch.ops.aten


def _axis(node: fx.Node) -> int:
    return 1 if named(node, "batch_first") else 0


def _unfit(node: fx.Node) -> Unfit | None:
    if named(node, "bidirectional"):
        return Unfit("recurrent layers that read the tokens in both directions", "a decoder needs one: forwards")
    return None


def _step(*carries: Carry) -> StepRule:
    """States are (layers, B, H)."""
    return StepRule(operand="input", axis=_axis, carries=carries, unfit=_unfit)


for _overload in (_aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input):
    register(Operator(overload=_overload, step=_step(Carry("hx", output=1))))
register(Operator(overload=_aten.lstm.input, step=_step(Carry("hx", output=1, item=0), Carry("hx", output=2, item=1))))
