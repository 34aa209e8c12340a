"""What decoder, ONNX and cost know of attention to chosen blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from gatecc.codegen.onnx.lowering import GRADIENT, Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError
from gatecc.ir.ops import named
from gatecc.ops.block_gate.reference import POOLS, count
from gatecc.ops.chosen_blocks import operator as operator  # defines the operators
from gatecc.ops.chosen_blocks.cache import one_token
from gatecc.ops.chosen_blocks.formula import masked
from gatecc.ops.registry import Carry, Operator, StepRule, register

Shape = Sequence[int]


def _flops(
    q: Shape, k: Shape, v: Shape, q_raw: Shape, k_raw: Shape, query: Shape, *_: Any, block: int, **options: Any
) -> int:
    """The gate's projections and scores, and q k^T and p v of all pairs, which the full forward masks."""
    B, H, N, D = q
    K, width, rank = query
    n = count(N, block)
    gate = 2 * B * K * rank * (N * width + n * POOLS * width + N * n)
    return gate + 2 * B * H * N * k[2] * (D + v[3])


def _loss_flops(q_raw: Shape, k_raw: Shape, q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def _one_token(node: fx.Node) -> Callable[..., Any]:
    return one_token


def _check(node: fx.Node) -> None:
    if named(node, "keys") is not None:
        raise ExportError(
            "a cache of chosen blocks has no ONNX form",
            where=place(node),
            found="pools of keys that are kept from step to step",
            do="export the full forward (decode=False), or the decoder of the model before the rewrite",
        )


_CARRIES = (
    Carry("keys", 1, ragged=True),
    Carry("values", 2, ragged=True),
    Carry("features", 3, ragged=True),
    Carry("running", 4),
    Carry("valid", 5, ragged=True),
    Carry("length", 6, ragged=True),
)
_ops = torch.ops.gatecc
register(
    Operator(
        overload=_ops.chosen_blocks.default,
        step=StepRule(operand="k", axis=2, carries=_CARRIES, one_token=_one_token),
        onnx={"portable": Lowering(masked, _check)},
        flops=_flops,
        masked=masked,
    )
)
register(Operator(overload=_ops.chosen_loss.default, onnx={"portable": GRADIENT}, flops=_loss_flops))
register(Operator(overload=_ops.chosen_loss_backward.default, onnx={"portable": GRADIENT}))
