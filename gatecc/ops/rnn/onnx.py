"""RNN, GRU and LSTM layers in ONNX: one node of the standard's RNN, GRU or LSTM for each layer, its length free.

ONNX has other orders of gates than torch, tokens before samples, and the directions of a layer on an axis of their own.
Half precision is computed in float32: no runtime has these nodes in float16 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError
from gatecc.ir.ops import named

_SINCE = 14  # of the opset; later ones add no more than dtypes
_GATES: dict[str, tuple[int, ...]] = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}  # ONNX's among torch's


def layers(kind: str, activation: str = "Tanh") -> Lowering:
    """The form of ``aten.gru.input`` and its like; ``kind`` is the name of the node."""

    def form(
        x: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        del dropout, train
        directions, count = 1 + bidirectional, 4 if has_biases else 2
        given = [state.float().split(directions) for state in ([hx] if isinstance(hx, Tensor) else hx)]
        y, last = (x.transpose(0, 1) if batch_first else x).float(), list[Sequence[Tensor]]()
        for layer in range(num_layers):
            at = layer * directions * count
            weights = [params[i : i + count] for i in range(at, at + directions * count, count)]
            y, *after = _node(kind, activation, y, weights, [state[layer] for state in given])
            last.append(after)
        y = y.transpose(0, 1) if batch_first else y
        return y.to(x.dtype), *(torch.cat(states).to(x.dtype) for states in zip(*last, strict=True))

    return Lowering(form, _check)


def _node(
    kind: str, activation: str, x: Tensor, weights: Sequence[Sequence[Tensor]], states: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One layer on x: (N, B, C), with weights for each direction and states (directions, B, H).

    -> (N, B, directions * H) and the states after the last token.
    """
    stacked = [torch.stack([_ordered(kind, w) for w in of_all]) for of_all in zip(*weights, strict=True)]
    bias = torch.cat(stacked[2:], 1) if len(stacked) > 2 else None
    (N, B, _), (directions, _, H) = x.shape, stacked[1].shape
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if directions > 1 else "forward"}
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    if kind == "RNN":
        attributes["activations"] = [activation] * directions
    y, *after = torch.onnx.ops.symbolic_multi_out(
        kind,
        [x, *stacked[:2], bias, None, *states],
        attrs=attributes,
        dtypes=[torch.float32] * (1 + len(states)),
        shapes=[(N, directions, B, H), *[(directions, B, H)] * len(states)],
        version=_SINCE,
    )
    return y.transpose(1, 2).flatten(2), *after


def _ordered(kind: str, w: Tensor) -> Tensor:
    """A weight or bias of torch with its gates in ONNX's order."""
    order, parts = _GATES[kind], w.float().chunk(len(_GATES[kind]))
    return torch.cat([parts[i] for i in order]) if len(order) > 1 else parts[0]


def one_layer(
    x: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    cell: str,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The form of ``gatecc::rnn``."""
    states = 2 if cell == "lstm" else 1
    start = x.new_zeros(states, x.size(0), w_state.size(1)) if state is None else state
    weights, given = [(w_in, w_state, b_in, b_state)], start.float().split(1)
    y, *last = _node(cell.upper(), "Tanh", x.float().transpose(0, 1), weights, given)
    return y.transpose(0, 1).to(x.dtype), torch.cat(last).to(x.dtype)


def check_dtype(node: fx.Node) -> None:
    """Raise ExportError for float64, which no runtime has."""
    if node.all_input_nodes[0].meta["val"].dtype == torch.float64:
        raise _lacking(node, "float64", "export model.float()")


def _check(node: fx.Node) -> None:
    check_dtype(node)
    directions = 1 + named(node, "bidirectional")
    if len(named(node, "params")) != (4 if named(node, "has_biases") else 2) * named(node, "num_layers") * directions:
        raise _lacking(node, "projections of hidden states (proj_size)", "write the projection as a linear layer")
    if named(node, "train") and named(node, "dropout"):
        raise _lacking(node, "dropout between layers in training", "put the layer in eval mode")


def _lacking(node: fx.Node, found: str, do: str) -> ExportError:
    return ExportError("RNN, GRU and LSTM nodes of ONNX do not have this", where=place(node), found=found, do=do)


ONE_LAYER = Lowering(one_layer, check_dtype)
