"""What decoder, ONNX and cost know of RNN, GRU and LSTM layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.codegen.onnx.lowering import GRADIENT, Lowering
from gatecc.ir.ops import named
from gatecc.ops.registry import Carry, Operator, StepRule, Unfit, register
from gatecc.ops.rnn.onnx import ONE_LAYER, layers

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


def _flops(x: Sequence[int], hx: Any, params: Sequence[Sequence[int]], *_: Any) -> int:
    """Each matrix meets each token once, two operations per multiply-add."""
    return 2 * x[0] * x[1] * sum(math.prod(w) for w in params if len(w) == 2)


def _flops_of_one(x: Sequence[int], w_in: Sequence[int], w_state: Sequence[int], *_: Any) -> int:
    return _flops(x, None, [w_in, w_state])


def _enter(overload: OpOverload, onnx: Lowering, *carries: Carry) -> None:
    """A layer of torch; on packed sequences it is another overload, which has neither a step nor a form."""
    register(Operator(overload=overload, step=_step(*carries), onnx={"portable": onnx}, flops=_flops))


_enter(_aten.gru.input, layers("GRU"), Carry("hx", output=1))
_enter(_aten.rnn_tanh.input, layers("RNN", "Tanh"), Carry("hx", output=1))
_enter(_aten.rnn_relu.input, layers("RNN", "Relu"), Carry("hx", output=1))
_enter(_aten.lstm.input, layers("LSTM"), Carry("hx", output=1, item=0), Carry("hx", output=2, item=1))
register(
    Operator(
        overload=torch.ops.gatecc.rnn.default,
        step=StepRule(operand="x", axis=1, carries=(Carry("state", output=1),)),
        onnx={"portable": ONE_LAYER},
        flops=_flops_of_one,
    )
)
register(Operator(overload=torch.ops.gatecc.rnn_backward.default, onnx={"portable": GRADIENT}))
