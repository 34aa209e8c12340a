"""Residual joins: which adds of a graph have a skip and a branch, decided by reachability."""

from __future__ import annotations

from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.shapes import same_shape
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, VIEWS, opname
from gatecc.ir.program import Program, fake, origin

_TRANSPARENT = (
    VIEWS | CASTS | DROPOUTS | frozenset("batch_norm layer_norm group_norm avg_pool2d max_pool2d pad".split())
)
_MIXERS = CONTRACTIONS | frozenset(
    "avg_pool1d avg_pool2d max_pool2d cumsum _fft_c2c _fft_r2c fft_fft fft_fft2 roll".split()
)
_SHORTCUT = 8  # nodes of the longest projection shortcut


class JoinedFacts(Facts):
    """The facts, and the adds that join a skip and a branch: ``residuals``, add -> (skip, branch)."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.residuals = residual_joins(self)


def residual_joins(facts: Facts) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """All residual joins: add -> (skip, branch)."""
    adds = [node for node in facts.program.calls() if opname(node) == "add" and _summands(facts, node) is not None]
    adds = [add for add in adds if facts.maps.around(add) is None]  # an adapter beside a projection is no branch
    reach = _Reach(facts, adds)
    joins: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for add in adds:
        summands = _summands(facts, add)
        assert summands is not None
        join = _join(facts, reach, add, *summands)
        if join is not None:
            joins[add] = join
    return joins


def _summands(facts: Facts, add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two computed tensors that are added, both of the sum's shape and real; None for other adds."""
    if len(add.args) < 2 or not all(isinstance(a, fx.Node) and a in facts.data for a in add.args[:2]):
        return None
    held = fake(add)
    if held is None or not held.dtype.is_floating_point:
        return None
    one, other = (a for a in add.args[:2] if isinstance(a, fx.Node))
    return (one, other) if same_shape(one, other) else None


def _join(facts: Facts, reach: _Reach, add: fx.Node, one: fx.Node, other: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    if reach.weighted(one, other):
        return one, other
    if reach.weighted(other, one):
        return other, one
    for skip, branch in ((one, other), (other, one)):
        fork = _shortcut(facts, skip)
        if fork is not None and reach.deep(fork, branch) and _within(facts, fork, branch, origin(add).owner):
            return skip, branch
    return None


class _Reach:
    """Which forks a node is computed from: bit sets over the nodes with several users, in one sweep.

    A bit is set in ``_weighted`` if something with weights (or a token mixer) lies between, in ``_activated`` if a
    nonlinearity does, in ``_deep`` if something with weights comes after a nonlinearity. Python integers as bit sets:
    a thousand forks cost 125 bytes a node.
    """

    def __init__(self, facts: Facts, adds: list[fx.Node]) -> None:
        self._bit: dict[fx.Node, int] = {}
        self._weighted: dict[fx.Node, int] = {}
        self._activated: dict[fx.Node, int] = {}
        self._deep: dict[fx.Node, int] = {}
        above: dict[fx.Node, int] = {}
        last = max((facts.order[add] for add in adds), default=-1)
        for node in facts.program.graph.nodes:
            if facts.order[node] > last:
                break
            sources = [n for n in facts.inputs[node] if n in facts.data]
            reached = weighted = activated = deep = 0
            for source in sources:
                reached |= above[source]
                weighted |= self._weighted[source]
                activated |= self._activated[source]
                deep |= self._deep[source]
            works = _works(facts, node)
            self._weighted[node] = reached if works else weighted
            self._deep[node] = activated if works else deep
            self._activated[node] = (
                reached if node in facts.nonlinearities or "attention" in opname(node) else activated
            )
            if node in facts.data and len(node.users) > 1:
                self._bit[node] = 1 << len(self._bit)
                reached |= self._bit[node]
            above[node] = reached

    def weighted(self, fork: fx.Node, node: fx.Node) -> bool:
        """Whether ``node`` is computed from ``fork`` through something with weights."""
        return bool(self._bit.get(fork, 0) & self._weighted[node])

    def deep(self, fork: fx.Node, node: fx.Node) -> bool:
        """Whether ``node`` is computed from ``fork`` through a nonlinearity and then something with weights."""
        return bool(self._bit.get(fork, 0) & self._deep[node])


def _works(facts: Facts, node: fx.Node) -> bool:
    """Whether a node uses weights or mixes tokens."""
    if node.op != "call_function" or node not in facts.data:
        return False
    if node in facts.projections or opname(node) in _MIXERS:
        return True
    return any(map(facts.program.is_parameter, node.all_input_nodes))


def _shortcut(facts: Facts, skip: fx.Node) -> fx.Node | None:
    """The input of a projection shortcut: at most one projection, norms, pools and views up to a fork; else None."""
    node, projected = skip, 0
    for _ in range(_SHORTCUT):
        if len(node.users) > 1 and node is not skip:
            return node if projected else None
        if node in facts.whole:
            projected += 1
            node = facts.whole[node].x
        elif opname(node) in _TRANSPARENT and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return None
        if projected > 1:
            return None
    return None


def _within(facts: Facts, fork: fx.Node, branch: fx.Node, owner: str) -> bool:
    """Whether everything between the fork and the branch is run by the module that adds."""
    start = facts.order[fork]
    seen, stack = {branch}, [branch]
    while stack:
        node = stack.pop()
        at = origin(node).owner
        if owner and at != owner and not at.startswith(owner + "."):
            return False
        for source in facts.inputs[node]:
            if source in facts.data and facts.order[source] > start and source not in seen:
                seen.add(source)
                stack.append(source)
    return True
