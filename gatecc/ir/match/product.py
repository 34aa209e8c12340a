"""Product: a contraction of two tensors in any spelling, its axes named by letters as in an einsum equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from gatecc.ir.ops import argument, opname
from gatecc.ir.sizes import node_shape

_BATCH = "ABCDEFGH"
_ELLIPSIS = "01234567"  # sorts before letters, as the implicit output of an einsum wants it


@dataclass(frozen=True, eq=False)
class Product:
    """``node = alpha * einsum("{left_axes},{right_axes}->{axes}", left, right) + addend``."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    axes: str
    alpha: float = 1.0
    addend: fx.Node | None = None

    @property
    def contracted(self) -> str:
        """The letters that are summed over."""
        return "".join(a for a in self.left_axes if a in self.right_axes and a not in self.axes)

    def side(self, node: fx.Node) -> tuple[str, fx.Node, str] | None:
        """The axes of ``node`` as an operand, the other operand and its axes; None if it is no operand."""
        if node is self.left:
            return self.left_axes, self.right, self.right_axes
        if node is self.right:
            return self.right_axes, self.left, self.left_axes
        return None


def product(node: fx.Node) -> Product | None:
    """Read a node as a product of two tensors; None if it is none, or one whose axes cannot be named."""
    name = opname(node)
    if name in ("matmul", "bmm", "mm"):
        return _matmul(node, argument(node, 0, "self"), argument(node, 1, "mat2"))
    if name in ("baddbmm", "addmm"):
        alpha, beta = (node.kwargs.get(factor, 1) for factor in ("alpha", "beta"))
        if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
            return None
        left, right = argument(node, 1, "batch1"), argument(node, 2, "batch2")
        return _matmul(node, left, right, float(alpha), argument(node, 0, "self"))
    if name == "linear":
        return _linear(node)
    if name == "einsum":
        return _einsum(node)
    return None


def _rank(node: Any) -> int:
    shape = node_shape(node) if isinstance(node, fx.Node) else None
    return -1 if shape is None else len(shape)


def _matmul(node: fx.Node, left: Any, right: Any, alpha: float = 1.0, addend: Any = None) -> Product | None:
    one, other = _rank(left), _rank(right)
    if one < 2 or other < 2 or max(one, other) - 2 > len(_BATCH):
        return None
    batch = _BATCH[: max(one, other) - 2]
    left_batch, right_batch = batch[len(batch) - one + 2 :], batch[len(batch) - other + 2 :]
    added = addend if isinstance(addend, fx.Node) else None
    return Product(node, left, right, left_batch + "nd", right_batch + "dm", batch + "nm", alpha, added)


def _linear(node: fx.Node) -> Product | None:
    left, right, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    rank = _rank(left)
    if rank < 2 or _rank(right) != 2:
        return None
    batch = _BATCH[: rank - 2]
    return Product(
        node, left, right, batch + "nd", "md", batch + "nm", 1.0, bias if isinstance(bias, fx.Node) else None
    )


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = str(argument(node, 0, "equation")).replace(" ", ""), argument(node, 1, "tensors")
    inputs, _, out = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or len(operands) != 2 or any(_rank(x) < 1 for x in operands):
        return None
    terms = [_spread(term, _rank(x)) for term, x in zip(terms, operands, strict=True)]
    out = _spread(out, _rank(node)) if "->" in equation else _implicit(terms)
    known = set(terms[0]) | set(terms[1])
    repeated = any(len(set(t)) != len(t) for t in (*terms, out))
    lonely = (set(terms[0]) ^ set(terms[1])) - set(out)
    if repeated or lonely or not set(out) <= known or len(out) != _rank(node):
        return None
    return Product(node, operands[0], operands[1], terms[0], terms[1], out)


def _spread(term: str, rank: int) -> str:
    """Write an ellipsis as letters that no equation uses, aligned from the right."""
    if "..." not in term:
        return term
    count = rank - len(term) + 3
    return term.replace("...", _ELLIPSIS[len(_ELLIPSIS) - count :])


def _implicit(terms: list[str]) -> str:
    letters = "".join(terms)
    return "".join(sorted(a for a in set(letters) if letters.count(a) == 1 or a in _ELLIPSIS))
