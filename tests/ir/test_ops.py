"""Operators: which writes nobody else sees."""

from __future__ import annotations

import torch
from torch import Tensor

from gatecc.ir.ops import mutates, writes_for_others
from gatecc.ir.program import Program
from tests.graphs import program_of

X = torch.randn(3, 3)


def writes(program: Program) -> list[bool]:
    """Of each operator that writes, in order: whether others see it."""
    return [writes_for_others(node) for node in program.calls() if mutates(node)]


def test_a_write_to_a_new_tensor_is_its_own() -> None:
    def inverse(x: Tensor) -> Tensor:
        order = x[0].argsort()
        return torch.empty_like(order).index_put_((order,), torch.arange(3))

    assert writes(program_of(inverse, X)) == [False]
    assert writes(program_of(lambda x: (x @ x).unsqueeze(0).add_(1).mul_(2), X)) == [False, False]


def test_a_write_to_what_is_read_elsewhere_is_not() -> None:
    def twice(x: Tensor) -> Tensor:
        y = x @ x
        return y.view(-1).add_(1).sum() + y

    assert writes(program_of(twice, X)) == [True]
    assert writes(program_of(lambda x: x.view(-1).add_(1), X)) == [True]
    assert writes(program_of(lambda x: torch.relu(x).add_(1), X)) == [True]  # may be new; not known to be
