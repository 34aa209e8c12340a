"""Which recurrence a part of a graph computes: the roles of its operands, proved by running both in float64.

What a value is, the numbers say: each way to take what enters for q, k, v, a decay, the strength of a delta rule is
compared with ``gatecc::linear_attention``. One that agrees on the first tokens is proved on all of them, with weak
gates, strong ones, and a few very strong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.ir.ops import CASTS, VIEWS, opname
from gatecc.ir.program import Program, shape
from gatecc.ir.sizes import Sizes, on_example
from gatecc.passes.causal.bounds import Bounds
from gatecc.passes.causal.held import images
from gatecc.passes.causal.lengths import other_sizes
from gatecc.passes.causal.narrow import Narrow
from gatecc.passes.causal.parts import CONVOLUTIONS, Part, read_buffer
from gatecc.passes.causal.roles import Formula, Operand, Places, compute, spread
from gatecc.passes.trial import Trial, UntriedError
from gatecc.passes.unseen import scales

_TOLERANCE = 1e-6  # of a token in float64, relative to its largest number
_ROUNDED = 2e-5  # of one that comes of numbers that were rounded to float32
NEAREST = "the nearest recurrence"  # so begins the reason where one was compared
NEGATIVE = "its state is multiplied by a number that may be negative, of which the operator has no logarithm"
FREE = "the length is free"  # and so where one held on the example alone
MOST = 6  # values that may enter
_FIRST = 48  # tokens by which assignments are told apart; the very first tells most, whatever the decay

_ErrorOn = Callable[["Formula", int], float]  # of a formula, on so many first tokens


def find_formula(program: Program, part: Part) -> Formula | str:
    """What a part computes, or why it is nothing that the operator does. Raises UntriedError."""
    if len(part.operands) == 1 and opname(part.out) in CONVOLUTIONS:
        return "a short causal convolution stays one"
    if not 2 <= len(part.operands) <= MOST:
        return f"{len(part.operands)} values enter it"
    if not _has_one_length(part, Narrow((), ())):
        return "its values have different numbers of tokens"
    if len(part.held) > MOST:
        return f"it reads {len(part.held)} weights or buffers"
    whole = any(not n.meta["val"].is_floating_point() for n in part.held)
    formula = "it reads a mask" if whole else _tried(program, part, {}, _Search.found)
    read = _read(program, part) if isinstance(formula, str) else None
    if read is not None and isinstance(found := _tried(program, read, {}, _Search.found), Formula):
        part, formula = read, replace(found, assumes=tuple(n.name for n in read.fixed))
    sizes = {} if isinstance(formula, str) else other_sizes(program, part)
    if isinstance(formula, str) or not sizes:
        return formula
    return sizes if isinstance(sizes, str) else _tried(program, part, sizes, lambda at: at.confirmed(formula))


def _read(program: Program, part: Part) -> Part | None:
    """The part with the numbers of its buffers, if it has no weights but these: masks, decays of pairs of tokens."""
    given = [(node, read_buffer(program, node)) for node in part.held]
    fixed = {n: x for n, x in given if x is not None}
    return replace(part, held=[], fixed=fixed) if fixed and len(fixed) == len(part.held) else None


def _tried(program: Program, part: Part, sizes: Sizes, how: Callable[[_Search], Formula | str]) -> Formula | str:
    """What a search finds with free sizes as given, and with narrow ones where that can be."""
    narrow = part.narrowed(sizes)
    if narrow:
        try:
            return how(_Search(program, part, narrow))
        except UntriedError:
            pass  # something in it cannot be made narrow: it is tried as it is
    return how(_Search(program, part, Narrow((), (), sizes)))


class _Search:
    def __init__(self, program: Program, part: Part, narrow: Narrow) -> None:
        self.program, self.part, self.narrow = program, part, narrow
        self.generator = torch.Generator().manual_seed(0)
        self.tolerance = _ROUNDED if part.fixed else _TOLERANCE
        self.bounds = Bounds(program)
        self.out = _places(len(shape(part.out)), part.axis)
        sizes = narrow.sizes(part.out)
        self.heads = 1 if self.out[1] < 0 else sizes[self.out[1]]
        self.width = 1 if self.out[3] < 0 else sizes[self.out[3]]
        if len(shape(part.out)) == 3 and any(
            len(shape(n)) == 4 for n in part.operands
        ):  # (B, N, H): one number per head
            heads = next(i for i in (1, 2) if i != part.axis)
            self.out, self.heads, self.width = (0, heads, part.axis, -1), sizes[heads], 1

    def found(self) -> Formula | str:
        """The first assignment that is proved. On the first tokens most are told apart, at little cost."""
        operands = [Operand(n, self._places_of(n, axis)) for n, axis in self.part.operands.items()]
        held = [x for node in images(self.part.nodes, self.part.held) if (x := self._held(node)) is not None]
        if any(self.heads % self._heads_of(x) for x in operands):
            return "the heads of what enters it do not fit those of what leaves it"
        nearest, negative = float("inf"), False
        for low, high, domains in ((-0.1, -0.01, ("", "logit")), (0.01, 0.1, ("factor",))):
            entering = (*self.part.operands, *self.part.held)
            numbers = self._imaged({node: self._uniform(node, low, high) for node in entering}, held)
            theirs = spread(self._run(numbers), self.out)

            def error_on(
                formula: Formula, first: int, numbers: Mapping[fx.Node, Tensor] = numbers, theirs: Tensor = theirs
            ) -> float:
                return self._fitted(formula, numbers, theirs, first)[1]

            for formula in self._assignments(operands, held, domains, error_on):
                error = error_on(formula, 1)
                error = error_on(formula, _FIRST) if error <= self.tolerance else error
                if error <= self.tolerance and not self._has_logarithm(formula):
                    negative = True
                elif error <= self.tolerance:
                    proved, error = self._proved(formula)
                    if proved is not None:
                        return proved
                nearest = min(nearest, error)
        if negative:
            return NEGATIVE
        return (
            f"{NEAREST} differs by {nearest:.1e}" if nearest < float("inf") else "no sizes of queries, keys and values"
        )

    def confirmed(self, formula: Formula) -> Formula | str:
        """The formula if it holds at these sizes too."""
        tokens = self.narrow.sizes(self.part.out)[self.part.axis]
        if not _has_one_length(self.part, self.narrow):
            return f"{FREE}, and at {tokens} tokens its values have different numbers of them"
        found, error = self._proved(formula, formula.scale)
        if found is not None:
            return formula
        return f"{FREE}, and at {tokens} tokens it differs by {error:.1e} from what it is on the example"

    def _assignments(
        self, operands: list[Operand], held: list[Operand], domains: tuple[str, ...], error_on: _ErrorOn
    ) -> Iterator[Formula]:
        """Each way to give every operand a role that its size allows."""
        for q, k in permutations(operands, 2):
            if self._heads_of(q) != self.heads or self._width(q) != self._width(k):
                continue
            rest = [x for x in operands if x not in (q, k)]
            for v in (*rest, None):
                if self.width != (1 if v is None else self._width(v)):
                    continue
                gates = [x for x in rest if x is not v]
                yield from self._gated(Formula(q, k, self.out, v), gates, held, domains, error_on)

    def _gated(
        self, start: Formula, gates: list[Operand], held: list[Operand], domains: tuple[str, ...], error_on: _ErrorOn
    ) -> Iterator[Formula]:
        if not gates and not held:
            if "" not in domains:
                return
            yield start
            if error_on(start, 1) <= self.tolerance and (constant := self._constant(start)) is not None:
                yield replace(start, constant=constant)
        if len(gates) > 3:
            return
        for roles in permutations(("decay", "beta", "factor"), len(gates)) if gates else ():
            given = dict(zip(roles, gates, strict=True))
            if not self._fits(start, **given):
                continue
            for of_decay in domains if "decay" in given else ("",):
                for of_beta in ("", "logit") if "beta" in given else ("",):
                    domain = {"decay": of_decay, "beta": of_beta, "factor": ""}
                    gated = replace(start, **{role: replace(x, domain=domain[role]) for role, x in given.items()})
                    yield from [gated] if "decay" in given else self._decayed(gated, held)
        if held and not gates:
            yield from self._decayed(start, held)

    def _decayed(self, start: Formula, held: list[Operand]) -> Iterator[Formula]:
        """With each decay that is the same for all tokens, after none."""
        yield start
        for x in held:
            if self._width(x) in (1, self._width(start.k)):
                yield from (replace(start, decay=replace(x, domain=domain)) for domain in ("", "factor"))

    def _fits(
        self,
        start: Formula,
        decay: Operand | None = None,
        beta: Operand | None = None,
        factor: Operand | None = None,
    ) -> bool:
        if any(x is not None and self._width(x) != 1 for x in (beta, factor)):
            return False
        return decay is None or self._width(decay) in (1, self._width(start.k))

    def _has_logarithm(self, formula: Formula) -> bool:
        """Whether what a state is multiplied by is not negative; of a buffer, whether it is not now."""
        decay = formula.decay
        if decay is None or decay.domain != "factor" or self.bounds.of(decay.node)[0] >= 0:
            return True
        node = decay.node
        while opname(node) in VIEWS | CASTS and node.op == "call_function":
            node = node.all_input_nodes[0]
        held = read_buffer(self.program, node)
        return held is not None and bool((held >= 0).all())

    def _constant(self, start: Formula) -> tuple[float, ...] | None:
        """Log decays that stand in the graph: of a state that one key wrote once, and that every query reads."""
        numbers = {x.node: torch.zeros(self.narrow.sizes(x.node), dtype=torch.float64) for x in start.operands}
        for x in start.operands:
            spread(numbers[x.node], x.places)[..., 0].fill_(1)
        for x in (start.k, start.v):
            if x is not None:
                spread(numbers[x.node], x.places)[:, :, 1:].fill_(0)
        y = spread(self._run(numbers), self.out)[0, :, :, 0]
        logs = (y / y[:, :1]).log()
        if not bool((logs[:, 1] < 0).all()):  # NaN, too
            return None
        last = (logs > -1).cumprod(1).sum(1).clamp_min(2) - 1  # by as many tokens as keep most: rounding counts least
        return tuple(float(one[at] / at) for one, at in zip(logs, last.tolist(), strict=True))

    def _proved(self, formula: Formula, scale: float | None = None) -> tuple[Formula | None, float]:
        """The formula with its scale, if it is the same; else None and how far off it is."""
        worst = 0.0
        beyond = [(_weak, size) for size in scales(self.program, self.part.nodes)]
        for draw, size in ((_weak, 1.0), (_strong, 1.0), (_mixed, 1.0), *beyond):
            numbers = self._numbers(formula, draw, size)
            theirs = spread(self._run(numbers), self.out)
            scale, error = self._fitted(formula, numbers, theirs, None, scale)
            worst = max(worst, error)
            if not worst <= self.tolerance:
                return None, worst
        assert scale is not None
        width = 1 if formula.q.places[3] < 0 else on_example(shape(formula.q.node)[formula.q.places[3]]) or 1
        heads = 1 if self.out[1] < 0 else on_example(shape(self.part.out)[self.out[1]]) or 1
        if formula.constant and self.heads < heads:  # then all of them are alike
            formula = replace(formula, constant=formula.constant[:1] * heads)
        near = next((x for x in (1.0, width**-0.5, 1 / width) if abs(scale - x) <= 1e-9 * x), scale)
        return replace(formula, scale=near), worst

    def _fitted(
        self,
        formula: Formula,
        numbers: Mapping[fx.Node, Tensor],
        theirs: Tensor,
        first: int | None,
        scale: float | None = None,
    ) -> tuple[float, float]:
        """The scale that fits best, if none is given, and the largest difference of a token, relative to its numbers.

        Where the part overflows (it multiplies by e^b and e^-b) nothing is compared; without a scale it must not.
        """
        theirs = theirs[:, :, :first]
        ours = self._operator(formula, numbers, first)
        known = theirs.isfinite().all(-1)
        if not bool(known.any()) or (scale is None and not bool(known.all())):
            return scale or 0.0, 0.0 if scale is not None else float("inf")
        scale = float((ours * theirs).sum() / ours.square().sum()) if scale is None else scale
        gap, size = (ours * scale - theirs).abs().amax(-1)[known], theirs.abs().amax(-1)[known]
        error = float((gap / (size + 1e-3 * size.amax()).clamp_min(1e-30)).max())
        return scale, error if error == error else float("inf")  # NaN: the operator overflows

    def _numbers(self, formula: Formula, draw: Callable[[Tensor], Tensor], size: float = 1.0) -> dict[fx.Node, Tensor]:
        """Numbers for each role: keys of length one, so that delta rules do not grow; decays as they are drawn, and
        where their bounds allow it some that let a state grow; likewise some strengths of a delta rule beyond 0 and 1.
        """
        numbers: dict[fx.Node, Tensor] = {}
        for x in formula.operands:
            if x is formula.decay and x.node not in self.part.operands:
                continue
            drawn = torch.rand(self.narrow.sizes(x.node), generator=self.generator, dtype=torch.float64)
            if x is formula.decay:
                logs = draw(drawn)
                if x.domain == "logit":
                    numbers[x.node] = (logs.exp() / -torch.expm1(logs)).log()
                else:
                    logs = logs.masked_fill(_some(drawn, 0.08), 0.2)
                    numbers[x.node] = (logs.exp() if x.domain else logs).clamp(*self.bounds.of(x.node))
            elif x is formula.beta:
                usual = (0.05 + 0.9 * drawn).masked_fill(_some(drawn, 0.08), 1.8).masked_fill(_some(drawn, 0.03), -0.4)
                numbers[x.node] = usual.clamp(*self.bounds.of(x.node)) if not x.domain else 4 * drawn - 2
            else:
                numbers[x.node] = torch.randn(drawn.shape, generator=self.generator, dtype=torch.float64)
        for node in {formula.k.node}:
            wide = spread(numbers[node], formula.k.places)
            wide /= wide.norm(dim=-1, keepdim=True).clone()
        for x in (formula.q, formula.v, None if formula.beta else formula.k):
            if x is not None and size != 1:
                numbers[x.node] *= size
        return numbers if not self.part.held else self._of_weights(formula, numbers, draw)

    def _of_weights(
        self, formula: Formula, numbers: dict[fx.Node, Tensor], draw: Callable[[Tensor], Tensor]
    ) -> dict[fx.Node, Tensor]:
        """With numbers for the weights: logarithms of decays, or decays if these make some; of what is made of them."""
        drawn = {node: draw(self._uniform(node, 0, 1)) for node in self.part.held}
        decay = formula.decay
        if decay is None or decay.node in self.part.operands:
            return numbers | drawn
        made = self._imaged(drawn, [decay])
        x = made[decay.node]
        if bool((x < 0).all() if not decay.domain else ((x > 0) & (x < 1)).all()):
            return numbers | made
        return numbers | self._imaged({node: x.exp() for node, x in drawn.items()}, [decay])

    def _operator(self, formula: Formula, numbers: Mapping[fx.Node, Tensor], first: int | None) -> Tensor:
        """What the operator computes of these numbers, with scale 1, for the first tokens or for all."""

        def given(x: Operand | None) -> Any:
            return None if x is None else x.spread(numbers[x.node])[:, :, :first]

        v, decay, beta, factor = (given(x) for x in (formula.v, formula.decay, formula.beta, formula.factor))
        q, k = given(formula.q), given(formula.k)
        constant = formula.constant[: self.heads]  # fewer are tried where all are alike
        return compute(q, k, v, decay, beta, factor, constant, formula.domains, 1.0)

    def _places_of(self, node: fx.Node, axis: int) -> Places:
        sizes = shape(node)
        if len(sizes) == 3 and self.out[1] >= 0:  # one number per head
            return (0, next(i for i in (1, 2) if i != axis), axis, -1)
        return _places(len(sizes), axis)

    def _held(self, node: fx.Node) -> Operand | None:
        """A value that is the same for all tokens, if it is one number, one per head, or one per head and feature."""
        sizes = self.narrow.sizes(node)
        wide = [at for at, size in enumerate(sizes) if size > 1]
        if len(wide) > 2 or (wide and self.heads > 1 and sizes[wide[0]] != self.heads):
            return None
        if len(wide) == 1 and self.heads == 1:
            return Operand(node, (-1, -1, -1, wide[0]))
        head, feature = [*wide, -1, -1][:2]
        return Operand(node, (-1, head, -1, feature))

    def _imaged(self, numbers: dict[fx.Node, Tensor], held: Sequence[Operand]) -> dict[fx.Node, Tensor]:
        """With what is made of weights. Raises UntriedError."""
        given = {node: numbers[node] for node in self.part.held}
        trial = Trial(self.program, given, lambda name, held: None, shapes=self.narrow.argument)
        return {x.node: trial.run(x.node) for x in held if x.node not in numbers} | numbers

    def _width(self, x: Operand) -> int:
        return 1 if x.places[3] < 0 else self.narrow.sizes(x.node)[x.places[3]]

    def _heads_of(self, x: Operand) -> int:
        return 1 if x.places[1] < 0 else self.narrow.sizes(x.node)[x.places[1]]

    def _uniform(self, node: fx.Node, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.narrow.sizes(node), generator=self.generator, dtype=torch.float64)

    def _run(self, numbers: Mapping[fx.Node, Tensor]) -> Tensor:
        return self.part.run(self.program, numbers, self.narrow)


def _has_one_length(part: Part, narrow: Narrow) -> bool:
    """Whether as many tokens leave as enter in each value, where sizes are as given."""
    return all(narrow.sizes(n)[axis] == narrow.sizes(part.out)[part.axis] for n, axis in part.operands.items())


def _places(rank: int, axis: int) -> Places:
    """Of a value with tokens at an axis: the batch first, heads before features."""
    rest = [i for i in range(1, rank) if i != axis]
    return (0, rest[0], axis, rest[1]) if rank == 4 else (0, -1, axis, rest[0])


def _some(drawn: Tensor, share: float) -> Tensor:
    """Which numbers are to be others: a share of them, and few of one token's."""
    return (drawn * 7919).frac() < share


def _weak(drawn: Tensor) -> Tensor:
    return -0.1 * drawn


def _strong(drawn: Tensor) -> Tensor:
    return -3 * drawn


def _mixed(drawn: Tensor) -> Tensor:
    return drawn.new_full(drawn.shape, -0.01).masked_fill(drawn < 0.1, -12.0)
