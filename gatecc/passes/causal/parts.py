"""Parts of a graph that mix tokens causally, found by running it.

However a recurrence is spelled (a loop over tokens that was unrolled, prefix sums, chunks), its tokens say what it is:
change a token of what goes in, and what comes out changes from that token on. Before the first mixing, values change at
that token alone. A `Part` is what lies between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from gatecc.ir.dataflow import Flow, value_inputs
from gatecc.ir.ops import CASTS, CONTRACTIONS, VIEWS, opname
from gatecc.ir.program import Program, fake, shape
from gatecc.ir.sizes import on_example
from gatecc.passes.trial import Trial, UntriedError

_SAME = 1e-10  # relative: the same number, computed again
_CONVOLUTIONS = frozenset("convolution conv1d".split())
_GROWING = _CONVOLUTIONS | frozenset("cat stack pad constant_pad_nd index embedding conv2d".split())
_SHOWN = VIEWS | CASTS | {"linear", "addmm"}
_LEAST = 4  # tokens: with fewer, what is causal cannot be told

Kind = Literal["token", "causal"]


@dataclass(frozen=True, eq=False)
class Part:
    """``nodes``: in order, ``out`` the last; ``axis``: of its tokens. ``operands``: the values that enter with a token
    axis each; ``held``: those that are the same for all tokens and come from weights or buffers."""

    out: fx.Node
    axis: int
    nodes: list[fx.Node]
    operands: dict[fx.Node, int]
    held: list[fx.Node]

    def run(self, program: Program, numbers: Mapping[fx.Node, Tensor]) -> Tensor:
        """What comes out of the part on numbers of one's own, in float64. Raises UntriedError."""
        trial = Trial(program, {node: x.clone() for node, x in numbers.items()}, lambda name, held: None)
        last = _last_uses(self.nodes)
        for at, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                if source not in trial and source not in value_inputs(node):  # its shape alone
                    trial[source] = torch.zeros(_sizes(source), dtype=torch.float64)
            trial.step(node)
            for done in last.get(at, ()):
                if done is not self.out:
                    trial.forget(done)
        found = trial[self.out]
        assert isinstance(found, Tensor)
        return found


@dataclass(eq=False)
class Probe:
    """Which values of some nodes have tokens. ``sources``: what enters, with the axis of its tokens; ``others``: what
    enters and has none."""

    program: Program
    flow: Flow
    nodes: Sequence[fx.Node]
    sources: Mapping[fx.Node, int]
    others: Sequence[fx.Node] = ()
    kinds: dict[fx.Node, tuple[Kind, int]] = field(default_factory=dict[fx.Node, "tuple[Kind, int]"])
    touched: set[fx.Node] = field(default_factory=set[fx.Node])  # nodes that depend on the sources
    origins: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    _tokens: int = 0

    def __post_init__(self) -> None:
        sizes = {on_example(shape(node)[axis]) or 0 for node, axis in self.sources.items()}
        self._tokens = next(iter(sizes)) if len(sizes) == 1 else 0
        for node, axis in self.sources.items():
            self.kinds[node] = ("token", axis)
            self.touched.add(node)
        if self._tokens >= _LEAST:
            self._run()

    def parts(self) -> list[Part]:
        """The parts that end in a value with causal tokens, the smallest first; each again with products of two values,
        such as keys times the strength of a delta rule, as part of it."""
        ends = [n for n in self.nodes if self.kinds.get(n, ("", 0))[0] == "causal" and len(shape(n)) in (3, 4)]
        found: list[Part] = []
        for node in ends:
            if not self._is_shown_before(node):
                first, second = self._part(node), self._part(node, products=True)
                found += [] if first is None else [first]
                found += [] if second is None or (first and second.operands == first.operands) else [second]
        return found

    def convolved(self) -> dict[fx.Node, int]:
        """The results of causal convolutions, cut to as many tokens as went in, with the axis of these."""
        found: dict[fx.Node, int] = {}
        for node, (kind, axis) in self.kinds.items():
            source = node.all_input_nodes[0] if node.all_input_nodes else node
            cut = opname(node) in ("slice", "narrow") and opname(source) in _CONVOLUTIONS
            if (
                kind == "causal"
                and on_example(shape(node)[axis]) == self._tokens
                and (cut or opname(node) in _CONVOLUTIONS)
            ):
                found[node] = axis
        return found

    def _is_shown_before(self, node: fx.Node) -> bool:
        """Whether a value is a view or a projection of one whose tokens are causal already."""
        source = node.all_input_nodes[0]
        return opname(node) in _SHOWN and source in self.kinds and len(shape(source)) in (3, 4)

    def _run(self) -> None:
        """Two runs side by side: as it is, and with a token changed."""
        places = (self._tokens // 3,)
        trials = self._trials(places)
        failed: set[fx.Node] = set()
        last = _last_uses(self.nodes)
        for at, node in enumerate(self.nodes):
            if node not in self.sources and node not in self.others:
                try:
                    self._judge(node, [_stepped(trial, node, failed) for trial in trials], places)
                except UntriedError:
                    failed.add(node)
            for done in last.get(at, ()):
                for trial in trials:
                    trial.forget(done)

    def _trials(self, places: Sequence[int]) -> list[Trial]:
        generator = torch.Generator().manual_seed(0)
        numbers = [dict[fx.Node, Tensor](), dict[fx.Node, Tensor]()]
        for node, axis in self.sources.items():
            x = numbers[0][node] = torch.randn(_sizes(node), generator=generator, dtype=torch.float64)
            for changed, place in zip(numbers[1:], places, strict=True):
                changed[node] = x.clone()
                token = changed[node].select(axis, place)
                token += torch.randn(token.shape, generator=generator, dtype=torch.float64)
        for node in self.others:
            x = torch.randn(_sizes(node), generator=generator, dtype=torch.float64)
            for known in numbers:
                known[node] = x
        weights: dict[str, Tensor] = {}

        def weight(name: str, held: Tensor) -> Tensor:
            if name not in weights:
                x = torch.randn(held.shape, generator=generator, dtype=torch.float64)
                weights[name] = x / max(held.shape[-1], 1) ** 0.5 if held.is_floating_point() else torch.zeros_like(x)
            return weights[name]

        return [Trial(self.program, known, weight) for known in numbers]

    def _judge(self, node: fx.Node, values: list[object], places: Sequence[int]) -> None:
        sources = [*value_inputs(node), *self.flow.writers.get(self.flow.base[node], ())]
        if any(n in self.touched for n in sources):
            self.touched.add(node)
            self.touched.add(self.flow.base[node])
        tensors = [v for v in values if isinstance(v, Tensor)]
        if len(tensors) < len(values) or node not in self.touched or not tensors[0].is_floating_point():
            return
        held, *changed = tensors
        axes = [axis for axis, size in enumerate(held.shape) if size >= self._tokens]  # more if padded to whole chunks
        differ = [_difference(held, x) for x in changed if axes]
        for axis in axes:
            hit = [d.movedim(axis, 0).flatten(1).any(1) if d.dim() > 1 else d for d in differ]
            if any(not bool(h[place]) or bool(h[:place].any()) for h, place in zip(hit, places, strict=True)):
                continue
            alone = all(int(h.sum()) == 1 for h in hit)
            after = all(bool(h[place + 1 :].any()) for h, place in zip(hit, places, strict=True))
            if alone or after:
                self.kinds[node] = ("token" if alone else "causal", axis)
                return

    def _part(self, out: fx.Node, *, products: bool = False) -> Part | None:
        """What lies before a value, up to values with tokens that are not mixed yet, the latest of these that are no
        larger than what they were made of; None if anything else enters."""
        order = self.flow.order
        inside: set[fx.Node] = set()
        operands: dict[fx.Node, int] = {}
        held: dict[fx.Node, None] = {}
        todo = [out]
        here = set(self.nodes)

        def enters(node: fx.Node) -> bool:
            if node in self.sources:
                return True
            both = opname(node) == "mul" and sum(n in self.touched for n in node.all_input_nodes) == 2
            return not self._is_outer(node) and not (products and (both or opname(node) == "unsqueeze"))

        while todo:
            node = todo.pop()
            if node in inside:
                continue
            inside.add(node)
            writers = [w for w in self.flow.writers.get(self.flow.base[node], ()) if order[w] < order[out]]
            for source in (*value_inputs(node), *writers):
                kind = self.kinds.get(source, ("", 0))
                if isinstance(source.meta.get("val"), int | torch.SymInt):
                    inside.add(source)
                elif kind[0] == "token" and len(shape(source)) in (3, 4) and enters(source):
                    operands[source] = kind[1]
                elif source not in self.touched and is_held(self.program, source):
                    held[source] = None
                elif source.op == "placeholder" or (source in self.touched and source not in here):
                    return None
                else:
                    todo.append(source)
        nodes = sorted(inside - set(operands), key=order.__getitem__)
        return Part(out, self.kinds[out][1], nodes, operands, sorted(held, key=order.__getitem__))

    def _is_outer(self, node: fx.Node) -> bool:
        """Whether a value is larger than what it was made of without weights: keys times values, repeated heads."""
        if node in self.sources:
            return False
        return math.prod(_sizes(node)) > self._origin(node)

    def _origin(self, node: fx.Node) -> int:
        """The size of the largest value that a value with tokens was made of."""
        if node not in self.origins:
            inputs = [n for n in value_inputs(node) if n in self.touched and fake(n) is not None]
            weighted = len(inputs) < len([n for n in value_inputs(node) if fake(n) is not None])
            own = node in self.sources or opname(node) in _GROWING or not inputs
            own |= weighted and opname(node) in CONTRACTIONS
            self.origins[node] = math.prod(_sizes(node)) if own else max(map(self._origin, inputs))
        return self.origins[node]


def is_held(program: Program, node: fx.Node) -> bool:
    """Whether a value comes from inputs, weights, buffers or constants: it may be another at the next call."""
    todo, seen = [node], {node}
    while todo:
        one = todo.pop()
        if one.op == "placeholder" and fake(one) is not None:
            return True
        if program.weight(one) is not None:
            return True
        todo += [n for n in value_inputs(one) if n not in seen]
        seen.update(one.all_input_nodes)
    return False


def _stepped(trial: Trial, node: fx.Node, failed: set[fx.Node]) -> object:
    """What a node holds, whose inputs may lie outside of the nodes that are run. Raises UntriedError."""
    if failed.intersection(node.all_input_nodes):
        raise UntriedError(node.name)
    for source in node.all_input_nodes:
        if source not in trial:
            trial.run(source)
    trial.step(node)
    return trial[node]


def _sizes(node: fx.Node) -> list[int]:
    return [on_example(size) or 1 for size in shape(node)]


def _last_uses(nodes: Sequence[fx.Node]) -> dict[int, list[fx.Node]]:
    """For each place in the order, the nodes that nobody after it needs."""
    last: dict[fx.Node, int] = {}
    for at, node in enumerate(nodes):
        for source in (node, *node.all_input_nodes):
            last[source] = at
    found: dict[int, list[fx.Node]] = {}
    for node, at in last.items():
        found.setdefault(at, []).append(node)
    return found


def _difference(one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        return torch.ones_like(one, dtype=torch.bool)
    return ~((one - other).abs() <= _SAME * one.abs().amax().clamp_min(1e-30)) & ~(one == other)
