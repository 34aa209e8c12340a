"""``gatecc::carried``: what a step predicted, for the next one: an input of a graph, a state of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.registry import Operator, StepRule, register
from gatecc.ops.transforms import instead


@torch.library.custom_op("gatecc::carried", mutates_args=())
def carried(soft: Tensor, table: Tensor, until: Sequence[int]) -> Tensor:
    """``soft``, (B, N, C), as it is: in row t of a sample what the step before predicted, or zeros.

    A decoder needs no such input: its next row is `soft_embedding` of the logits and ``table`` (V, C), until a sample
    reads a token of ``until``.
    """
    return soft.clone()


@carried.register_fake
def _(soft: Tensor, table: Tensor, until: Sequence[int]) -> Tensor:
    return torch.empty_like(soft)


def _spelled(soft: Tensor, table: Tensor, until: Sequence[int]) -> Tensor:
    return soft * 1


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None


def soft_embedding(logits: Tensor, table: Tensor) -> Tensor:
    """s = p E / |p|, where p is the softmax of the logits. logits: (..., V), table: (V, C) -> (..., C)"""
    p = torch.softmax(logits.float(), -1)
    p = p / p.norm(dim=-1, keepdim=True)
    return p.to(table.dtype) @ table


carried.register_autograd(_backward)
instead(carried, _spelled)
register(
    Operator(
        overload=torch.ops.gatecc.carried.default,
        step=StepRule(operand="soft", axis=None),
        onnx={"portable": Lowering(_spelled)},
        flops=lambda soft, table, until: 0,
    )
)
