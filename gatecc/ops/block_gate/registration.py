"""What decoder, ONNX and cost know of the gates of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gatecc.codegen.onnx.lowering import GRADIENT, Lowering
from gatecc.ops.block_gate import operator as operator  # defines the operators
from gatecc.ops.block_gate import reference
from gatecc.ops.registry import Operator, StepRule, Unfit, register

Shape = Sequence[int]
_REASON = Unfit(
    "a gate that pools the queries of a block, of which all but the last come before it is known",
    "decode the model before the rewrite, or run its full forward",
)


def flops(q: Shape, k: Shape, query: Shape, key: Shape, keep: Shape | None, block: int, base: float = 0.0) -> int:
    """The projections of the pools, and the scores."""
    B, H, N, _ = q
    n, (_, width, rank) = reference.count(N, block), query
    return 2 * B * n * width * rank * (H + k[1]) + 2 * B * H * n * n * rank


def _peaks_flops(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * q[3]


_ops = torch.ops.gatecc
register(
    Operator(
        overload=_ops.block_logits.default,
        step=StepRule(operand="q", axis=2, unfit=lambda node: _REASON),
        onnx={"portable": Lowering(reference.logits)},
        flops=flops,
    )
)
register(Operator(overload=_ops.block_logits_backward.default, onnx={"portable": GRADIENT}))
register(
    Operator(
        overload=_ops.block_choice.default, onnx={"portable": Lowering(reference.choice)}, flops=lambda *_, **__: 0
    )
)
register(Operator(overload=_ops.block_peaks.default, onnx={"portable": GRADIENT}, flops=_peaks_flops))
