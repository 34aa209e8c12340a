"""expert-modules: experts that are modules of a list, or lists of parameters, become ``gatecc::moe_ffn``.

Found from the names of the weights and proved as stacked experts are (gatecc.passes.expert_formula). The weights are
put together in the graph at every call, so they learn, and nothing is stale: gradients reach each expert's own. That
costs a copy of them, so it is done where the experts have rows enough. Under ``gatecc.freeze`` and without gradients it
is done once (gatecc.backend.freeze).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from gatecc.errors import SiteRefusedError
from gatecc.ir.match.facts import Facts
from gatecc.ir.program import Program, origin, shape
from gatecc.ir.site import Site
from gatecc.ir.sizes import on_example
from gatecc.passes.expert_formula import Call, one_operator, prove
from gatecc.passes.expert_matrices import Matrices
from gatecc.passes.lower.expert_calls import NO_CHOICE, TRIES, calls
from gatecc.passes.lower.expert_lists import ExpertList, expert_lists, results
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace

DENSE_ROWS, CHOSEN_ROWS = 24, 16  # saved by an expert that sees all tokens; of one that sees those that chose it


class ExpertModules(Lowering):
    """A dispatch to experts of a list -> gatecc::moe_ffn of their weights, put together."""

    name = "expert-modules"
    left = "fewer than 16 rows per expert; experts that differ, drop tokens or compute another formula"
    after = ("experts",)

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        made: dict[fx.Node, fx.Node] = {}  # sums of experts that are tokens of the next ones
        for found in list(expert_lists(Facts(program))):
            tokens = [made.get(node, node) for node in found.tokens]
            yield self._at(program, dataclasses.replace(found, tokens=tokens), settings, made)

    def _at(self, program: Program, found: ExpertList, settings: Settings, made: dict[fx.Node, fx.Node]) -> Outcome:
        experts = found.candidates[0].experts
        place, text = origin(found.place), f"{experts} experts in a list"
        reason, tries = "", 0
        for call in _calls(program, found, experts):
            if (tries := tries + 1) > TRIES:
                break
            if poor := _poor(call, found, settings):
                return Outcome(self.name, found.owner, place.line, text, reason=poor)
            try:
                activation, layout, held = prove(program, call, found.candidates, training=settings.training)
            except SiteRefusedError as e:
                reason = reason or f"{e.found}; expected {e.expected}"
                continue
            y = self._insert(program, call, held, activation, layout)
            replace(program, call.out, y)
            made[call.out] = y
            proof = f"run in float64 on random tokens and choices: {activation}, {layout}"
            gain = "rows are read in place; the weights are put together " + (
                "once" if settings.freeze else "each time"
            )
            return Outcome(self.name, found.owner, place.line, text, "gatecc::moe_ffn", proof, gain)
        return Outcome(self.name, found.owner, place.line, text, reason=reason or NO_CHOICE)

    def _insert(self, program: Program, call: Call, held: Matrices, activation: str, layout: str) -> fx.Node:
        named = {name: n for n in program.graph.nodes if (name := program.weight_name(n)) is not None}
        given = [named[name] for role in held.roles for name in role.names]
        for node in given:
            if node.op == "get_attr":
                call.out.prepend(node)
        dtype, form = call.out.meta["val"].dtype, call.form

        def together(x: Tensor, weights: Tensor, indices: Tensor, *own: Tensor) -> Tensor:
            operands = held.together(own)
            return one_operator(x, weights, indices, *operands, held.swapped, dtype, activation, layout, form)

        (y,) = insert(program, self.name, call.out, together, call.x, call.weights, call.indices, *given)
        return y


def _calls(program: Program, found: ExpertList, experts: int) -> Iterator[Call]:
    for x in found.tokens:
        for out in results(found, x):
            yield from calls(program, x, out, experts)


def _poor(call: Call, found: ExpertList, settings: Settings) -> str:
    """Why nothing is gained, empty if something is."""
    if settings.freeze and not settings.training:
        return ""
    tokens, share = _number(call.x, -1), _number(call.indices) / found.candidates[0].experts
    if on_example(shape(found.rows)[0]) is not None and _number(found.rows, -1) == tokens:
        few, rows, text = DENSE_ROWS, tokens - share, "rows less an expert"
    else:
        few, rows, text = CHOSEN_ROWS, share, "rows per expert"
    if rows >= few:
        return ""
    costs = "it costs more to put the weights together; options={'gatecc.freeze': True} does so once"
    return f"{rows:.0f} {text}: below {few} {costs}"


def _number(node: fx.Node, end: int | None = None) -> int:
    """The elements of a value, or of its axes before ``end``."""
    return prod(optimization_hint(size, fallback=1024) for size in shape(node)[:end])
