"""linear-attention: retention, gated and delta rules and the like, written in torch, become one operator.

Loops over tokens that were unrolled, prefix sums, masked products, chunks: gatecc.passes.causal finds where a
module mixes tokens causally and proves which recurrence that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.region import Region, regions
from gatecc.ir.ops import SOFTMAXES, opname
from gatecc.ir.program import Program, fake, origin, shape
from gatecc.ir.site import Site
from gatecc.ir.sizes import on_example
from gatecc.passes.causal.formula import FREE, MOST, NEAREST, NEGATIVE, find_formula
from gatecc.passes.causal.parts import Part, Probe, read_buffer
from gatecc.passes.causal.peeled import peeled
from gatecc.passes.causal.remembered import Remembered
from gatecc.passes.causal.roles import Formula, Places, compute, gathered, spread
from gatecc.passes.causal.unlike import unlike
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace
from gatecc.passes.trial import UntriedError
from gatecc.passes.unseen import unseen

_SIGNS = frozenset("cumsum tril triu masked_fill where".split())  # of what is causal
_OTHERS = SOFTMAXES | frozenset(
    "scaled_dot_product_attention attention linear_attention moe_ffn topk sort lstm gru rnn_tanh rnn_relu".split()
)
_UNROLLED = 4  # tokens taken one by one


class LinearAttention(Lowering):
    """Causal mixing that is linear in queries and values -> gatecc::linear_attention."""

    name = "linear-attention"
    left = "what is not proved in float64, at a second length too where lengths are free"

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        for owner in _owners(program):
            for call in range(len(regions(Facts(program), [owner]))):
                yield from self._in(program, owner, call, settings)

    def _in(self, program: Program, owner: str, call: int, settings: Settings) -> Iterator[Outcome]:
        """The recurrences of one call of a module; what was lowered is a source of the next, such as a normaliser."""
        made: dict[fx.Node, int] = {}
        while True:
            facts = Facts(program)
            region = next((r for r in regions(facts, [owner]) if r.call == call), None)
            if region is None:
                return
            with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
                part, formula = _remembered(program, facts, region, made, settings)
            if part is None:
                return
            line = origin(part.out).line
            if isinstance(formula, str):
                if not made:
                    about = frozenset(node.name for node in (*part.nodes, part.out))
                    found = "tokens that are mixed causally, without softmax"
                    yield Outcome(self.name, owner, line, found, reason=formula, about=about)
                return
            found = str(formula)
            part, formula = peeled(part, formula)
            y = _edit(program, self.name, part, formula)
            made[y] = part.axis
            proof = "run in float64 with weak, strong and mixed gates"
            proof += ", and with what its buffers hold" if formula.assumes else ""
            gain = "time linear in the tokens, and nothing stored between"
            yield Outcome(self.name, owner, line, found, "gatecc::linear_attention", proof, gain, formula.assumes)


def _owners(program: Program) -> list[str]:
    """Modules that may hold a recurrence: they mix tokens by signs of causality, and hold no other mixing."""
    signs: dict[str, int] = {}
    others: set[str] = set()
    for node in program.calls():
        owner, name = origin(node).owner, opname(node)
        if name in _SIGNS:
            signs[owner] = signs.get(owner, 0) + _UNROLLED
        elif name in ("select", "getitem", "slice"):
            signs[owner] = signs.get(owner, 0) + 1
        elif name in _OTHERS:
            parts = owner.split(".")
            others.update(".".join(parts[:i]) for i in range(len(parts) + 1))
    return [owner for owner, count in signs.items() if count >= _UNROLLED and owner not in others]


def _remembered(
    program: Program, facts: Facts, region: Region, made: dict[fx.Node, int], settings: Settings
) -> tuple[Part | None, Formula | str]:
    """What a search finds. Layers that are built alike are searched once."""
    entering = region.enters(facts)
    marks: dict[fx.Node, object] = {n: (_is_own(n), "inside") for n in region.nodes}
    marks |= {n: (_is_own(n), "enters") for n in entering} | {n: (axis, "made") for n, axis in made.items()}
    known = Remembered(program, facts.flow, region.nodes, [*entering, *made], marks, settings.training)
    found = known.found()
    if found is not None:
        return found
    part, formula, lasts = _search(program, facts, region, entering, made, settings)
    rests = part is not None and any(read_buffer(program, n) is not None for n in part.held)
    if isinstance(formula, Formula):
        rests = bool(formula.assumes)  # on what buffers hold, which is not in the key
    if lasts and not rests:
        known.remember(part, formula)
    return part, formula


def _search(
    program: Program,
    facts: Facts,
    region: Region,
    entering: list[fx.Node],
    made: dict[fx.Node, int],
    settings: Settings,
) -> tuple[Part | None, Formula | str, bool]:
    """The first part that is proved to be linear attention; else the one that came nearest to it, and why not; and
    whether that says nothing of this place alone."""
    wide = any(len(shape(n)) == 4 for n in entering)
    tried: list[tuple[Part, str, bool]] = []
    usual = [n for n in entering if len(shape(n)) == (4 if wide else 3)]
    lengths = {a: max((_length(n, a) or 0 for n in usual), default=0) for a in ((1, 2) if wide else (1,))}
    for axis in sorted(lengths, key=lambda a: -lengths[a]):  # the longest is the likeliest
        sources = {n: axis for n in entering if _length(n, axis) == lengths[axis]}
        if not sources:
            continue
        others = [n for n in entering if n not in sources]
        nodes = [n for n in region.nodes if not _is_own(n)]
        probe = Probe(program, facts.flow, nodes, {**sources, **made}, others)
        roots = probe.convolved()
        if roots:  # short convolutions mix tokens, too: what comes after them begins there
            probe = Probe(program, facts.flow, nodes, {**sources, **made, **roots}, others)
        for part in probe.parts():
            lasts = True
            try:
                formula = find_formula(program, part)
            except UntriedError as e:
                formula, lasts = str(e), False  # it names a node
            if isinstance(formula, Formula):
                return part, unseen(part.nodes, training=settings.training) or formula, True
            tried.append((part, formula, lasts))
    if not tried:
        return None, "", True
    part, reason, lasts = _telling(tried)
    why = unlike(program, part) if lasts and not reason.startswith((FREE, NEGATIVE)) else ""
    return part, f"{reason}: {why}" if why else reason, lasts


def _telling(tried: list[tuple[Part, str, bool]]) -> tuple[Part, str, bool]:
    """The refusal that says most: of the largest recurrence that held on the example, or was compared at all;
    else of the smallest part that holds most of the nodes and has few operands: larger ones hold what comes after it,
    too, and much smaller ones are convolutions and the like."""
    for begins in (FREE, NEGATIVE, NEAREST):
        near = [one for one in tried if one[1].startswith(begins)]
        if near:
            return near[-1]
    few = [one for one in tried if len(one[0].operands) <= MOST] or tried
    most = max(len(part.nodes) for part, *_ in few)
    return next(one for one in few if 2 * len(one[0].nodes) >= most)


def _is_own(node: fx.Node) -> bool:
    return origin(node).inserted_by == LinearAttention.name


def _length(node: fx.Node, axis: int) -> int | None:
    return on_example(shape(node)[axis]) if len(shape(node)) > 2 else None


def _edit(program: Program, name: str, part: Part, formula: Formula) -> fx.Node:
    """Put the operator in the place of a part; returns its result."""
    given = [formula.q, formula.k, formula.v, formula.decay, formula.beta, formula.factor]
    places = [None if x is None else x.places for x in given]
    held = fake(part.out)
    assert held is not None
    (y,) = insert(
        program, name, part.out, _call, *(None if x is None else x.node for x in given), places, formula.out,
        formula.constant, formula.domains, formula.scale, formula.normalizer, held.dtype,
    )  # fmt: skip
    replace(program, part.out, y)
    return y


def _call(
    q: Tensor, k: Tensor, v: Tensor | None, decay: Tensor | None, beta: Tensor | None, factor: Tensor | None,
    places: list[Places | None], out: Places, constant: tuple[float, ...], domains: tuple[str, str],
    scale: float, normalizer: float | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The recurrence on values as they stand in the graph."""
    given = (q, k, v, decay, beta, factor)
    wide: list[Any] = [None if x is None or p is None else spread(x, p) for x, p in zip(given, places, strict=True)]
    q, k, v, decay, beta, factor = wide
    y = gathered(compute(q, k, v, decay, beta, factor, constant, domains, scale, normalizer), out)
    return y if y.dtype == dtype else y.to(dtype)
