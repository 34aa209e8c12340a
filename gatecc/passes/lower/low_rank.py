"""Low-rank products in a graph: sums of a Linear and of products with two thin matrices, beside it or in its weight.

peft computes W x + s B (A x), one term an adapter; gatecc's own training (gatecc.train.lora) and merged forms compute
(W + s B A) x. Both are read into one `Adapted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from gatecc.ir.ops import CASTS, argument, mutates, opname
from gatecc.ir.program import Program, fake, shape

_ALONE = frozenset("clone alias detach".split())  # of an operand that is a parameter


@dataclass(frozen=True)
class Factor:
    """s B A. a: (r, in), b: (out, r). ``x``: what A is multiplied with, (..., in)."""

    x: fx.Node
    a: fx.Node
    b: fx.Node
    scale: float

    @property
    def rank(self) -> int:
        return int(shape(self.a)[0])


@dataclass(frozen=True)
class Adapted:
    """x W^T + bias + the factors' products, which end in ``out``. ``base``: the product with W, or with the sum of all
    of them where they are ``merged``. ``frozen``: no gradient of W is wanted."""

    base: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    factors: tuple[Factor, ...]
    out: fx.Node
    merged: bool
    frozen: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Outputs, inputs, and all ranks together."""
        out, width = map(int, shape(self.weight))
        return out, width, sum(factor.rank for factor in self.factors)


def adapted(program: Program) -> Iterator[Adapted]:
    """All of them, in the order of the graph; a Linear without any is none."""
    for node in program.calls():
        if opname(node) != "linear":
            continue
        x, weight = node.args[:2]
        bias = argument(node, 2, "bias")
        if (
            not isinstance(x, fx.Node)
            or not isinstance(weight, fx.Node)
            or not (bias is None or isinstance(bias, fx.Node))
        ):
            continue
        found = _beside(node) if program.is_parameter(weight) else _inside(program, weight, x)
        if found is None or _is_written(found, node):
            continue
        own, factors, out = found
        parameter = program.weight(own if program.is_parameter(own) else own.all_input_nodes[0])
        frozen = opname(own) == "detach" or (parameter is not None and not parameter.requires_grad)
        yield Adapted(node, x, own, bias, factors, out or node, merged=out is None, frozen=frozen)


Found = tuple[fx.Node, tuple[Factor, ...], "fx.Node | None"]  # the weight, the factors, the end of the sum


def _is_written(found: Found, base: fx.Node) -> bool:
    """Whether something is written meanwhile, which a product that moves would read."""
    node, end = base, found[2] or base
    between = False
    while node is not end:
        between |= mutates(node) and _sum(node) is None
        node = node.next
    return between


def _beside(base: fx.Node) -> Found | None:
    """Terms that are added to a product with a weight, one after the other."""
    factors: list[Factor] = []
    end = base
    while len(end.users) == 1:
        user = next(iter(end.users))
        if opname(user) in CASTS and _same_kind(user, end):
            end = user
            continue
        terms = _sum(user)
        if terms is None or not _same_kind(user, base) or (mutates(user) and terms[0] is not end):
            break
        factor = _term(terms[1] if terms[0] is end else terms[0])
        if factor is None or not _fits(factor, base):
            break
        factors.append(factor)
        end = user
    weight = base.args[1]
    assert isinstance(weight, fx.Node)
    return (weight, tuple(factors), end) if factors else None


def _inside(program: Program, weight: fx.Node, x: fx.Node) -> Found | None:
    """Products that are added to a weight before it is used."""
    factors: list[Factor] = []
    node = weight
    while (terms := _sum(node)) is not None and len(node.users) == 1:
        one, other = terms
        factor = _matrix(other, x)
        one, factor = (one, factor) if factor is not None else (other, _matrix(one, x))
        if factor is None:
            return None
        factors.append(factor)
        node = one
    behind = node.all_input_nodes[0] if opname(node) in _ALONE else node
    alike = _alike(node, *(n for factor in factors for n in (factor.x, factor.a, factor.b)))
    return (node, tuple(factors), None) if factors and alike and program.is_parameter(behind) else None


def _alike(*nodes: fx.Node) -> bool:
    """Whether values have one dtype."""
    return len({held.dtype for node in nodes if (held := fake(node)) is not None}) == 1


def _sum(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of a sum of equals; it may be written into the first, which is what leaves."""
    if opname(node) != "add" or argument(node, 2, "alpha", 1) != 1:
        return None
    one, other = node.args[:2]
    return (one, other) if isinstance(one, fx.Node) and isinstance(other, fx.Node) else None


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """A value without the numbers that it is multiplied with, and these; casts that change nothing are stepped over."""
    scale = 1.0
    while len(node.users) == 1 and node.args and isinstance(source := node.args[0], fx.Node):
        factor = node.args[1] if len(node.args) > 1 else None
        if opname(node) == "mul" and isinstance(factor, int | float):
            scale *= factor
        elif opname(node) not in CASTS or not _same_kind(node, source):
            break
        node = source
    return node, scale


def _term(node: fx.Node) -> Factor | None:
    """s B (A x) as a factor."""
    second, scale = _scaled(node)
    if not _plain(second):
        return None
    thin, b = second.args[:2]
    assert isinstance(thin, fx.Node)
    first, within = _scaled(thin)
    if not _plain(first):
        return None
    x, a = first.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    return Factor(x, a, b, scale * within) if _thin(a, b) else None


def _matrix(node: fx.Node, x: fx.Node) -> Factor | None:
    """s B A as a factor."""
    product, scale = _scaled(node)
    if opname(product) not in ("mm", "matmul") or len(product.users) != 1:
        return None
    b, a = product.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or len(shape(a)) != 2 or len(shape(b)) != 2:
        return None
    return Factor(x, a, b, scale) if _thin(a, b) else None


def _plain(node: fx.Node) -> bool:
    """Whether a node is a Linear without bias that one node reads."""
    return opname(node) == "linear" and argument(node, 2, "bias") is None and len(node.users) == 1


def _thin(a: fx.Node, b: fx.Node) -> bool:
    """Whether (out, r) and (r, in) have an r that is smaller than the others."""
    sizes = [size for size in (*shape(a), *shape(b)) if isinstance(size, int)]
    return len(sizes) == 4 and 2 * sizes[0] <= min(sizes[1], sizes[2])


def _fits(factor: Factor, base: fx.Node) -> bool:
    """Whether a factor is of the type of a product and is added to all of it."""
    x, weight = base.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    return _alike(factor.x, factor.a, factor.b, weight) and len(shape(factor.x)) == len(shape(x))


def _same_kind(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have one shape and one dtype."""
    left, right = fake(one), fake(other)
    if left is None or right is None or left.dtype != right.dtype or left.dim() != right.dim():
        return False
    return all(str(a) == str(b) for a, b in zip(left.shape, right.shape, strict=True))
