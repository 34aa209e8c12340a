"""experts: what dispatches tokens to stacked experts, however it is spelled, becomes ``gatecc::moe_ffn``.

Sorted groups, gathered weights, masks over all experts, a module that routes by itself: the values between which the
experts stand are found from the graph, and what they compute is proved by gatecc.passes.expert_formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.ops import opname
from gatecc.ir.program import Program
from gatecc.ir.site import MLP, Site
from gatecc.passes.expert_formula import Call, formula, one_operator, stacks, swapped
from gatecc.passes.lower.expert_calls import NO_CHOICE, calls
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace


class Experts(Lowering):
    """A dispatch to stacked experts -> gatecc::moe_ffn."""

    name = "experts"
    left = "experts that differ, drop tokens or compute another formula; weights inside of the activation (Llama 4)"

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        made: dict[fx.Node, fx.Node] = {}  # sums of experts that are tokens of the next ones
        for site in sites:
            if isinstance(site, MLP) and site.form == "experts" and opname(site.values["out"].node) != "moe_ffn":
                yield self._at(program, site, settings, made)

    def _at(self, program: Program, site: MLP, settings: Settings, made: dict[fx.Node, fx.Node]) -> Outcome:
        found = f"{site.experts} experts" + (f", {site.chosen} per token" if site.chosen else "")
        reason = ""
        for call in _calls(program, site, made):
            try:
                options = formula(site, program, call, training=settings.training)
            except SiteRefusedError as e:
                reason = reason or f"{e.found}; expected {e.expected}"
                continue
            dtype = call.out.meta["val"].dtype
            held = stacks(site, program)
            (y,) = insert(
                program, self.name, call.out, one_operator, call.x, call.weights, call.indices, *held, swapped(site),
                dtype, *options, call.form,
            )  # fmt: skip
            replace(program, call.out, y)
            made[call.out] = y
            proof = f"run in float64 on random tokens and choices: {', '.join(options)}"
            return Outcome(self.name, site.owner, site.line, found, "gatecc::moe_ffn", proof, "rows are read in place")
        return Outcome(self.name, site.owner, site.line, found, reason=reason or NO_CHOICE)


def _calls(program: Program, site: MLP, made: Mapping[fx.Node, fx.Node]) -> Iterator[Call]:
    """The values between which the experts may stand, the likeliest first."""
    x, out = site.values["in"].node, site.values["out"].node
    x = made.get(x, x)
    known = site.find("weights"), site.find("indices")
    if known[0] is not None and known[1] is not None:
        yield Call(x, known[0].node, known[1].node, out)
        return
    yield from calls(program, x, out, site.experts)
