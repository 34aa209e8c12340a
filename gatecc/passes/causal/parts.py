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
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.ir.dataflow import Flow, value_inputs
from gatecc.ir.ops import CASTS, CONTRACTIONS, TRANSPOSES, VIEWS, opname
from gatecc.ir.program import Program, fake, shape
from gatecc.ir.sizes import Sizes, on_example
from gatecc.passes.causal.axes import rank
from gatecc.passes.causal.narrow import Narrow
from gatecc.passes.causal.settled import Settled
from gatecc.passes.trial import Trial, UntriedError

_SAME = 1e-10  # relative: the same number, computed again
CONVOLUTIONS = frozenset("convolution conv1d".split())
_GROWING = CONVOLUTIONS | frozenset("cat stack pad constant_pad_nd index embedding conv2d".split())
_SHOWN = VIEWS | CASTS | {"linear", "addmm"}
_LEAST = 4  # tokens: with fewer, what is causal cannot be told

Kind = Literal["token", "causal"]


@dataclass(frozen=True, eq=False)
class Part:
    """``nodes``: in order, ``out`` the last; ``axis``: of its tokens. ``operands``: the values that enter with a token
    axis each; ``held``: those that are the same for all tokens, weights and buffers; ``fixed``: numbers that buffers
    hold, which are read."""

    out: fx.Node
    axis: int
    nodes: list[fx.Node]
    operands: dict[fx.Node, int]
    held: list[fx.Node]
    fixed: Mapping[fx.Node, Tensor] = field(default_factory=dict[fx.Node, Tensor])

    def narrowed(self, symbols: Sizes | None = None) -> Narrow:
        """Sizes with which it may be tried: all tokens, and no more heads and features than tell it apart."""
        read = [(node, at) for node in self.fixed for at in range(rank(node))]
        return Narrow(self.nodes, [(self.out, self.axis), *self.operands.items(), *read], symbols)

    def run(self, program: Program, numbers: Mapping[fx.Node, Tensor], narrow: Narrow) -> Tensor:
        """What comes out of the part on numbers of one's own, in float64. Raises UntriedError."""
        known = {node: x.clone() for node, x in (*numbers.items(), *self.fixed.items())}
        trial = _trial(program, known, narrow)
        last = _last_uses(self.nodes)
        for at, node in enumerate(self.nodes):
            _step(trial, node, narrow)
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
    _entering: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])

    def __post_init__(self) -> None:
        sizes = {on_example(shape(node)[axis]) or 0 for node, axis in self.sources.items()}
        self._tokens = next(iter(sizes)) if len(sizes) == 1 else 0
        if self._tokens < _LEAST:
            return
        settled = Settled(self.flow, self.nodes, self.sources)
        self.touched = settled.touched
        nodes = settled.needed([n for n in self.nodes if n in self.touched and n not in settled.axes])
        self._entering = {n: axis for n, axis in settled.axes.items() if not self.touched.isdisjoint(n.users)}
        buffers = [(n, at) for n in nodes if read_buffer(self.program, n) is not None for at in range(rank(n))]
        narrow = Narrow(nodes, [*self._entering.items(), *buffers])
        self.kinds = {n: ("token", axis) for n, axis in settled.axes.items()}
        if not self._run(nodes, narrow) and narrow:  # something in it cannot be made narrow: it is tried as it is
            self._run(nodes, Narrow((), ()))

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
            cut = opname(node) in ("slice", "narrow") and opname(source) in CONVOLUTIONS
            if (
                kind == "causal"
                and on_example(shape(node)[axis]) == self._tokens
                and (cut or opname(node) in CONVOLUTIONS)
            ):
                found[node] = axis
        return found

    def _is_shown_before(self, node: fx.Node) -> bool:
        """Whether a value is a view or a projection of one whose tokens are causal already."""
        source = node.all_input_nodes[0]
        return opname(node) in _SHOWN and source in self.kinds and len(shape(source)) in (3, 4)

    def _run(self, nodes: Sequence[fx.Node], narrow: Narrow) -> bool:
        """Two runs side by side: as it is, and with a token changed. Whether every node could be run."""
        place = self._tokens // 3
        trials = self._trials(nodes, place, narrow)
        failed: set[fx.Node] = set()
        last = _last_uses(nodes)
        for at, node in enumerate(nodes):
            try:
                if failed.intersection(node.all_input_nodes):
                    raise UntriedError(node.name)
                for trial in trials:
                    _step(trial, node, narrow)
                if node in self.touched:
                    self._judge(node, [trial[node] for trial in trials], place)
            except UntriedError:
                failed.add(node)
            for done in last.get(at, ()):
                for trial in trials:
                    trial.forget(done)
        return not failed

    def _trials(self, nodes: Sequence[fx.Node], place: int, narrow: Narrow) -> list[Trial]:
        """What enters is random: small, so that sums of what may be log decays stay small. Buffers hold what they hold:
        one may be the mask; parameters are positive, because one may be a decay, of which the logarithm is taken."""
        generator = torch.Generator().manual_seed(0)
        known: dict[fx.Node, Tensor] = {}
        for node in (*self._entering, *self.others):
            held = fake(node)
            if held is not None and held.is_floating_point():
                known[node] = _drawn(narrow.sizes(node), generator)
        for node in nodes:
            read = read_buffer(self.program, node)
            if read is not None:
                known[node] = read
            elif self.program.weight_name(node) is not None:
                known[node] = _drawn(narrow.sizes(node), generator).abs().add(0.5)
        changed = dict(known)
        for node, axis in self._entering.items():
            if node in known:
                x = changed[node] = known[node].clone()
                token = x.select(axis, place)
                token += _drawn(token.shape, generator)
        return [_trial(self.program, numbers, narrow) for numbers in (known, changed)]

    def _judge(self, node: fx.Node, values: list[object], place: int) -> None:
        held, changed = values
        if not isinstance(held, Tensor) or not isinstance(changed, Tensor) or not held.is_floating_point():
            return
        axes = [axis for axis, size in enumerate(held.shape) if size >= self._tokens]  # more if padded to whole chunks
        differ = _difference(held, changed) if axes else held
        for axis in axes:
            hit = differ.movedim(axis, 0).flatten(1).any(1) if differ.dim() > 1 else differ
            if not bool(hit[place]) or bool(hit[:place].any()):
                continue
            alone, after = int(hit.sum()) == 1, bool(hit[place + 1 :].any())
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
                    turned = self._turned(source)
                    if turned is not None and enters(turned):
                        todo.append(source)
                    else:
                        operands[source] = kind[1]
                elif source not in self.touched and _is_root(source, here) and is_held(self.program, source):
                    held[source] = None
                elif source.op == "placeholder" or (source in self.touched and source not in here):
                    return None
                else:
                    todo.append(source)
        nodes = sorted(inside - set(operands), key=order.__getitem__)
        return Part(out, self.kinds[out][1], nodes, operands, sorted(held, key=order.__getitem__))

    def _turned(self, node: fx.Node) -> fx.Node | None:
        """What a value is with its axes in another order, so that two orders of one value do not enter as two."""
        source = node.args[0] if opname(node) in TRANSPOSES else None
        known = isinstance(source, fx.Node) and self.kinds.get(source, ("", 0))[0] == "token"
        return source if known and len(shape(source)) == len(shape(node)) else None  # pyright: ignore[reportReturnType, reportArgumentType]  a node

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


def read_buffer(program: Program, node: fx.Node) -> Tensor | None:
    """The numbers that a buffer holds now, in float64 if they are no whole ones; None for all else."""
    held = None if program.is_parameter(node) else program.weight(node)
    if held is None or isinstance(held, FakeTensor):
        return None
    held = held.detach().cpu()
    return held.double() if held.is_floating_point() else held


def _is_root(node: fx.Node, here: set[fx.Node]) -> bool:
    """Whether a value is a weight, an input, or comes from elsewhere: nobody looks at what it is made of."""
    return node.op != "call_function" or node not in here


def _trial(program: Program, known: Mapping[fx.Node, Tensor], narrow: Narrow) -> Trial:
    return Trial(program, known, lambda name, held: None, symbols=narrow.symbols, shapes=narrow.argument)


def _step(trial: Trial, node: fx.Node, narrow: Narrow) -> None:
    """Compute a node, of some of whose inputs only the shape matters. Raises UntriedError."""
    for source in node.all_input_nodes:
        if source not in trial and source not in value_inputs(node):
            trial[source] = torch.zeros(narrow.sizes(source), dtype=torch.float64)
    trial.step(node)


def _drawn(sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    return 0.2 * torch.rand(sizes, generator=generator, dtype=torch.float64) - 0.1


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
