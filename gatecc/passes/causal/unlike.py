"""What sets causal mixing apart from every linear attention, where no assignment of its values to roles was found.

Each of the operator's rules is linear in its queries and in its values, treats every value channel alike, and reads a
token's own value as it reads that of an earlier one. Which of these does not hold is found by running the part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from gatecc.ir.program import Program
from gatecc.passes.causal.narrow import Narrow
from gatecc.passes.causal.parts import Part
from gatecc.passes.trial import UntriedError

_TOLERANCE = 1e-6  # in float64, relative to the largest number
_LOOKS = 6  # tokens behind one that alone is written: no decay has made them nothing by then

NONLINEAR = "no value that it writes enters linearly, so no sum holds it (RWKV-4 divides by sums of exponentials)"
SECOND_ORDER = "queries enter it in second order (as in Based): the operator's state has keys, not products of them"
NORMALIZED = "what it reads is not linear in the queries (xLSTM divides by the larger of two numbers)"
PAIRS = "each pair of a key and a value channel has a decay (as in Mamba-1); the operator has decays of key channels"
AVERAGE = "it divides by the sum of its weights inside of the recurrence (as RWKV-4 does)"
BONUS = "a token counts itself in another way than later ones count it (a bonus, as in RWKV-5 and 6, or a skip)"
TRANSITION = "its state changes neither by decays nor by a delta rule along the key that it writes (as in RWKV-7)"


def unlike(program: Program, part: Part) -> str:
    """The first of these that holds; empty if the part cannot be run."""
    for narrow in (part.narrowed(), Narrow((), ())):
        try:
            return _Tried(program, part, narrow).reason()
        except UntriedError:
            continue
    return ""


class _Tried:
    def __init__(self, program: Program, part: Part, narrow: Narrow) -> None:
        self.program, self.part, self.narrow = program, part, narrow
        self.generator = torch.Generator().manual_seed(0)
        held = {node: self._drawn(node) + 0.5 for node in part.held}
        self.numbers = held | {node: self._drawn(node) for node in part.operands}
        self.constant = held | {node: self._constant(node, axis) for node, axis in part.operands.items()}
        self.usual = self._run({})

    def reason(self) -> str:
        """Raises UntriedError."""
        if not bool(self.usual.isfinite().all()) or self.usual.size(0) <= _LOOKS:
            return ""
        readers = [node for node in self.part.operands if self._reads(node)]
        writers = [node for node in self.part.operands if node not in readers]
        values = [node for node in writers if self._is_linear(node)]
        if not values:
            return NONLINEAR
        queries = [node for node in readers if self._is_linear(node)]
        if not queries:
            return SECOND_ORDER if any(map(self._is_of_second_order, readers)) else NORMALIZED
        if any(self._averages(node, writers) for node in values):
            return AVERAGE
        if not all(self._treats_channels_alike(node) for node in values):
            return PAIRS
        return BONUS if any(self._counts_itself(query, node) for query in queries for node in values) else TRANSITION

    def _reads(self, node: fx.Node) -> bool:
        """Whether a token of a value only matters to the output of that token."""
        x = self.numbers[node].clone()
        x.select(self.part.operands[node], 0).mul_(1.5)
        return _is_same(self._run({node: x})[1:], self.usual[1:])

    def _is_linear(self, node: fx.Node) -> bool:
        one, other = self.numbers[node], self._drawn(node)
        both = self._run({node: one + other})
        return _is_same(both, self.usual + self._run({node: other}))

    def _is_of_second_order(self, node: fx.Node) -> bool:
        zero, one, two, three = (self._run({node: self.numbers[node] * times}) for times in range(4))
        return _is_same(three + 3 * one, 3 * two + zero)

    def _averages(self, value: fx.Node, writers: list[fx.Node]) -> bool:
        """Whether nothing else that is written matters where all values are the same."""
        ones = torch.ones_like(self.numbers[value])
        changed = {node: self._drawn(node) for node in writers if node is not value}
        return bool(changed) and _is_same(self._run({value: ones, **changed}), self._run({value: ones}))

    def _treats_channels_alike(self, value: fx.Node) -> bool:
        """Whether a token leaves the next one the same share of each of its value's channels."""
        y = self._run({**self.constant, value: self._first(value)})
        if y.dim() < 2 or y.size(-1) < 2:
            return True
        return _is_same(y[1] * y[0][..., :1], y[1][..., :1] * y[0])

    def _counts_itself(self, query: fx.Node, value: fx.Node) -> bool:
        """Whether what one channel of a query reads of the first token decays evenly, but for the first step."""
        x = self.constant[query].clone()
        x[..., 1:] = 0
        y = self._run({**self.constant, value: self._first(value), query: x})
        steps = [(y[n + 1] * y[n + 1], y[n] * y[n + 2]) for n in range(3)]
        return not _is_same(*steps[0]) and _is_same(*steps[1]) and _is_same(*steps[2])

    def _first(self, node: fx.Node) -> Tensor:
        """The first token of a value alone."""
        x = self.constant[node].clone()
        x.movedim(self.part.operands[node], 0)[1:] = 0
        return x

    def _constant(self, node: fx.Node, axis: int) -> Tensor:
        """Numbers that are the same for all tokens."""
        x = self._drawn(node)
        return x.narrow(axis, 0, 1).expand_as(x).clone()

    def _drawn(self, node: fx.Node) -> Tensor:
        return 0.3 + 0.3 * torch.rand(self.narrow.sizes(node), generator=self.generator, dtype=torch.float64)

    def _run(self, other: Mapping[fx.Node, Tensor]) -> Tensor:
        """The output, tokens first."""
        return self.part.run(self.program, {**self.numbers, **other}, self.narrow).movedim(self.part.axis, 0)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())
