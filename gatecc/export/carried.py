"""Carried: one state of decode.onnx, as the manifest describes it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass

from gatecc.errors import CheckpointError

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Carried:
    """One state: ``output`` of a call is ``input`` of the next. ``shape``: of the input; ``grows``: the axis that is 0
    before the first token and gets longer with each, None if its size stays; ``fill``: its value before the first.
    ``shared``: input and output may be one buffer with room for more tokens. ``window``: the last tokens that are read
    of it, though all are kept. A ``kind`` "dummy" is read by nothing: onnxruntime-genai wants it."""

    input: str
    output: str
    kind: str
    layer: int | None
    shape: list[int | str]
    dtype: str
    grows: int | None
    fill: float
    shared: bool
    window: int | None = None


def size_of(size: int | str, batch: int) -> int:
    """A size of a state: a number, or one of ``batch``, ``3*batch``, ``batch + 1`` and so on.

    A manifest may come from anywhere, so it is read as arithmetic and not evaluated as code.
    """
    if isinstance(size, int):
        return size

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id="batch"):
                return batch
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](value(left), value(right))
            case _:
                raise CheckpointError(
                    "gatecc.json gives a size of a state that is no arithmetic",
                    found=size,
                    expected="a number, or +, -, *, // of numbers and batch",
                )

    return value(ast.parse(size, mode="eval").body)
