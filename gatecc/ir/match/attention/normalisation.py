"""Where weights are normalised: softmax operators, and softmaxes written with exp and a sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, SOFTMAXES, VIEWS, opname
from gatecc.ir.pattern import Match, Pattern, Patterns, anything, call, constant, one_of, through

_PLACED = VIEWS | CASTS
_GUARDS = frozenset("add clamp clamp_min maximum reciprocal pow".split())
_WEIGHED = _PLACED | frozenset("mul where masked_fill dropout".split())


@dataclass(frozen=True, eq=False)
class Normalisation:
    """``output = softmax(input, axis)``. ``exponential`` and ``total`` are the exp and the sum of a written-out one."""

    output: fx.Node
    input: fx.Node
    axis: int
    spelling: Literal["softmax", "manual"]
    exponential: fx.Node | None = None
    total: fx.Node | None = None


def normalisation(node: fx.Node, flow: Flow) -> Normalisation | None:
    """Read a node as the end of a softmax; None if it is not."""
    match = _SOFTMAX.at(node, flow)
    if match is None:
        return None
    dims: Any = match.constants["axis"]
    axis = dims if isinstance(dims, int) else int(dims[0])
    if match.pattern.name == "softmax":
        return Normalisation(node, match["x"], axis, "softmax")
    exponential = _exponential(match.nodes.get("weighed", node))
    assert exponential is not None
    source = match.nodes.get("x", exponential.all_input_nodes[0])
    return Normalisation(node, source, axis, "manual", exponential, match.nodes.get("total"))


def _exponential(node: fx.Node, depth: int = 8) -> fx.Node | None:
    """The exp behind a node that weighs, zeroes, casts or moves it at most."""
    name = opname(node)
    if name == "exp" or not depth:
        return node if name == "exp" else None
    if name not in _WEIGHED:
        return None
    found = (_exponential(source, depth - 1) for source in node.all_input_nodes)
    return next((e for e in found if e is not None), None)


def _has_exponential(match: Match) -> str:
    return "" if _exponential(match["weighed"]) is not None else "there is no exponential"


def _is_single(dims: object) -> bool:
    return isinstance(dims, int) or (isinstance(dims, list | tuple) and len(cast("list[Any]", dims)) == 1)


_X, _AXIS = anything("x"), constant(_is_single, "axis")
_WEIGHTS = anything("weighed")
_TOTAL = through(_PLACED | _GUARDS, call("sum", _WEIGHTS, ..., name="total", dim=_AXIS))
_INVERSE = one_of(call("reciprocal", _TOTAL), call("pow", _TOTAL, -1))
_SOFTMAX = Patterns(
    Pattern("softmax", call(SOFTMAXES, _X, ..., dim=_AXIS)),
    Pattern("quotient", call("div", _WEIGHTS, _TOTAL, ...), _has_exponential),
    Pattern("product", call("mul", _WEIGHTS, through(_PLACED, _INVERSE)), _has_exponential),
    Pattern("log form", call("exp", call("log_softmax _log_softmax special_log_softmax", _X, ..., dim=_AXIS))),
    Pattern("log form", call("exp", call("sub", _X, through(_PLACED, call("logsumexp", _X, ..., dim=_AXIS))))),
)
