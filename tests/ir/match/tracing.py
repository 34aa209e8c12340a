"""A function as a canonical program."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from gatecc.capture import capture
from gatecc.ir.program import Program
from gatecc.passes.canonicalize import canonicalize


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def program_of(function: Callable[..., Tensor], *inputs: Tensor) -> Program:
    program = capture(_Function(function), inputs)
    canonicalize(program)
    return program
