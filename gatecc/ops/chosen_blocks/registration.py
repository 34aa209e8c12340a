"""What decoder, ONNX and cost know of attention to chosen blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.codegen.onnx.lowering import GRADIENT, Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError
from gatecc.ir.ops import named
from gatecc.ops.block_gate.reference import POOLS, count
from gatecc.ops.chosen_blocks import operator as operator  # defines the operators
from gatecc.ops.chosen_blocks.cache import one_token
from gatecc.ops.chosen_blocks.formula import masked, of_all
from gatecc.ops.paths import Taken
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


def _served(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[tuple[Tensor, ...], int, int]:
    """All pairs of a query and a key: the full forward masks those of other blocks."""
    every = q.size(0) * q.size(1) * q.size(2) * k.size(2)
    return (), every, every


def _taken(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_raw: Tensor,
    k_raw: Tensor,
    query: Tensor,
    key: Tensor,
    cut: Tensor,
    keep: Tensor | None = None,
    *cache: Tensor | None,
    out: Any,
    block: int,
    base: float = 0.0,
    ranked: bool = True,
    keys: Tensor | None = None,
    **_: Any,
) -> Taken | None:
    """How many blocks the tokens of each key head choose, of those up to their own; of a call without a cache."""
    if isinstance(q, FakeTensor) or q.device.type == "meta" or any(x is not None for x in (*cache, keys)):
        return None
    chosen = of_all(q_raw, k_raw, query, key, cut, keep, block=block, base=base, ranked=ranked)
    upto = torch.arange(q.size(2)) // block + 1
    return Taken("block of keys", chosen.sum((0, 2, 3)).tolist(), q.size(0) * int(upto.sum()))


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
        served=_served,
        taken=_taken,
        masked=masked,
    )
)
register(Operator(overload=_ops.chosen_loss.default, onnx={"portable": GRADIENT}, flops=_loss_flops))
register(Operator(overload=_ops.chosen_loss_backward.default, onnx={"portable": GRADIENT}))
