"""Which recurrence a part of a graph computes: the roles of its operands, proved by running both in float64.

What a value is, the numbers say: each way to take what enters for q, k, v, a decay, the strength of a delta rule is
compared with ``gatecc::linear_attention``. One that agrees on the first tokens is proved on all of them, with weak
gates, strong ones, and a few very strong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc import ops as ops  # registers the operator
from gatecc.ir.program import Program, shape
from gatecc.ir.sizes import Sizes, on_example
from gatecc.passes.causal.lengths import other_sizes
from gatecc.passes.causal.narrow import Narrow
from gatecc.passes.causal.parts import Part
from gatecc.passes.trial import UntriedError

_TOLERANCE = 1e-6  # of a token in float64, relative to its largest number
NEAREST = "the nearest recurrence"  # so begins the reason where one was compared
_MOST = 6  # values that may enter
_FIRST = 48  # tokens by which assignments are told apart; the very first tells most, whatever the decay

_ErrorOn = Callable[["Formula", int], float]  # of a formula, on so many first tokens
Places = tuple[int, int, int, int]  # where (B, H, N, D) stand in a value, -1 for an axis that it lacks


@dataclass(frozen=True, eq=False)
class Operand:
    """A value in a role. ``domain``: what the value is of that role: "" itself, its "factor" (what a state is
    multiplied by, where the operator takes a logarithm), or its "logit"."""

    node: fx.Node
    places: Places
    domain: str = ""

    def spread(self, x: Tensor) -> Tensor:
        """(B, H, N, D)."""
        return spread(x, self.places)


@dataclass(frozen=True, eq=False)
class Formula:
    """o = scale * linear_attention(q * factor, k, v, decay, beta). A v of None is ones; ``constant``: log decays of the
    heads that stand in the graph as numbers; with a ``normalizer`` the log decay is logsigmoid(decay) / normalizer."""

    q: Operand
    k: Operand
    out: Places
    v: Operand | None = None
    decay: Operand | None = None
    beta: Operand | None = None
    factor: Operand | None = None
    constant: tuple[float, ...] = ()
    scale: float = 1.0
    normalizer: float | None = None

    @property
    def domains(self) -> tuple[str, str]:
        """Of the decay and of beta."""
        return tuple("" if x is None else x.domain for x in (self.decay, self.beta))  # pyright: ignore[reportReturnType]  there are two

    @property
    def operands(self) -> list[Operand]:
        """Those that are there."""
        return [x for x in (self.q, self.k, self.v, self.decay, self.beta, self.factor) if x is not None]

    def __str__(self) -> str:
        decay = "gated " if self.decay is not None else "decayed " if self.constant else ""
        rule = "delta rule" if self.beta is not None else "linear attention"
        return f"{decay}{rule}, scale {self.scale:.6g}"


def spread(x: Tensor, places: Places) -> Tensor:
    """A value as (B, H, N, D)."""
    x = x.permute([p for p in places if p >= 0])
    for at, place in enumerate(places):
        x = x.unsqueeze(at) if place < 0 else x
    return x


def gathered(x: Tensor, places: Places) -> Tensor:
    """The inverse of `spread`, for the output."""
    for at in reversed(range(4)):
        x = x.squeeze(at) if places[at] < 0 else x
    kept = [p for p in places if p >= 0]
    return x.permute([kept.index(axis) for axis in range(len(kept))])


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    decay: Tensor | None,
    beta: Tensor | None,
    factor: Tensor | None,
    constant: tuple[float, ...],
    domains: tuple[str, str],
    scale: float,
    normalizer: float | None = None,
) -> Tensor:
    """The operator on values (B, H, N, D), in the widest of the dtypes of q, k, v; ``domains``: of decay and beta."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    dtype = dtype if v is None else torch.promote_types(dtype, v.dtype)
    q = q if factor is None else q * factor
    v = k.new_ones((*k.shape[:3], 1)) if v is None else v
    if decay is not None and domains[0]:
        decay = decay.log() if domains[0] == "factor" else F.logsigmoid(decay)
    if beta is not None and domains[1]:
        beta = beta.sigmoid()
    if constant:
        decay = torch.cat([q.new_full((1, 1, 1, 1), number) for number in constant], 1)
    q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))
    o, _ = torch.ops.gatecc.linear_attention(q, k, v, decay, beta, scale=scale, gate_normalizer=normalizer)
    return o


def find_formula(program: Program, part: Part) -> Formula | str:
    """What a part computes, or why it is nothing that the operator does. Raises UntriedError."""
    if not 2 <= len(part.operands) <= _MOST:
        return f"{len(part.operands)} values enter it"
    if not _has_one_length(part, Narrow((), ())):
        return "its values have different numbers of tokens"
    if len(part.held) > 1:
        return f"it reads {len(part.held)} weights or buffers"
    formula = _tried(program, part, {}, _Search.found)
    sizes = {} if isinstance(formula, str) else other_sizes(program, part)
    if isinstance(formula, str) or not sizes:
        return formula
    return sizes if isinstance(sizes, str) else _tried(program, part, sizes, lambda at: at.confirmed(formula))


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
        held = [x for node in self.part.held if (x := self._held(node)) is not None]
        if any(self.heads % self._heads_of(x) for x in operands) or len(held) < len(self.part.held):
            return "the heads of what enters it do not fit those of what leaves it"
        nearest = float("inf")
        for low, high, domains in ((-0.1, -0.01, ("", "logit")), (0.01, 0.1, ("factor",))):
            numbers = {x.node: self._uniform(x.node, low, high) for x in (*operands, *held)}
            theirs = spread(self._run(numbers), self.out)

            def error_on(
                formula: Formula, first: int, numbers: Mapping[fx.Node, Tensor] = numbers, theirs: Tensor = theirs
            ) -> float:
                return self._fitted(formula, numbers, theirs, first)[1]

            for formula in self._assignments(operands, held, domains, error_on):
                error = error_on(formula, 1)
                error = error_on(formula, _FIRST) if error <= _TOLERANCE else error
                if error <= _TOLERANCE:
                    proved, error = self._proved(formula)
                    if proved is not None:
                        return proved
                nearest = min(nearest, error)
        return (
            f"{NEAREST} differs by {nearest:.1e}" if nearest < float("inf") else "no sizes of queries, keys and values"
        )

    def confirmed(self, formula: Formula) -> Formula | str:
        """The formula if it holds at these sizes too."""
        tokens = self.narrow.sizes(self.part.out)[self.part.axis]
        if not _has_one_length(self.part, self.narrow):
            return f"the length is free, and at {tokens} tokens its values have different numbers of them"
        found, error = self._proved(formula, formula.scale)
        if found is not None:
            return formula
        return f"the length is free, and at {tokens} tokens it differs by {error:.1e} from what it is on the example"

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
            if error_on(start, 1) <= _TOLERANCE and (constant := self._constant(start)) is not None:
                yield replace(start, constant=constant)
        left = [*gates, *held]
        for roles in permutations(("decay", "beta", "factor"), len(left)) if 0 < len(left) <= 3 else ():
            given = dict(zip(roles, left, strict=True))
            if not self._fits(start, held, **given):
                continue
            for of_decay in domains if "decay" in given else ("",):
                for of_beta in ("", "logit") if "beta" in given else ("",):
                    domain = {"decay": of_decay, "beta": of_beta, "factor": ""}
                    yield replace(start, **{role: replace(x, domain=domain[role]) for role, x in given.items()})

    def _fits(
        self,
        start: Formula,
        held: list[Operand],
        decay: Operand | None = None,
        beta: Operand | None = None,
        factor: Operand | None = None,
    ) -> bool:
        if any(x is not None and (x in held or self._width(x) != 1) for x in (beta, factor)):
            return False
        return decay is None or self._width(decay) in (1, self._width(start.k))

    def _constant(self, start: Formula) -> tuple[float, ...] | None:
        """Log decays that stand in the graph: of a state that one key wrote once, and that every query reads."""
        numbers = {x.node: torch.zeros(self.narrow.sizes(x.node), dtype=torch.float64) for x in start.operands}
        for x in start.operands:
            spread(numbers[x.node], x.places)[..., 0].fill_(1)
        for x in (start.k, start.v):
            if x is not None:
                spread(numbers[x.node], x.places)[:, :, 1:].fill_(0)
        y = spread(self._run(numbers), self.out)[0, :, :2, 0]
        ratios = (y[:, 1] / y[:, 0]).tolist()
        if not all(0 < r < 1 for r in ratios):
            return None
        return tuple(float(torch.tensor(r, dtype=torch.float64).log()) for r in ratios)

    def _proved(self, formula: Formula, scale: float | None = None) -> tuple[Formula | None, float]:
        """The formula with its scale, if it is the same; else None and how far off it is."""
        worst = 0.0
        for draw in (_weak, _strong, _mixed):
            numbers = self._numbers(formula, draw)
            theirs = spread(self._run(numbers), self.out)
            scale, error = self._fitted(formula, numbers, theirs, None, scale)
            worst = max(worst, error)
            if not worst <= _TOLERANCE:
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

    def _numbers(self, formula: Formula, draw: Callable[[Tensor], Tensor]) -> dict[fx.Node, Tensor]:
        """Numbers for each role: keys of length one, so that delta rules do not grow; decays as they are drawn."""
        numbers: dict[fx.Node, Tensor] = {}
        for x in formula.operands:
            drawn = torch.rand(self.narrow.sizes(x.node), generator=self.generator, dtype=torch.float64)
            if x is formula.decay:
                logs = draw(drawn)
                kept = logs.exp()
                numbers[x.node] = {"": logs, "factor": kept, "logit": (kept / -torch.expm1(logs)).log()}[x.domain]
            elif x is formula.beta:
                numbers[x.node] = 0.05 + 0.9 * drawn if not x.domain else 4 * drawn - 2
            else:
                numbers[x.node] = torch.randn(drawn.shape, generator=self.generator, dtype=torch.float64)
        for node in {formula.k.node}:
            wide = spread(numbers[node], formula.k.places)
            wide /= wide.norm(dim=-1, keepdim=True).clone()
        return numbers

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
        """A decay that is the same for all tokens: one number per head."""
        sizes = self.narrow.sizes(node)
        wide = [at for at, size in enumerate(sizes) if size > 1]
        if len(wide) > 1 or (wide and sizes[wide[0]] != self.heads) or len(sizes) > 4:
            return None
        head = wide[0] if wide else 0
        return Operand(node, (-1, head, -1, -1)) if len(sizes) == 1 else None

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


def _weak(drawn: Tensor) -> Tensor:
    return -0.1 * drawn


def _strong(drawn: Tensor) -> Tensor:
    return -3 * drawn


def _mixed(drawn: Tensor) -> Tensor:
    return torch.where(drawn < 0.1, -12.0, -0.01)
