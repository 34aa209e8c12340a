"""Which recurrence a part of a graph computes: the roles of its operands, proved by running both in float64.

What a value is, the numbers say: the output is linear in q and in v; q of a token counts for that token alone; a column
of v is a column of the output. What is left is k, a decay, the strength of a delta rule. Each assignment that these
leave is compared with ``gatecc::linear_attention``, with weak gates, strong ones, and a few very strong ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc import ops as ops  # registers the operator
from gatecc.ir.program import Program, shape
from gatecc.ir.sizes import on_example
from gatecc.passes.causal.parts import Part

_TOLERANCE = 1e-6  # of a token in float64, relative to its largest number
NEAREST = "the nearest recurrence"  # so begins the reason where one was compared
_MOST = 6  # values that may enter

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
    heads that stand in the graph as numbers."""

    q: Operand
    k: Operand
    out: Places
    v: Operand | None = None
    decay: Operand | None = None
    beta: Operand | None = None
    factor: Operand | None = None
    constant: tuple[float, ...] = ()
    scale: float = 1.0

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
    o, _ = torch.ops.gatecc.linear_attention(q, k, v, decay, beta, scale=scale)
    return o


def find_formula(program: Program, part: Part) -> Formula | str:
    """What a part computes, or why it is nothing that the operator does. Raises UntriedError."""
    if not 2 <= len(part.operands) <= _MOST:
        return f"{len(part.operands)} values enter it"
    if len(part.held) > 1:
        return f"it reads {len(part.held)} weights or buffers"
    return _Search(program, part).found()


class _Search:
    def __init__(self, program: Program, part: Part) -> None:
        self.program, self.part = program, part
        self.generator = torch.Generator().manual_seed(0)
        self.out = _places(len(shape(part.out)), part.axis)
        self.heads = 1 if self.out[1] < 0 else on_example(shape(part.out)[self.out[1]]) or 1
        self.width = on_example(shape(part.out)[self.out[3]]) if self.out[3] >= 0 else 1
        if len(shape(part.out)) == 3 and any(len(shape(n)) == 4 for n in part.operands):  # (B, N, H): a number a head
            heads = next(i for i in (1, 2) if i != part.axis)
            self.out, self.heads, self.width = (0, heads, part.axis, -1), on_example(shape(part.out)[heads]) or 1, 1

    def found(self) -> Formula | str:
        """The first assignment that is proved."""
        nearest = float("inf")
        reason = "it is not linear in one value of each token, and in one of the tokens before"
        for formula in self._assignments():
            formula, error = self._proved(formula)
            if formula is not None:
                return formula
            nearest = min(nearest, error)
            reason = f"{NEAREST} differs by {nearest:.1e}"
        return reason

    def _assignments(self) -> Iterator[Formula]:
        operands = [Operand(n, self._places_of(n, axis)) for n, axis in self.part.operands.items()]
        if any(self.heads % self._heads_of(x) for x in operands):
            return
        numbers = {x.node: self._uniform(x.node, -0.1, -0.01) for x in operands}
        numbers |= {node: self._uniform(node, -0.1, -0.01) for node in self.part.held}
        base = self._run(numbers)
        local = [x for x in operands if self._is_local(x, numbers, base)]
        queries = [x for x in local if self._width(x) > 1] or local[:1]
        values = [x for x in operands if x not in local and self._is_value(x, numbers, base)]
        for q in queries:
            factors = [x for x in local if x is not q]
            if self._heads_of(q) != self.heads or len(factors) > 1 or any(self._width(x) != 1 for x in factors):
                continue
            rest = [x for x in operands if x not in local]
            for v in values or [None]:
                for k in rest:
                    if k is v or self._width(k) != self._width(q) or (v is None and self.width != 1):
                        continue
                    gates = [x for x in rest if x not in (k, v)]
                    start = Formula(q, k, self.out, v, factor=factors[0] if factors else None)
                    yield from self._gated(start, gates)

    def _gated(self, start: Formula, gates: list[Operand]) -> Iterator[Formula]:
        held = [x for node in self.part.held if (x := self._held(node)) is not None]
        if len(held) != len(self.part.held):
            return
        if not gates and not held:
            yield start
            if (constant := self._constant(start)) is not None:
                yield replace(start, constant=constant)
        for order in {p[:2] for p in permutations((*gates, *held, None))} if len(gates) + len(held) <= 2 else ():
            decay, beta = (*order, None)[:2]
            if {x for x in (decay, beta) if x is not None} != {*gates, *held}:
                continue
            if beta is not None and (beta in held or self._width(beta) != 1):
                continue
            if decay is not None and self._width(decay) not in (1, self._width(start.k)):
                continue
            for of_decay in ("",) if decay is None else ("", "factor", "logit"):
                for of_beta in ("",) if beta is None else ("", "logit"):
                    yield replace(
                        start,
                        decay=None if decay is None else replace(decay, domain=of_decay),
                        beta=None if beta is None else replace(beta, domain=of_beta),
                    )

    def _constant(self, start: Formula) -> tuple[float, ...] | None:
        """Log decays that stand in the graph: of a state that one key wrote once, and that every query reads."""
        numbers = {x.node: torch.zeros(_sizes(x.node), dtype=torch.float64) for x in start.operands}
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

    def _proved(self, formula: Formula) -> tuple[Formula | None, float]:
        """The formula with its scale, if it is the same; else None and how far off it is."""
        worst = 0.0
        scale: float | None = None
        for draw in (_weak, _strong, _mixed):
            numbers = self._numbers(formula, draw)
            theirs = spread(self._run(numbers), self.out)
            ours = self._operator(formula, numbers)
            known = theirs.isfinite().all(-1)
            if scale is None:
                if not bool(known.all()):
                    return None, float("inf")
                scale = float((ours * theirs).sum() / ours.square().sum())
            ours = ours * scale
            gap = (ours - theirs).abs().amax(-1)
            size = theirs.abs().amax(-1)
            error = gap / (size + 1e-3 * size[known].amax() if bool(known.any()) else size).clamp_min(1e-30)
            worst = max(worst, float(error[known].max()) if bool(known.any()) else 0.0)
            if not worst <= _TOLERANCE:
                return None, worst
        assert scale is not None
        width = self._width(formula.q)
        near = next((x for x in (1.0, width**-0.5, 1 / width) if abs(scale - x) <= 1e-9 * x), scale)
        return replace(formula, scale=near), worst

    def _numbers(self, formula: Formula, draw: Callable[[Tensor], Tensor]) -> dict[fx.Node, Tensor]:
        """Numbers for each role: keys of length one, so that delta rules do not grow; decays as they are drawn."""
        numbers: dict[fx.Node, Tensor] = {}
        for x in formula.operands:
            drawn = torch.rand(_sizes(x.node), generator=self.generator, dtype=torch.float64)
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

    def _operator(self, formula: Formula, numbers: Mapping[fx.Node, Tensor]) -> Tensor:
        rest = (formula.v, formula.decay, formula.beta, formula.factor)
        v, decay, beta, factor = (None if x is None else x.spread(numbers[x.node]) for x in rest)
        q, k = (x.spread(numbers[x.node]) for x in (formula.q, formula.k))
        return compute(q, k, v, decay, beta, factor, formula.constant, formula.domains, 1.0)

    def _is_local(self, x: Operand, numbers: dict[fx.Node, Tensor], base: Tensor) -> bool:
        """Whether a token of the value counts for that token alone, to which it is proportional."""
        place = base.size(self.part.axis) // 2
        changed = numbers[x.node].clone()
        spread(changed, x.places)[:, :, place] *= 2
        wanted = base.clone()
        wanted.select(self.part.axis, place).mul_(2)
        return _same(self._run({**numbers, x.node: changed}), wanted)

    def _is_value(self, x: Operand, numbers: dict[fx.Node, Tensor], base: Tensor) -> bool:
        """Whether a column of the value is a column of the output, to which that is proportional."""
        if self._width(x) != self.width:
            return False
        changed, wanted = numbers[x.node].clone(), base.clone()
        spread(changed, x.places)[..., 0] *= 2
        spread(wanted, self.out)[..., 0] *= 2
        return _same(self._run({**numbers, x.node: changed}), wanted)

    def _places_of(self, node: fx.Node, axis: int) -> Places:
        sizes = shape(node)
        if len(sizes) == 3 and self.out[1] >= 0:  # a number a head
            return (0, next(i for i in (1, 2) if i != axis), axis, -1)
        return _places(len(sizes), axis)

    def _held(self, node: fx.Node) -> Operand | None:
        """A decay that is the same for all tokens: a number a head."""
        sizes = _sizes(node)
        wide = [at for at, size in enumerate(sizes) if size > 1]
        if len(wide) > 1 or (wide and sizes[wide[0]] != self.heads) or len(sizes) > 4:
            return None
        head = wide[0] if wide else 0
        return Operand(node, (-1, head, -1, -1)) if len(sizes) == 1 else None

    def _width(self, x: Operand) -> int:
        return 1 if x.places[3] < 0 else on_example(shape(x.node)[x.places[3]]) or 1

    def _heads_of(self, x: Operand) -> int:
        return 1 if x.places[1] < 0 else on_example(shape(x.node)[x.places[1]]) or 1

    def _uniform(self, node: fx.Node, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(_sizes(node), generator=self.generator, dtype=torch.float64)

    def _run(self, numbers: Mapping[fx.Node, Tensor]) -> Tensor:
        return self.part.run(self.program, numbers)


def _places(rank: int, axis: int) -> Places:
    """Of a value with tokens at an axis: the batch first, heads before features."""
    rest = [i for i in range(1, rank) if i != axis]
    return (0, rest[0], axis, rest[1]) if rank == 4 else (0, -1, axis, rest[0])


def _sizes(node: fx.Node) -> list[int]:
    return [on_example(size) or 1 for size in shape(node)]


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= 1e-8 * other.abs().amax()).all())


def _weak(drawn: Tensor) -> Tensor:
    return -0.1 * drawn


def _strong(drawn: Tensor) -> Tensor:
    return -3 * drawn


def _mixed(drawn: Tensor) -> Tensor:
    return torch.where(drawn < 0.1, -12.0, -0.01)
