"""Where weights are normalised: softmax operators, and softmaxes written with exp and a sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from gatecc.ir.ops import CASTS, SOFTMAXES, VIEWS, argument, opname


@dataclass(frozen=True, eq=False)
class Normalisation:
    """``output = softmax(input, axis)``. ``exponential`` and ``total`` are the exp and the sum of a written-out one."""

    output: fx.Node
    input: fx.Node
    axis: int
    spelling: Literal["softmax", "manual"]
    exponential: fx.Node | None = None
    total: fx.Node | None = None


def normalisation(node: fx.Node) -> Normalisation | None:
    """Read a node as the end of a softmax; None if it is not."""
    name = opname(node)
    if name in SOFTMAXES:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return Normalisation(node, source, int(argument(node, 1, "dim")), "softmax")
    if name in ("div", "mul") and len(node.args) > 1:
        return _quotient(node)
    if name == "exp":
        return _log_form(node)
    return None


def _log_form(node: fx.Node) -> Normalisation | None:
    """``exp(log_softmax(x))`` and ``exp(x - logsumexp(x))``."""
    inner = node.args[0]
    if not isinstance(inner, fx.Node):
        return None
    if opname(inner) in ("log_softmax", "_log_softmax", "special_log_softmax"):
        source = inner.args[0]
        assert isinstance(source, fx.Node)
        return Normalisation(node, source, int(argument(inner, 1, "dim")), "manual", node)
    if opname(inner) != "sub":
        return None
    source, total = inner.args[0], inner.args[1]
    if not isinstance(source, fx.Node) or not isinstance(total, fx.Node):
        return None
    total = _through(total, VIEWS | CASTS)
    if opname(total) != "logsumexp" or total.args[0] is not source:
        return None
    axis = _single(argument(total, 1, "dim"))
    return None if axis is None else Normalisation(node, source, axis, "manual", node)


def _quotient(node: fx.Node) -> Normalisation | None:
    """``e / e.sum(axis)`` with e made of an exponential; also ``e * (1 / e.sum(axis))``."""
    for top, bottom in _quotient_operands(node):
        total = _through(bottom, VIEWS | CASTS | _GUARDS)
        if opname(total) != "sum" or len(total.args) < 2 or not _equal(total.args[0], top):
            continue
        axis, exponential = _single(total.args[1]), _exponential(top)
        if axis is not None and exponential is not None:
            source = exponential.args[0]
            assert isinstance(source, fx.Node)
            return Normalisation(node, source, axis, "manual", exponential, total)
    return None


_GUARDS = frozenset("add clamp clamp_min maximum reciprocal pow".split())


def _quotient_operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    one, other = node.args[0], node.args[1]
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return
    if opname(node) == "div":
        yield one, other
        return
    for top, bottom in ((one, other), (other, one)):
        inverse = _through(bottom, VIEWS | CASTS)
        if opname(inverse) == "reciprocal" or (opname(inverse) == "pow" and inverse.args[1] in (-1, -1.0)):
            yield top, bottom


def _equal(one: object, other: fx.Node) -> bool:
    """One node, or the same call written twice: ``s.exp() / s.exp().sum(-1)``."""
    if not isinstance(one, fx.Node) or one is other:
        return one is other
    return one.target == other.target and one.args == other.args and one.kwargs == other.kwargs and opname(one) != ""


def _through(node: fx.Node, names: frozenset[str]) -> fx.Node:
    while opname(node) in names and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _exponential(node: fx.Node, depth: int = 8) -> fx.Node | None:
    """The exp behind a node that weighs, zeroes, casts or moves it at most."""
    name = opname(node)
    if name == "exp" or not depth:
        return node if name == "exp" else None
    if name not in _WEIGHED:
        return None
    found = (_exponential(source, depth - 1) for source in node.all_input_nodes)
    return next((e for e in found if e is not None), None)


_WEIGHED = VIEWS | CASTS | frozenset("mul where masked_fill dropout".split())


def _single(dims: object) -> int | None:
    if isinstance(dims, int):
        return dims
    return int(dims[0]) if isinstance(dims, list | tuple) and len(dims) == 1 else None
