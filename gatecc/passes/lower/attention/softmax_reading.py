"""What a spelled-out attention computes: softmax(scale * q k^T + terms, hidden keys aside), dropped out, times v.

Every operator between the product of queries and keys and the product with the values is read, or there is a reason
why not. Nothing is concluded from names or from example values here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.assemble import Parts
from gatecc.ir.match.attention.scores import find_scores, unshifted
from gatecc.ir.match.attention.values import is_binary
from gatecc.ir.ops import CASTS, DROPOUTS, RESHAPES, SAME_SHAPE, TRANSPOSES, argument, mutates, opname, same_call
from gatecc.ir.sizes import node_shape
from gatecc.passes.lower.attention.atoms import Cuts, Group, Layout, after, whole
from gatecc.passes.lower.attention.numbers import factor, filling, number
from gatecc.passes.lower.attention.sinks import Sinks, cut_off, joined

HIDING = -1e4  # a score at or below this has no weight beside one that is seen
LEAST = -65504.0  # of float16. Scores that are raised to a larger number are clamped
_MOVING = TRANSPOSES | RESHAPES | SAME_SHAPE | CASTS | frozenset(("unsqueeze", "squeeze", "expand"))


class UnreadableError(Exception):
    """Something that is no plain attention; the text is the reason."""


@dataclass(frozen=True, eq=False)
class Term:
    """``factor * node`` is added to the scores; reshaped before, if it has a ``shape``."""

    node: fx.Node
    layout: Layout
    factor: float
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Hidden:
    """Keys that get the score ``fill``: those where ``node`` is true, or false if ``seen``."""

    node: fx.Node
    layout: Layout
    fill: float
    seen: bool


@dataclass(frozen=True, eq=False)
class Multiplier:
    """``node`` multiplies, or divides, each query's scores."""

    node: fx.Node
    layout: Layout
    divides: bool


@dataclass(eq=False)
class Reading:
    """``letters``: the atoms behind each letter of the product of queries and keys; ``weights``: the layout of what
    meets the values; ``nan_is_zero``: weights that are no numbers become zeros; ``zeroed``: of ``hidden``, those that
    are hidden again after the softmax; ``inner``: the nodes that an operator replaces."""

    parts: Parts
    letters: dict[str, Group]
    cuts: Cuts = field(default_factory=Cuts)
    scale: float = 1.0
    softcap: float | None = None  # scores are softcap * tanh(uncapped * q k^T), and ``scale`` is softcap
    uncapped: float = 1.0
    terms: list[Term] = field(default_factory=list[Term])
    hidden: list[Hidden] = field(default_factory=list[Hidden])
    multipliers: list[Multiplier] = field(default_factory=list[Multiplier])
    moved: bool = False  # a number was added to the scores, which the softmax of them alone does not see
    floor: float | None = None  # scores are raised to it
    sinks: Sinks | None = None
    dropout: float = 0.0
    weights: Layout = ()
    nan_is_zero: bool = False
    zeroed: list[Hidden] = field(default_factory=list[Hidden])
    inner: set[fx.Node] = field(default_factory=set[fx.Node])

    @property
    def keys(self) -> Group:
        return self.letters[self.parts.keys]

    @property
    def empty_rows_are_zero(self) -> bool:
        """Whether queries that see no key yield zeros."""
        endless = self.floor is None and all(h.fill == -math.inf for h in self.hidden)
        return (self.nan_is_zero and endless) or bool(self.zeroed)


def read(parts: Parts, flow: Flow, training: bool) -> Reading:
    """Read the attention that a matcher found. Raises UnreadableError."""
    return _Reader(parts, flow, training).read()


class _Reader:
    def __init__(self, parts: Parts, flow: Flow, training: bool) -> None:
        assert parts.softmax is not None
        assert parts.scores is not None
        assert parts.weighted_sum is not None
        self.flow, self.training = flow, training
        self.softmax, self.scores, self.sum = parts.softmax, parts.scores, parts.weighted_sum
        self.shifted = unshifted(self.softmax.input, flow)
        if self.shifted is not self.softmax.input:  # read the scores, not their row's largest
            self.scores = find_scores(self.shifted, self.softmax.axis, flow) or self.scores
        shape = node_shape(parts.product.node) or ()
        letters = {a: whole(size) for a, size in zip(parts.product.axes, shape, strict=True)}
        self.reading = Reading(parts, letters)
        self.done: set[fx.Node] = set()

    def read(self) -> Reading:
        reading, product = self.reading, self.reading.parts.product
        if not reading.keys:
            raise UnreadableError("there is a single key")
        layout: Layout = tuple(reading.letters[a] for a in product.axes)
        reading.scale = self._keyword(product.node, "alpha")
        if product.addend is not None and (beta := self._keyword(product.node, "beta")):
            self._add_term(product.addend, layout, beta)
        node = product.node
        for step in self._steps(node, self.scores.path):
            layout, node = self._score(step, node, layout), step
        layout = self._normalise(self._joined(node, layout), layout)
        node, whole_rows = self.softmax.output, reading.sinks is not None
        for step in self._steps(node, [n for n in self.sum.path if n is not node]):
            if whole_rows and reading.sinks and cut_off(step, node, self._key_axis(layout), reading.sinks):
                node, whole_rows = step, False
                continue
            layout, node = self._weight(step, node, layout), step
        if whole_rows:
            raise UnreadableError("the weight of a further logit is not cut off before the values")
        reading.weights = layout
        reading.inner = self._inner()
        return reading

    def _steps(self, start: fx.Node, path: Any) -> Iterator[fx.Node]:
        """The nodes of a path, and what writes to the same tensor between them."""
        last = start
        for node in path:
            for writer in self.flow.writers.get(self.flow.base[last], ()):
                if self.flow.order[last] < self.flow.order[writer] < self.flow.order[node] and writer not in path:
                    if writer.args[0] is not last:
                        raise UnreadableError(f"a part of the scores is written to in place: {writer.name}")
                    self.done.add(writer)
                    yield writer
            self.done.add(node)
            yield node
            last = node

    # --- scores ---

    def _score(self, node: fx.Node, source: fx.Node, layout: Layout) -> Layout:
        name = opname(node)
        if name == "alias" and node.args[0] is not source and self.flow.base[node] is self.flow.base[source]:
            return layout  # a tensor that was written to in place, read once more
        found = after(node, source, layout, self.reading.cuts)
        if found is None:
            raise UnreadableError(f"the scores are changed by {name}")
        if self.reading.floor is not None and name in ("add", "sub", "where", "masked_fill"):
            raise UnreadableError("the scores are raised to a least number before they are masked")
        if name in ("add", "sub"):
            self._add(node, source, found)
        elif name in ("mul", "div"):
            self._multiply(node, source, found)
        elif name in ("where", "masked_fill"):
            self._hide(node, source, found)
        elif name in ("maximum", "max", "clamp", "clamp_min"):
            self._raise_to(node, source)
        elif name in DROPOUTS and not argument(node, 2, "train"):
            pass
        elif name == "tanh":
            self._cap()
        elif name not in _MOVING:
            raise UnreadableError(f"the scores are changed by {name}")
        elif name == "detach" and self.training:
            raise UnreadableError("no gradient passes the scores")
        return found

    def _cap(self) -> None:
        reading = self.reading
        if reading.softcap is not None or reading.terms or reading.hidden or reading.multipliers or reading.moved:
            raise UnreadableError("the scores are changed before they are capped")
        reading.scale, reading.uncapped, reading.softcap = 1.0, reading.scale, 1.0

    def _add(self, node: fx.Node, source: fx.Node, layout: Layout) -> None:
        one, other = node.args[0], node.args[1]
        if one is other or (opname(node) == "sub" and other is source):
            raise UnreadableError(f"the scores are changed by {opname(node)}")
        added = other if one is source else one
        times = self._keyword(node, "alpha")
        shift = number(added, self.flow)
        if shift is not None and abs(shift * times) < -HIDING:
            self.reading.moved |= bool(shift)
            return  # the same for all keys
        if not isinstance(added, fx.Node):
            raise UnreadableError("a number of the scores is not known")
        self._add_term(added, layout, -times if opname(node) == "sub" else times)

    def _keyword(self, node: fx.Node, name: str) -> float:
        found = number(node.kwargs.get(name, 1), self.flow)
        if found is None:
            raise UnreadableError(f"the {name} of {node.name} is not known")
        return found

    def _add_term(self, node: fx.Node, layout: Layout, times: float) -> None:
        aligned, shape = self._aligned(node, layout), node_shape(node) or ()
        fixed = tuple(size for size in shape if isinstance(size, int))
        source = node.args[0] if opname(node) in ("reshape_as", "view_as") and len(fixed) == len(shape) else None
        if isinstance(source, fx.Node):  # into the shape of the scores, which go away
            self.reading.terms.append(Term(source, aligned, times, fixed))
        else:
            self.reading.terms.append(Term(node, aligned, times))

    def _multiply(self, node: fx.Node, source: fx.Node, layout: Layout) -> None:
        reading, times = self.reading, factor(node, source, self.flow)
        if times is not None and times > 0:
            if reading.softcap is not None:
                reading.softcap *= times
            reading.scale *= times
            reading.terms = [replace(t, factor=t.factor * times) for t in reading.terms]
            reading.hidden = [replace(h, fill=h.fill * times) for h in reading.hidden]
            reading.floor = None if reading.floor is None else reading.floor * times
            return
        other = node.args[1] if node.args[0] is source else node.args[0]
        if times is not None or not isinstance(other, fx.Node) or (opname(node) == "div" and node.args[0] is other):
            raise UnreadableError("the scores are multiplied with what is no positive number")
        aligned = self._aligned(other, layout)
        if aligned[self._key_axis(layout)] or reading.terms or reading.hidden or reading.softcap:
            raise UnreadableError("the scores are multiplied with a tensor that is not the same for all keys")
        reading.multipliers.append(Multiplier(other, aligned, opname(node) == "div"))

    def _hide(self, node: fx.Node, source: fx.Node, layout: Layout) -> None:
        if opname(node) == "masked_fill":
            condition, filled, seen = node.args[1], node.args[2], False
        else:
            seen = node.args[1] is source
            condition, filled = node.args[0], node.args[2 if seen else 1]
        fill = filling(filled, self.flow)
        if fill is None or not isinstance(condition, fx.Node) or condition is source:
            raise UnreadableError("hidden keys get a score that is not known")
        self.reading.hidden.append(Hidden(condition, self._aligned(condition, layout), fill, seen))

    def _raise_to(self, node: fx.Node, source: fx.Node) -> None:
        bounds = [number(n, self.flow) for n in node.args[1:] if n is not None and n is not source]
        if opname(node) == "clamp" and len(node.args) > 2 and node.args[2] is not None:
            raise UnreadableError("the scores are clamped")
        if len(bounds) != 1 or bounds[0] is None or bounds[0] > LEAST:
            raise UnreadableError("the scores are clamped")
        self.reading.floor = max(bounds[0], self.reading.floor or bounds[0])

    def _aligned(self, node: fx.Node, layout: Layout) -> Layout:
        """The layout of a tensor that meets scores of a layout, with an axis for each of theirs."""
        shape = node_shape(node)
        if shape is None or len(shape) > len(layout):
            raise UnreadableError(f"{node.name} does not meet the scores axis by axis")
        padded = (1,) * (len(layout) - len(shape)) + tuple(shape)
        return tuple(() if isinstance(s, int) and s == 1 else g for s, g in zip(padded, layout, strict=True))

    def _key_axis(self, layout: Layout) -> int:
        keys = self.reading.keys
        at = [i for i, group in enumerate(layout) if group == keys]
        if not at:
            raise UnreadableError("the axis of the keys is cut or merged")
        return at[0]

    # --- the softmax ---

    def _joined(self, node: fx.Node, layout: Layout) -> fx.Node:
        """What the softmax normalises: the scores, or the scores with a logit that belongs to no key."""
        if not self.scores.sinks:
            return node
        cat = self.shifted
        while opname(cat) in CASTS and isinstance(cat.args[0], fx.Node):
            cat = cat.args[0]
        self._key_axis(layout)
        found = joined(cat, node, layout, self.reading.keys, self.flow)
        if isinstance(found, str) or self.reading.moved:
            raise UnreadableError(found if isinstance(found, str) else "a number is added to all scores but one")
        self.reading.sinks = found
        return self.shifted

    def _normalise(self, node: fx.Node, layout: Layout) -> Layout:
        if self.softmax.axis % len(layout) != self._key_axis(layout):
            raise UnreadableError("the softmax runs over another axis than the keys")
        if node is not self.shifted:
            raise UnreadableError(f"the scores are changed by {opname(self.softmax.input)}")
        for largest in self.softmax.input.args[1:2] if node is not self.softmax.input else ():
            if not isinstance(largest, fx.Node) or self._aligned(largest, layout)[self._key_axis(layout)]:
                raise UnreadableError("what is taken off the scores is not the same for all keys")
        if self.softmax.spelling == "manual" and self.softmax.exponential is not None:
            self._written_out(layout)
        for fill in [h.fill for h in self.reading.hidden] + [self.reading.floor or -math.inf]:
            if not fill <= HIDING:  # as it is scaled by now
                raise UnreadableError(f"hidden keys get the score {fill:g}, which leaves them some weight")
        return layout

    def _written_out(self, layout: Layout) -> None:
        """exp(x) / sum(exp(x)), and nothing else."""
        output, power = self.softmax.output, self.softmax.exponential
        if opname(output) == "exp":
            return  # of x less its logsumexp, or of log_softmax(x)
        above, below = output.args[0], output.args[1]
        if opname(output) == "mul" and above is not power:
            above, below = below, above
        total, sums = below, 0
        while isinstance(total, fx.Node) and total is not power:
            name = opname(total)
            guards = name in ("add", "clamp", "clamp_min") and (number(total.args[1], self.flow) or 1.0) <= 1e-7
            guards = guards and self._is_shifted()
            if name not in _MOVING | {"sum", "reciprocal"} and not guards:
                raise UnreadableError(f"the sum of a written-out softmax is changed by {name}")
            sums += name == "sum"
            total = total.args[0]
        if above is not power or total is not power or sums != 1:
            raise UnreadableError("weights are changed before they are divided by their sum")
        if any(len(node_shape(n) or ()) != len(layout) for n in (output, power) if n is not None):
            raise UnreadableError("the axes of a written-out softmax change")

    def _is_shifted(self) -> bool:
        """Whether the largest power is 1, beside which what keeps the sum from zero is nothing."""
        return self.shifted is not self.softmax.input

    # --- weights ---

    def _weight(self, node: fx.Node, source: fx.Node, layout: Layout) -> Layout:
        name, reading = opname(node), self.reading
        found = after(node, source, layout, reading.cuts)
        if found is None:
            raise UnreadableError(f"the weights are changed by {name}")
        if name in DROPOUTS:
            if argument(node, 2, "train"):
                if reading.dropout or name not in ("dropout", "native_dropout"):
                    raise UnreadableError("the weights are dropped out twice, or by another rule than one by one")
                reading.dropout = float(argument(node, 1, "p"))
        elif name == "nan_to_num" and argument(node, 1, "nan") in (None, 0, 0.0):
            reading.nan_is_zero = True
        elif name in ("masked_fill", "where") or (name == "mul" and is_binary(node.args[1])):
            self._zero(node, source)
        elif name not in _MOVING and not (name in ("mul", "div") and factor(node, source, self.flow) == 1.0):
            raise UnreadableError(f"the weights are changed by {name}")
        elif name == "detach" and self.training:
            raise UnreadableError("no gradient passes the weights")
        return found

    def _zero(self, node: fx.Node, source: fx.Node) -> None:
        """Keys whose weight becomes zero after the softmax must be those that were hidden before it."""
        condition = node.args[0] if opname(node) == "where" else node.args[1]
        seen = opname(node) == "where" and node.args[1] is source
        value = node.args[2 if opname(node) == "masked_fill" or seen else 1]
        hidden = [h for h in self.reading.hidden if _alike(condition, h.node) and h.seen == seen]
        if opname(node) == "mul" or not hidden or filling(value, self.flow) != 0:
            raise UnreadableError("keys are hidden after the softmax, so that the weights do not sum to one")
        self.reading.zeroed += hidden

    # --- what the operator replaces ---

    def _inner(self) -> set[fx.Node]:
        """All nodes between the two products. Raises UnreadableError if others read them."""
        product, core, order = self.reading.parts.product.node, self.reading.parts.core, self.flow.order
        end = order[core]
        below, stack = set[fx.Node](), [product]
        while stack:
            node = stack.pop()
            if node not in below and order[node] <= end:
                below.add(node)
                stack.extend(node.users)
        above, stack = set[fx.Node](), [core]
        while stack:
            node = stack.pop()
            if node in below and node not in above:
                above.add(node)
                stack.extend(node.all_input_nodes)
        inner = (above | (self.done & below)) - {core}
        for node in inner:
            for user in node.users:
                if user is not core and user not in inner:
                    raise UnreadableError(f"{_what(node, self.softmax.output, order)} are also read by {_reader(user)}")
            writers = self.flow.writers.get(self.flow.base[node], ()) if self.flow.base[node] in inner else ()
            if any(writer not in self.done for writer in writers) or (mutates(node) and node not in self.done):
                raise UnreadableError("scores or weights are written to in place")
        return inner


def _what(node: fx.Node, weights: fx.Node, order: Any) -> str:
    return "the weights" if order[node] >= order[weights] else "the scores"


def _reader(user: fx.Node) -> str:
    return "the caller" if user.op == "output" else user.name


def _alike(one: Any, other: fx.Node) -> bool:
    return one is other or (isinstance(one, fx.Node) and same_call(one, other))
