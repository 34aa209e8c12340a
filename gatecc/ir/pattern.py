"""Pattern: a small piece of a graph, written down as it reads, and found wherever a program holds it.

    x, weight = anything("x"), anything("weight")
    variance = call("mean", call("pow", x, 2), [-1], True)
    inverse = call("rsqrt", call("add", variance, constant(lambda e: 0 < e < 1e-3, "eps")))
    rms_norm = Pattern("rms_norm", call("mul", call("mul", x, through(CASTS, inverse)), weight))
    for match in Patterns(rms_norm).find(flow).matches:
        match["x"], match.constants["eps"], match.inner

- An operator is meant by its name ("add": every overload, in place or not) or by one overload ("add.Tensor"); several
  are words of one text, or a set.
- Operands stand in the order of the operator's arguments, in either order where it is COMMUTATIVE. Further arguments
  stand by their names. An argument that is not mentioned must have its default: ``call("add", x, y)`` is no
  ``x + 2 * y``. A last ``...`` leaves the rest free.
- A number, a text, None or a list of these means itself; a list of parts means a list of nodes.
- A name that stands twice means one value: the same node, or the same call written twice.

What nearly fits is answered with the reason, so that a refusal can say it. Finding is linear in the graph: only nodes
that call a root operator of a pattern are looked at, and from each as many others as the pattern has parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, cast

from torch import fx
from torch._ops import OpOverload

from gatecc.errors import ArgumentError
from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import opname, same_call
from gatecc.ir.program import origin
from gatecc.ir.scalars import scalar

COMMUTATIVE = frozenset("add mul maximum minimum eq ne logical_and logical_or bitwise_and bitwise_or".split())
_LONGEST = 16  # nodes that ``through`` steps over

Reason = str  # why something does not fit; "" if it does


@dataclass(frozen=True, eq=False)
class Match:
    """A pattern found at ``root``. ``inner``: the nodes that its operators stand for, the root included."""

    pattern: Pattern
    root: fx.Node
    nodes: Mapping[str, fx.Node]
    constants: Mapping[str, Any]
    inner: frozenset[fx.Node]

    def __getitem__(self, name: str) -> fx.Node:
        return self.nodes[name]

    @property
    def read_outside(self) -> list[fx.Node]:
        """The inner nodes, the root aside, that others read: a rewrite that replaces the root does not remove them."""
        return sorted(n for n in self.inner - {self.root} if not set(n.users) <= self.inner)


@dataclass(frozen=True, eq=False)
class NearMiss:
    """Where more of a pattern than its root fitted, and why the rest did not."""

    pattern: Pattern
    root: fx.Node
    reason: Reason

    def __str__(self) -> str:
        return f"{origin(self.root).line or self.root.name}: no {self.pattern.name}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Found:
    """``matches`` and ``misses`` in the order of their roots."""

    matches: list[Match] = field(default_factory=list[Match])
    misses: list[NearMiss] = field(default_factory=list[NearMiss])


@dataclass(frozen=True, eq=False)
class Pattern:
    """``root`` is what the last operator of the piece yields. ``check`` looks at a match and says why it is none."""

    name: str
    root: Part
    check: Callable[[Match], Reason] | None = None

    def at(self, node: fx.Node, flow: Flow) -> Match | NearMiss | None:
        """What is found at one node."""
        attempt = _Attempt(flow)
        for state in self.root.fit(node, _State(), attempt):
            nodes = {name: value for name, value in state.bound.items() if isinstance(value, fx.Node)}
            constants = {name: value for name, value in state.bound.items() if name not in nodes}
            match = Match(self, node, nodes, constants, frozenset(state.inner))
            if not (reason := self.check(match) if self.check else ""):
                return match
            attempt.furthest, attempt.reason = len(state.inner) + 1, reason
        return NearMiss(self, node, attempt.reason) if attempt.furthest > 1 else None


class Patterns:
    """Several patterns, by their root operators. At one node the first that fits is meant."""

    def __init__(self, *patterns: Pattern) -> None:
        self._by_root: dict[str, list[Pattern]] = {}
        for pattern in patterns:
            for name in sorted(_roots(pattern.root)):
                self._by_root.setdefault(name, []).append(pattern)

    def at(self, node: fx.Node, flow: Flow) -> Match | None:
        """The match at one node."""
        found = (pattern.at(node, flow) for pattern in self._by_root.get(opname(node), ()))
        return next((match for match in found if isinstance(match, Match)), None)

    def find(self, flow: Flow) -> Found:
        """All matches in a program, and what nearly matches where nothing does."""
        result = Found()
        for node in flow.program.calls():
            missed: list[NearMiss] = []
            for pattern in self._by_root.get(opname(node), ()):
                outcome = pattern.at(node, flow)
                if isinstance(outcome, Match):
                    result.matches.append(outcome)
                    missed = []
                    break
                missed += [outcome] if outcome is not None else []
            result.misses.extend(missed)
        return result


# --- what patterns are written with -----------------------------------------------------------------------------------


def anything(name: str = "", where: Callable[[fx.Node], Reason] | None = None) -> Part:
    """Any node; ``where`` answers why it is none that is meant."""
    return _Anything(name, where)


def constant(value: Any = ..., name: str = "") -> Part:
    """A Python value in the graph, or a tensor of one number that depends on no input and no parameter.

    ``value``: what it must be, or a function that says whether it is meant; ``...`` for any.
    """
    return _Constant(name, value)


def call(
    operators: str | Collection[str],
    *operands: Any,
    name: str = "",
    where: Callable[[fx.Node], Reason] | None = None,
    **arguments: Any,
) -> Part:
    """A call of one of the operators; see the head of this module."""
    free = bool(operands) and isinstance(operands[-1], EllipsisType)
    parts = tuple(map(_part, operands[:-1] if free else operands))
    words = operators.split() if isinstance(operators, str) else operators
    return _Call(name, frozenset(words), parts, {key: _part(value) for key, value in arguments.items()}, free, where)


def one_of(*parts: Part) -> Part:
    """The first of several parts that fits. ``one_of(call("add", y, bias), y)`` is an optional bias."""
    return _OneOf("", parts)


def through(operators: Collection[str], part: Part) -> Part:
    """A part that may be seen through operators that are not meant (casts, views), followed by their first operand."""
    return _Through("", frozenset(operators), part)


def _part(value: Any) -> Part:
    if isinstance(value, Part):
        return value
    if isinstance(value, list | tuple):
        items = list(cast("list[Any]", value))
        return (
            _Several("", tuple(map(_part, items))) if any(isinstance(i, Part) for i in items) else _Constant("", items)
        )
    return _Constant("", value)


# --- how they fit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _State:
    """What is known once some parts fit. ``bound``: nodes and constants by name; ``inner``: the nodes taken."""

    bound: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inner: tuple[fx.Node, ...] = ()

    def taking(self, *nodes: fx.Node) -> _State:
        return _State(self.bound, (*self.inner, *nodes))


class _Attempt:
    """One node tried: the reason of the try that went furthest."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.furthest = 0
        self.reason = ""

    def miss(self, state: _State, reason: Reason) -> None:
        if len(state.inner) > self.furthest:
            self.furthest, self.reason = len(state.inner), reason

    def bind(self, state: _State, name: str, value: Any) -> _State | None:
        """The state in which a name means a value; None if it means another one."""
        if not name:
            return state
        if name not in state.bound:
            return _State({**state.bound, name: value}, state.inner)
        if self._equal(state.bound[name], value):
            return state
        self.miss(state, f"{name} is {_shown(state.bound[name])} in one place and {_shown(value)} in another")
        return None

    def _equal(self, one: Any, other: Any) -> bool:
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            return _same(one, other)
        flow = self.flow
        written = any(flow.writers.get(flow.base.get(n, n)) for n in (one, *one.all_input_nodes))
        return one is other or (same_call(one, other) and not written)


@dataclass(frozen=True, eq=False)
class Part(ABC):
    """A part of a pattern. ``name``: what the match calls it."""

    name: str

    @abstractmethod
    def fit(self, value: Any, state: _State, attempt: _Attempt) -> Iterator[_State]:
        """The states in which the part means a value of the graph."""


@dataclass(frozen=True, eq=False)
class _Anything(Part):
    where: Callable[[fx.Node], Reason] | None

    def fit(self, value: Any, state: _State, attempt: _Attempt) -> Iterator[_State]:
        reason = (
            f"{_shown(value)} is no node" if not isinstance(value, fx.Node) else self.where(value) if self.where else ""
        )
        if reason:
            attempt.miss(state, reason)
        elif (bound := attempt.bind(state, self.name, value)) is not None:
            yield bound


@dataclass(frozen=True, eq=False)
class _Constant(Part):
    value: Any

    def fit(self, value: Any, state: _State, attempt: _Attempt) -> Iterator[_State]:
        known = scalar(value, attempt.flow) if isinstance(value, fx.Node) else value
        if isinstance(value, fx.Node) and known is None:
            return attempt.miss(state, f"{_shown(value)} is no constant")
        meant = self.value(known) if callable(self.value) else self.value is ... or _same(known, self.value)
        if not meant:
            wanted = "another constant" if callable(self.value) else _shown(self.value)
            return attempt.miss(state, _instead(known, wanted))
        if (bound := attempt.bind(state, self.name, known)) is not None:
            yield bound


@dataclass(frozen=True, eq=False)
class _Several(Part):
    parts: tuple[Part, ...]

    def fit(self, value: Any, state: _State, attempt: _Attempt) -> Iterator[_State]:
        if isinstance(value, list | tuple) and len(cast("list[Any]", value)) == len(self.parts):
            yield from _fit_all(list(zip(self.parts, cast("list[Any]", value), strict=True)), state, attempt)
        else:
            attempt.miss(state, _instead(value, f"a list of {len(self.parts)}"))


@dataclass(frozen=True, eq=False)
class _Call(Part):
    operators: frozenset[str]
    operands: tuple[Part, ...]
    arguments: Mapping[str, Part]
    free: bool
    where: Callable[[fx.Node], Reason] | None

    def fit(self, value: Any, state: _State, attempt: _Attempt) -> Iterator[_State]:
        if not isinstance(value, fx.Node) or not self._calls(value):
            return attempt.miss(
                state, f"{_shown(value)} stands where {' or '.join(sorted(self.operators))} is expected"
            )
        if (bound := attempt.bind(state, self.name, value)) is None:
            return None
        after, given = bound.taking(value), _arguments(value)
        if reason := self._unlike(value, given) or (self.where(value) if self.where else ""):
            return attempt.miss(after, reason)
        values = [argument for argument, _ in given.values()][: len(self.operands)]
        named = [(part, given[key][0]) for key, part in self.arguments.items()]
        orders = [self.operands]
        if opname(value) in COMMUTATIVE and len(self.operands) == 2:
            orders += [self.operands[::-1]]
        for order in orders:
            yield from _fit_all([*zip(order, values, strict=True), *named], after, attempt)

    def _calls(self, node: fx.Node) -> bool:
        target = node.target
        overload = f"{opname(node)}.{target._overloadname}" if isinstance(target, OpOverload) else ""
        return node.op == "call_function" and not self.operators.isdisjoint((opname(node), overload))

    def _unlike(self, node: fx.Node, given: Mapping[str, tuple[Any, bool]]) -> Reason:
        """Why the call has other arguments than the pattern names."""
        missing = [key for key in self.arguments if key not in given]
        if missing or len(given) < len(self.operands):
            return f"{_shown(node)} has no argument {' or '.join(missing) or len(self.operands)}"
        mentioned = {*list(given)[: len(self.operands)], *self.arguments}
        others = [key for key, (_, is_default) in given.items() if key not in mentioned and not is_default]
        return f"{_shown(node)} has {others[0]}={_shown(given[others[0]][0])}" if others and not self.free else ""


@dataclass(frozen=True, eq=False)
class _OneOf(Part):
    parts: tuple[Part, ...]

    def fit(self, value: Any, state: _State, attempt: _Attempt) -> Iterator[_State]:
        for part in self.parts:
            yield from part.fit(value, state, attempt)


@dataclass(frozen=True, eq=False)
class _Through(Part):
    operators: frozenset[str]
    part: Part

    def fit(self, value: Any, state: _State, attempt: _Attempt) -> Iterator[_State]:
        """The deepest value first: a wildcard means what lies behind all of them."""
        chain = [value]
        while len(chain) < _LONGEST and isinstance(value, fx.Node) and opname(value) in self.operators and value.args:
            value = value.args[0]
            chain.append(value)
        for at in range(len(chain) - 1, -1, -1):
            for after in self.part.fit(chain[at], state, attempt):
                yield after.taking(*chain[:at])


def _fit_all(pairs: list[tuple[Part, Any]], state: _State, attempt: _Attempt) -> Iterator[_State]:
    if not pairs:
        yield state
        return
    (part, value), *rest = pairs
    for after in part.fit(value, state, attempt):
        yield from _fit_all(rest, after, attempt)


def _roots(part: Part) -> set[str]:
    if isinstance(part, _Call):
        return {name.partition(".")[0] for name in part.operators}
    if isinstance(part, _OneOf):
        return {name for choice in part.parts for name in _roots(choice)}
    raise ArgumentError(
        "a pattern ends in an operator", found=type(part).__name__, expected="call(...) or one_of(calls)"
    )


def _arguments(node: fx.Node) -> dict[str, tuple[Any, bool]]:
    """The arguments of a call in order, those that are left out too, each with whether it is the default."""
    if not isinstance(node.target, OpOverload):
        return {str(at): (value, False) for at, value in enumerate(node.args)}
    result: dict[str, tuple[Any, bool]] = {}
    for at, made in enumerate(node.target._schema.arguments):
        default = made.default_value if made.has_default_value() else ...
        value = node.args[at] if at < len(node.args) else node.kwargs.get(made.name, default)
        result[made.name] = value, made.has_default_value() and _same(value, default)
    return result


def _same(one: Any, other: Any) -> bool:
    """Whether two Python values are equal; True is not 1, and a list is what a tuple is."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        mine, theirs = list(cast("list[Any]", one)), list(cast("list[Any]", other))
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    if isinstance(one, fx.Node) or isinstance(other, fx.Node) or isinstance(one, bool) != isinstance(other, bool):
        return one is other
    return bool(one == other)


def _instead(value: Any, wanted: str) -> Reason:
    return f"{_shown(value)} stands where {wanted} is expected"


def _shown(value: Any) -> str:
    return (opname(value) or value.name) if isinstance(value, fx.Node) else repr(value)
