"""layout: a chain of nodes that only move values is as few as it can be: one Gather of rows between reshapes.

Windows of Swin are cut by a roll (slices and a concat for each axis), a pad by nothing, reshapes and a transpose, and
put together again by the same. What a chain does is not read off its nodes: it is run on the places of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject
from gatecc.codegen.onnx.lower.views import Views, equal_shapes
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.ops import RESHAPES, SAME_SHAPE, TRANSPOSES, named, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.sizes import UnknownSizeError, node_shape, numel, symbols

_PADS = frozenset(("pad", "constant_pad_nd"))
_MOVES = RESHAPES | TRANSPOSES | SAME_SHAPE | _PADS | frozenset("unsqueeze squeeze roll slice cat".split())
_ROLL = 3  # nodes of ONNX for each axis
_SHORTEST = 4  # values in a row: fewer are moved one by one
_SAMPLES = (1, 2, 3)


@dataclass(frozen=True, eq=False)
class _Chain:
    """``out`` holds rows of ``width`` values of ``source``, of each sample those of the numbers ``rows`` of ``of``."""

    source: fx.Node
    out: fx.Node
    width: int
    rows: Tensor
    of: int

    @property
    def in_place(self) -> bool:
        """Whether nothing is moved."""
        return len(self.rows) == self.of and bool((self.rows == torch.arange(self.of)).all())

    @property
    def before(self) -> bool:
        """Whether the rows have an axis of their own, the second."""
        return _after_first(self.source)[:1] == [self.of]

    @property
    def after(self) -> bool:
        """Whether the result has its shape as soon as it is gathered."""
        return self.before and _after_first(self.out) == [len(self.rows), *_after_first(self.source)[1:]]

    @property
    def nodes(self) -> int:
        """How many nodes of ONNX say it."""
        if self.in_place:
            return 0 if equal_shapes(self.source, self.out) else 1
        return 1 + (not self.before) + (not self.after)


class Layout(GraphLowering):
    """Reshapes, transposes, rolls, slices and their like, one after the other -> Reshape, Gather, Reshape."""

    name = "layout"
    after = ("attention", "copies", "turned")

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        views, evaluator = Views(flow), Evaluator(flow)
        for node in subject.program.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default  # copies that made it a view are gone
        roots: dict[fx.Node, fx.Node] = {}
        ends: list[fx.Node] = []
        for node in list(subject.program.calls()):
            if _is_move(node) and not views.written(node):
                read = {roots.get(n, n) for n in _moved(node)}
                roots[node] = read.pop() if len(read) == 1 else node
        for node, root in roots.items():
            if root is not node and any(roots.get(user) is not root for user in node.users):
                ends.append(node)
        for node in ends:
            chain = _chain(node, roots[node], evaluator)
            inside = _between(node, roots[node])
            cost = sum(map(_cost, inside))
            if chain is None or chain.nodes >= cost:
                continue
            self._write(subject, chain)
            became = "a value as it is" if not chain.nodes else "Reshape" if chain.in_place else "Gather"
            yield self.done(node, "a chain of nodes that move values", became, "it was run on their places")

    def _write(self, subject: Subject, chain: _Chain) -> None:
        writer = Writer(subject.program, chain.out, self.name)
        made, shape = chain.source, _after_first(chain.out)
        if not chain.in_place:
            if not chain.before:
                made = writer.call(aten.reshape.default, made, [-1, chain.of, chain.width])
            made = writer.call(aten.index_select.default, made, 1, writer.constant("rows", chain.rows))
        if not chain.nodes:
            chain.out.replace_all_uses_with(made)
            return
        if chain.in_place or not chain.after:
            made = writer.call(aten.reshape.default, made, [-1, *shape])
        made.meta["val"] = chain.out.meta["val"]
        chain.out.replace_all_uses_with(made)


def _is_move(node: fx.Node) -> bool:
    """Whether the result has values of the operand and no others: a pad by nothing has."""
    name = opname(node)
    return name in _MOVES and (name not in _PADS or equal_shapes(_moved(node)[0], node))


def _moved(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node moves values of."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _after_first(node: fx.Node) -> list[Any]:
    return list((node_shape(node) or ())[1:])


def _between(out: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The nodes from a source to what is made of it which nobody else reads."""
    found: dict[fx.Node, None] = {}
    todo = [out]
    while todo:
        node = todo.pop()
        if node is not source and node not in found and (node is out or all(user in found for user in node.users)):
            found[node] = None
            todo.extend(_moved(node))
    return list(found)


def _cost(node: fx.Node) -> int:
    """How many nodes of ONNX it becomes."""
    name, source = opname(node), _moved(node)[0]
    if name in SAME_SHAPE or (name in RESHAPES | {"slice"} and equal_shapes(source, node)):
        return 0
    if name != "roll":
        return 1
    shifts: Any = named(node, "shifts")
    return _ROLL * (sum(shift != 0 for shift in shifts) if isinstance(shifts, list | tuple) else 1)


def _chain(out: fx.Node, source: fx.Node, evaluator: Evaluator) -> _Chain | None:
    """What is known of a chain; None if it does not move rows of each sample in the same way."""
    shapes = [node_shape(n) for n in (source, out)]
    sizes = [s for shape in shapes if shape is not None for s in shape[1:]]
    if any(not shape for shape in shapes) or not all(isinstance(s, int) for s in sizes):
        return None
    free = {s for shape in shapes if shape is not None for s in symbols(shape[0])}
    if len(free) > 1:
        return None
    try:
        part = evaluator.slice(out, given=frozenset({source}))
        found = [_places(evaluator, part, source, dict.fromkeys(free, n), n) for n in _SAMPLES[: 3 if free else 1]]
    except (UnprovableError, UnknownSizeError, RuntimeError, KeyError):
        return None
    (first, of), *more = found
    for samples, (places, each) in zip(_SAMPLES[1:], more, strict=False):
        again = torch.cat([first + sample * of for sample in range(samples)])
        if each != of or not torch.equal(places, again):
            return None
    width = _width(first, of, source)
    return None if width < _SHORTEST else _Chain(source, out, width, first[::width] // width, of // width)


def _places(
    evaluator: Evaluator, part: Any, source: fx.Node, sizes: dict[sympy.Symbol, int], samples: int
) -> tuple[Tensor, int]:
    """For each value of the result its place in the source, and how many values each sample has there."""
    shape = [int(sympy.sympify(_number(s, sizes))) for s in node_shape(source) or ()]
    count = prod(shape)
    found = evaluator.run(part, sizes, {source: torch.arange(count).reshape(shape)})
    if count % samples:
        raise UnprovableError("samples share values")
    return found.reshape(-1), count // samples


def _number(size: Any, sizes: dict[sympy.Symbol, int]) -> Any:
    return size if isinstance(size, int) else numel([size]).xreplace(sizes)


def _width(places: Tensor, of: int, source: fx.Node) -> int:
    """The longest rows that stay together: those of the source, where these do."""
    breaks = (places.diff() != 1).nonzero().flatten() + 1
    starts = torch.cat([places.new_zeros(1), breaks])
    width = gcd(len(places), of, *starts.tolist(), *places[starts].tolist())
    inner = prod(_after_first(source)[1:])
    return inner if inner and width % inner == 0 else width


__all__ = ["Layout"]
