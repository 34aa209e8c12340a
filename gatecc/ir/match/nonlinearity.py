"""Nonlinearities of a graph: as one operator or written out (``x * 0.5 * (1 + erf(x / sqrt(2)))`` is a GELU).

A written-out form is not recognised by its shape: it is evaluated on sample points and compared with the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc.ir.ops import CASTS, SAME_SHAPE, opname

FUNCTIONS = frozenset(
    "relu relu6 gelu silu mish tanh sigmoid hardswish hardsigmoid hardtanh leaky_relu rrelu elu celu selu softplus "
    "prelu log_sigmoid hardshrink softshrink threshold glu softsign".split()
)
_ANCHORS = frozenset("erf tanh sigmoid hardtanh relu relu6 hardsigmoid clamp".split())  # inside a written-out function
_ELEMENTWISE = frozenset("add sub rsub mul div neg pow square reciprocal exp log1p softplus clamp".split()) | _ANCHORS
_CANDIDATES = FUNCTIONS | _ANCHORS
_REGION = 16  # nodes of the longest written-out function, with room to spare
_POINTS = torch.linspace(-6, 6, 97, dtype=torch.float64)
_WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "squared_relu": lambda x: F.relu(x).square(),
    "lecun_tanh": lambda x: 1.7159 * torch.tanh(2 / 3 * x),
}


@dataclass(frozen=True, eq=False)
class Nonlinearity:
    """``out = function(inp)``; ``inner`` are the nodes from inp (not included) to out (included)."""

    function: str
    inp: fx.Node
    out: fx.Node
    inner: frozenset[fx.Node]


def nonlinearities(nodes: list[fx.Node]) -> dict[fx.Node, Nonlinearity]:
    """All nonlinearities among ``nodes``, by the node that yields them, in order."""
    found: dict[fx.Node, Nonlinearity] = {}
    inside: set[fx.Node] = set()
    known: dict[tuple[Any, ...], str | None] = {}
    for node in nodes:
        name = opname(node)
        if node in inside or name not in _CANDIDATES:
            continue
        written = _written(node, known) if name in _ANCHORS else None
        if written is not None:
            for part in written.inner:  # Mish holds a softplus, which came first
                found.pop(part, None)
            found[written.out] = written
            inside |= written.inner
        elif name in FUNCTIONS and isinstance(node.args[0], fx.Node):
            found[node] = Nonlinearity(name, node.args[0], node, frozenset([node]))
    return found


def _written(anchor: fx.Node, known: dict[tuple[Any, ...], str | None]) -> Nonlinearity | None:
    """The written-out function around ``anchor``, the largest first."""
    roots = _roots(anchor)
    for out in reversed(_ends(anchor)):
        for root in roots:
            inner = _between(root, out)
            if inner is None or anchor not in inner:
                continue
            key = _spelling(root, inner)
            if key not in known:
                known[key] = _identify(root, inner)
            name = known[key]
            if name is not None:
                return Nonlinearity(name, root, out, frozenset(inner))
    return None


def _roots(anchor: fx.Node) -> list[fx.Node]:
    """What the anchor's argument may be computed from by element-wise operations with numbers, nearest first."""
    roots: list[fx.Node] = []
    stack = [n for n in anchor.args if isinstance(n, fx.Node)]
    while stack and len(roots) < _REGION:
        node = stack.pop(0)
        if node in roots:
            continue
        roots.append(node)
        if opname(node) in _ELEMENTWISE or opname(node) in CASTS:
            stack += node.all_input_nodes
    return roots


def _ends(anchor: fx.Node) -> list[fx.Node]:
    """The anchor and what follows it alone, by element-wise operations."""
    ends = [anchor]
    while len(ends) < _REGION and len(set(ends[-1].users)) == 1:
        after = next(iter(ends[-1].users))
        if opname(after) not in _ELEMENTWISE and opname(after) not in CASTS and opname(after) not in SAME_SHAPE:
            break
        ends.append(after)
    return ends


def _between(root: fx.Node, out: fx.Node) -> list[fx.Node] | None:
    """The nodes that compute ``out`` from ``root`` and numbers alone, in order; None if they do not."""
    if out is root:
        return None
    inner: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> bool:
        if node is root or node in seen:
            return True
        name = opname(node)
        if len(seen) > _REGION or (name not in _ELEMENTWISE and name not in CASTS and name not in SAME_SHAPE):
            return False
        seen.add(node)
        if not all(visit(source) for source in node.all_input_nodes):
            return False
        inner.append(node)
        return True

    if not visit(out):
        return None
    closed = all(set(node.users) <= seen for node in inner if node is not out)
    return inner if closed else None


def _spelling(root: fx.Node, inner: list[fx.Node]) -> tuple[Any, ...]:
    """The region as text: equal texts compute equal functions."""
    number = {node: i for i, node in enumerate([root, *inner])}
    return tuple(
        (
            str(n.target),
            *(number.get(a, "?") if isinstance(a, fx.Node) else repr(a) for a in (*n.args, *n.kwargs.values())),
        )
        for n in inner
    )


def _identify(root: fx.Node, inner: list[fx.Node]) -> str | None:
    """The name of the function that the region computes, by evaluating it."""
    values: dict[fx.Node, Any] = {root: _POINTS.clone()}
    for node in sorted(inner):
        if opname(node) in CASTS:
            values[node] = values[node.all_input_nodes[0]]  # the precision is not the function
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        try:
            values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        except (RuntimeError, TypeError, ValueError):
            return None
    result = values[inner[-1]]
    for name, function in _WRITTEN.items():
        if isinstance(result, Tensor) and torch.allclose(result, function(_POINTS), atol=1e-5, rtol=1e-5):
            return name.removesuffix("_tanh") if name.startswith("gelu") else name
    return None
