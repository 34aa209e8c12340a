"""The recurrence of linear attention in ONNX: a node of ONNX Runtime, one of opset 27, or operators of any opset.

Each takes operands whose heads are all there, in float32: q, k: (B, H, N, Dk), v: (B, H, N, E), decay: (B, H, N, Dk or
1), beta: (B, H, N, 1), state: (B, H, Dk, E), and gives o: (B, H, N, E), times the scale, and the state after the last
token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gatecc.codegen.onnx.opset import LINEAR_ATTENTION
from gatecc.codegen.onnx.spelled import spelled
from gatecc.ops.linear_attention.arguments import Rule
from gatecc.ops.linear_attention.onnx_lines import by_chunk, by_chunk_or_step, by_token

Recurrence = Callable[
    [Rule, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]
]


def node(operator: str) -> Recurrence:
    """The recurrence as one node, with tokens before heads, heads and channels on one axis."""

    def call(
        rule: Rule,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        if scale == 0.0:  # the node takes it for 1 / sqrt(Dk)
            q, scale = q * scale, 1.0
        (B, H, N, Dk), E = q.shape, v.size(3)
        inputs = [_packed(q), _packed(k), _packed(v), state, _packed(decay), _packed(beta)]
        while inputs[-1] is None:
            inputs.pop()
        o, final = torch.onnx.ops.symbolic_multi_out(
            operator,
            inputs,
            attrs={"q_num_heads": H, "kv_num_heads": H, "update_rule": rule, "scale": scale},
            dtypes=(torch.float32, torch.float32),
            shapes=((B, N, H * E), (B, H, Dk, E)),
            version=1,
        )
        return o.unflatten(-1, (H, E)).transpose(1, 2), final

    return call


def _packed(x: Tensor | None) -> Tensor | None:
    """(B, H, N, D) -> (B, N, H * D)."""
    return None if x is None else x.transpose(1, 2).flatten(2)


def spelled_out(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The recurrence in operators that opset 18 has: chunk by chunk, token by token for the delta rules."""
    (B, H, N, Dk), E = q.shape, v.size(3)
    start = q.new_zeros(B, H, Dk, E) if state is None else state
    given = {"state": start, "q": q * scale, "k": k, "v": v, "decay": decay, "beta": beta}
    widths = Dk, E, 0 if decay is None else decay.size(3)
    chunks = by_chunk if state is None else by_chunk_or_step
    lines = by_token("gated" in rule) if beta is not None else chunks(*widths)
    inputs = {name: x for name, x in given.items() if x is not None}
    o, final = spelled(lines, inputs, {"o": (B, H, N, E), "final": (B, H, Dk, E)})
    return o, final


ORT, OPSET27 = node("com.microsoft::LinearAttention"), node(LINEAR_ATTENTION)
