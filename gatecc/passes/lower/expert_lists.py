"""Lists of experts in a graph: parameters of one shape that are numbered from 0, and products with them side by side.

``experts.3.w1.weight`` of a list of modules, ``w1.3`` of a list of parameters, ``w1.3.weight`` of a list of layers:
what makes them experts is that no product of one depends on another one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.projection import Projection
from gatecc.ir.ops import mutates, writes_for_others
from gatecc.ir.program import fake, shape
from gatecc.ir.sizes import on_example
from gatecc.passes.expert_matrices import Matrices, Role

_KINDS = (2, 3)  # matrices per expert
_NEAR = 24  # values before the first products among which the tokens are sought
_TOKENS, _RESULTS = 3, 4  # that are tried


@dataclass(frozen=True, eq=False)
class _Family:
    """Products of one role, by expert. ``before`` and ``after`` the number in the name of their weights."""

    before: str
    after: str
    products: list[Projection]

    @property
    def first(self) -> Projection:
        return self.products[0]


@dataclass(frozen=True, eq=False)
class ExpertList:
    """Experts that are found: where tokens may enter, where their sum may leave, and their weights, in each order that
    gate and up may have. ``rows``: what the first expert computes on."""

    owner: str
    place: fx.Node
    tokens: Sequence[fx.Node]
    results: Sequence[fx.Node]
    candidates: Sequence[Matrices]
    rows: fx.Node


def expert_lists(facts: Facts) -> Iterator[ExpertList]:
    """All lists of experts of a program, in the order of their names."""
    families = list(_families(facts))
    groups: dict[tuple[str, str], list[_Family]] = {}
    for family in families:
        groups.setdefault((family.before, ""), []).append(family)  # a list of modules
        groups.setdefault((_above(family.before), family.after), []).append(family)  # lists of layers in one module
    for group in groups.values():
        counts = {len(family.products) for family in group}
        if len(group) in _KINDS and len(counts) == 1 and (found := _listed(facts, group)) is not None:
            yield found


def _families(facts: Facts) -> Iterator[_Family]:
    """Products whose weights differ in one number of their names, from 0 on, and in nothing else."""
    found: dict[tuple[str, str], dict[int, list[Projection]]] = {}
    for projection in facts.projections.values():
        if projection.weight is None or projection.conv:
            continue
        parts = projection.weight.fqn.split(".")
        for at in (i for i, part in enumerate(parts) if part.isdecimal()):
            key = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            found.setdefault(key, {}).setdefault(int(parts[at]), []).append(projection)
    for (before, after), by_number in found.items():
        alone = all(len(products) == 1 for products in by_number.values())
        if not alone or len(by_number) < 2 or sorted(by_number) != list(range(len(by_number))):
            continue
        products = [by_number[i][0] for i in range(len(by_number))]
        if len({_kind(projection) for projection in products}) == 1:
            yield _Family(before, after, products)


def _kind(projection: Projection) -> tuple[object, ...]:
    assert projection.weight is not None
    weight = projection.weight
    return projection.in_width, projection.out_width, weight.orientation, weight.bias is None


def _above(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(facts: Facts, group: list[_Family]) -> ExpertList | None:
    """A group of families as experts; None if it is something else, such as layers that follow each other."""
    count = len(group[0].products)
    held = _Held(facts, group)
    *first, last = sorted(group, key=lambda family: facts.order[family.first.node])
    if any(held.of(family.products[i].x) for family in first for i in range(count)):
        return None  # behind another product with these weights
    if any(held.of(last.products[i].x) != 1 << i for i in range(count)):
        return None
    tokens = _common(facts, [p.x for family in first for p in family.products], first[0].first.in_width)
    full = (1 << count) - 1
    results = [n for n in facts.program.calls() if held.of(n) == full and not writes_for_others(n) and _is_float(n)]
    candidates = list(_candidates(first, last))
    if not tokens or not results or not candidates:
        return None
    owner = group[0].before if len({f.before for f in group}) == 1 else _above(group[0].before)
    return ExpertList(owner, last.first.node, tokens, results[: 4 * _RESULTS], candidates, first[0].first.x)


class _Held:
    """Which experts' weights a value depends on: one bit per expert. Writes count from where they are written."""

    def __init__(self, facts: Facts, group: list[_Family]) -> None:
        base = facts.flow.base
        own = {p.node: 1 << i for family in group for i, p in enumerate(family.products)}
        self._bits: dict[fx.Node, int] = {}
        written: dict[fx.Node, int] = {}
        for node in facts.program.graph.nodes:
            sources = [self._bits[n] | written.get(base[n], 0) for n in facts.inputs[node]]
            self._bits[node] = bits = reduce(or_, sources, own.get(node, 0))
            if bits and mutates(node):
                written[base[node]] = written.get(base[node], 0) | bits

    def of(self, node: fx.Node) -> int:
        """The bits of a value."""
        return self._bits[node]


def _common(facts: Facts, starts: list[fx.Node], width: int) -> list[fx.Node]:
    """What all of these values come from, as wide as they are; the nearest first."""
    common: set[fx.Node] | None = None
    for start in dict.fromkeys(starts):
        near = set(_near(facts, start))
        common = near if common is None else common & near
    found = [n for n in common or () if _is_float(n) and shape(n)[-1] == width and n in facts.data]
    return sorted(found, reverse=True)[:_TOKENS]


def _near(facts: Facts, start: fx.Node) -> Iterator[fx.Node]:
    seen, todo = {start}, [start]
    for _ in range(_NEAR):
        if not todo:
            return
        node = todo.pop(0)
        yield node
        new = [n for n in facts.inputs[node] if n not in seen]
        seen.update(new)
        todo += new


def _is_float(node: fx.Node) -> bool:
    held = fake(node)
    return held is not None and held.is_floating_point() and held.dim() > 1


def _candidates(first: list[_Family], last: _Family) -> Iterator[Matrices]:
    """The weights, with gate and up in the order of use, and the other way round."""
    f = last.first.in_width
    widths = [family.first.out_width for family in first]
    gated = widths == [2 * f]
    biases = [bias for family in first if (bias := _bias(family)) is not None]
    alike = {(_swapped(family), family.first.in_width) for family in first}
    if len(alike) > 1 or (widths != [f] * len(first) and not gated) or len(biases) not in (0, len(first)):
        return
    swaps = _swapped(first[0]), _swapped(last)
    roles = [_role(family) for family in first]
    for step in (1, -1) if len(first) > 1 else (1,):
        up, up_bias = tuple(roles[::step]), tuple(biases[::step])
        count = len(last.products)
        yield Matrices(first[0].before, count, up, _role(last), up_bias, _bias(last), swaps, gated)


def _role(family: _Family) -> Role:
    weight, p = family.first.weight, family.first
    assert weight is not None
    shape = (p.out_width, p.in_width) if weight.orientation == "out_in" else (p.in_width, p.out_width)
    return Role(tuple(q.weight.fqn for q in family.products if q.weight is not None), shape)


def _bias(family: _Family) -> Role | None:
    names = [p.weight.bias for p in family.products if p.weight is not None and p.weight.bias is not None]
    return Role(tuple(names), (family.first.out_width,)) if names else None


def _swapped(family: _Family) -> bool:
    assert family.first.weight is not None
    return family.first.weight.orientation == "in_out"


def results(found: ExpertList, x: fx.Node) -> list[fx.Node]:
    """The values that may be the sum for these tokens: of their rank, with their rows."""
    rows = _rows(x)
    return [] if None in rows else [n for n in found.results if _rows(n) == rows][:_RESULTS]


def _rows(node: fx.Node) -> list[int | None]:
    return [on_example(size) for size in shape(node)[:-1]]
