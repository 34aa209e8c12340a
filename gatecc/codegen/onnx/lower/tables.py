"""tables: a table of positions that is read from its start on is cut, one that is read at one place alone is a row.

Where the indices come from does not matter: they are evaluated at several sizes, up to the length of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject
from gatecc.codegen.onnx.lower.sizes import one_size
from gatecc.codegen.onnx.lower.write import UnwritableError, Writer, aten
from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.ops import opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.sizes import expression, node_shape, same, symbols

_SIZES = ((1, 1), (2, 9), (3, 12))  # samples and tokens at which indices are evaluated


class Tables(GraphLowering):
    """table[positions] -> table[a : a + N]; table[0, 0, ...] -> a row."""

    name = "tables"
    after = ("copies",)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        evaluator = Evaluator(flow)
        for node in list(subject.program.calls()):
            if opname(node) != "embedding" or not _is_added(node):
                continue
            try:
                start, moves = _indices(node, evaluator)
                became = self._write(subject, node, start, moves)
            except (UnprovableError, UnwritableError) as e:
                if _is_position_like(node, flow):
                    yield self.left(node, "a table", str(e))
                continue
            yield self.done(node, "a table", became, "the indices were evaluated at several sizes")

    def _write(self, subject: Subject, node: fx.Node, start: int, moves: bool) -> str:
        given: Any = node.args
        table, shape = given[0], _shape(node)
        writer = Writer(subject.program, node, self.name)
        if not moves:
            row = writer.call(aten.slice.Tensor, table, 0, start, start + 1)
            node.replace_all_uses_with(row)
            return "a row of it"
        tokens = shape[-2]
        first = writer.constant(f"from_{start}", torch.tensor([start]))
        axis = writer.constant("first_axis", torch.tensor([0]))
        end = one_size(writer, tokens, given[1])
        if start:
            end = writer.call(aten.add.Tensor, end, start)
        cut = writer.shaped("Slice", [table, first, end, axis], {}, (tokens, shape[-1]), node.meta["val"].dtype)
        node.replace_all_uses_with(cut)
        return "a piece of it"


def _is_added(node: fx.Node) -> bool:
    """Whether all that reads the entries adds them to values that have them for each sample: axes may be left out."""
    plain = all(opname(user) == "add" and not user.kwargs and _wide(user, node) for user in node.users)
    return len(node_shape(node) or ()) == 3 and bool(node.users) and plain


def _wide(user: fx.Node, node: fx.Node) -> bool:
    """Whether the sum keeps its shape without the first axes of a summand."""
    others = [n for n in user.all_input_nodes if n is not node]
    shape, whole = node_shape(others[0]) if len(others) == 1 else None, node_shape(user)
    return shape is not None and whole is not None and len(shape) == len(whole) and all(map(same, shape, whole))


def _is_position_like(node: fx.Node, flow: Flow) -> bool:
    indices = node.args[1]
    return isinstance(indices, fx.Node) and indices not in flow.data


def _indices(node: fx.Node, evaluator: Evaluator) -> tuple[int, bool]:
    """The first index, and whether they count up from there. Raises UnprovableError."""
    given: Any = node.args
    table, indices = given[0], given[1]
    rows = (node_shape(table) or (0,))[0]
    part = evaluator.slice(indices)
    if part.inputs or not isinstance(rows, int):
        raise UnprovableError(f"the indices depend on the input {part.inputs[0].name}" if part.inputs else "")
    shape = _shape(indices)
    first: set[int] = set()
    moves: set[bool] = set()
    tokens = symbols(shape[-1])
    for batch, length in _lengths(rows, bool(tokens), first):
        sizes: dict[sympy.Symbol, int] = {s: 5 for n in part.nodes for s in _symbols_of(n)}
        sizes |= dict.fromkeys(symbols(shape[0]), batch) | dict.fromkeys(tokens, length)
        if any(expression(size) not in sizes for size in shape if not isinstance(size, int)):
            raise UnprovableError("the number of indices is no size of an input")
        found = evaluator.run(part, sizes)
        start, counts = _read(found)
        first.add(start)
        moves |= set() if counts is None else {counts}
    if len(first) != 1 or len(moves) > 1:
        raise UnprovableError("the indices are others at other sizes")
    return first.pop(), moves.pop() if moves else False


def _shape(node: fx.Node) -> Any:
    return node_shape(node)


def _lengths(rows: int, free: bool, first: set[int]) -> Iterator[tuple[int, int]]:
    if not free:
        yield 2, 1
        return
    yield from _SIZES
    yield 1, rows - max(first)  # the whole table


def _read(found: Tensor) -> tuple[int, bool | None]:
    """The first of these indices, and whether they count up; None if there is but one. Raises UnprovableError."""
    row = found.reshape(-1, found.shape[-1])
    start = int(row[0, 0])
    if (row == start).all():
        return start, None if row.shape[1] == 1 else False
    if (row == start + torch.arange(row.shape[1])).all():
        return start, True
    raise UnprovableError("the indices neither stay nor count up")


def _symbols_of(node: fx.Node) -> Sequence[sympy.Symbol]:
    held = node.meta.get("val")
    sizes = held.shape if isinstance(held, Tensor) else [held]
    return [s for size in sizes if isinstance(size, torch.SymInt) for s in symbols(size)]


__all__ = ["Tables"]
