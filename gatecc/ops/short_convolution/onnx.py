"""``gatecc::short_convolution`` in ONNX: one node that carries its state, or a convolution of the state and x joined.

ONNX Runtime's node is the slower one at hundreds of tokens (see `gatecc.codegen.onnx.lower.short_convolution`), and is
written where a state is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.opset import CAUSAL_CONVOLUTION
from gatecc.ops.registry import Target

Form = Callable[..., tuple[Tensor, Tensor]]


def _spelled(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, *, activation: str = "identity"
) -> tuple[Tensor, Tensor]:
    before, N = weight.size(2) - 1, x.size(1)
    inputs = F.pad(x, (0, 0, before, 0)) if state is None else torch.cat([state, x], 1)
    y = F.conv1d(inputs.transpose(1, 2), weight, bias, groups=weight.size(0)).transpose(1, 2)
    return F.silu(y) if activation == "silu" else y, inputs[:, N:]


def _node(operator: str, *, always: bool) -> Form:
    """One node, where a state is given or ``always``."""

    def form(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        state: Tensor | None = None,
        *,
        activation: str = "identity",
    ) -> tuple[Tensor, Tensor]:
        (B, N, C), before = x.shape, weight.size(2) - 1
        if x.dtype != torch.float32 or before < 1 or (state is None and not always):
            return _spelled(x, weight, bias, state, activation=activation)
        inputs = [x.transpose(1, 2), weight, bias, None if state is None else state.transpose(1, 2)]
        while inputs[-1] is None:
            inputs.pop()
        y, after = torch.onnx.ops.symbolic_multi_out(
            operator,
            inputs,
            attrs={"activation": "silu" if activation == "silu" else "none"},
            dtypes=(x.dtype, x.dtype),
            shapes=((B, C, N), (B, C, before)),
            version=1,
        )
        return y.transpose(1, 2), after.transpose(1, 2)

    return form


def _fixed(node: fx.Node) -> Iterator[Any]:
    """The channels: groups of the convolution."""
    yield node.all_input_nodes[0].meta["val"].size(2)


FORMS: dict[Target, Lowering] = {
    "portable": Lowering(_spelled, fixed=_fixed),
    "ort": Lowering(_node("com.microsoft::CausalConvWithState", always=False), fixed=_fixed),
    "opset27": Lowering(_node(CAUSAL_CONVOLUTION, always=True), fixed=_fixed),
}
