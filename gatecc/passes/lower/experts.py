"""experts: what dispatches tokens to stacked experts, however it is spelled, becomes ``gatecc::moe_ffn``.

Sorted groups, gathered weights, masks over all experts, a module that routes by itself: the values between which the
experts stand are found from the graph, and what they compute is proved by gatecc.passes.expert_formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.ops import opname
from gatecc.ir.program import Program, fake, origin, shape
from gatecc.ir.site import MLP, Site
from gatecc.ir.sizes import on_example
from gatecc.passes.expert_formula import Call, formula, one_operator, stacks, swapped
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace

_TRIES = 12  # pairs of weights and indices that are tried at a site that does not name them


class Experts(Lowering):
    """A dispatch to stacked experts -> gatecc::moe_ffn."""

    name = "experts"

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        for site in sites:
            if isinstance(site, MLP) and site.form == "experts" and opname(site.values["out"].node) != "moe_ffn":
                yield self._at(program, site)

    def _at(self, program: Program, site: MLP) -> Outcome:
        found = f"{site.experts} experts" + (f", {site.chosen} per token" if site.chosen else "")
        reason = "nothing in the module chooses experts: no whole numbers per token"
        for call in _calls(program, site):
            try:
                options = formula(site, program, call)
            except SiteRefusedError as e:
                reason = f"{e.found}; expected {e.expected}"
                continue
            dtype = call.out.meta["val"].dtype
            held = stacks(site, program)
            (y,) = insert(
                program, self.name, call.out, one_operator, call.x, call.weights, call.indices, *held, swapped(site),
                dtype, *options,
            )  # fmt: skip
            replace(program, call.out, y)
            proof = f"run in float64 on random tokens and choices: {', '.join(options)}"
            return Outcome(self.name, site.owner, site.line, found, "gatecc::moe_ffn", proof, "rows are read in place")
        return Outcome(self.name, site.owner, site.line, found, reason=reason)


def _calls(program: Program, site: MLP) -> Iterator[Call]:
    """The values between which the experts may stand, the likeliest first."""
    x, out = site.values["in"].node, site.values["out"].node
    known = site.find("weights"), site.find("indices")
    if known[0] is not None and known[1] is not None:
        yield Call(x, known[0].node, known[1].node, out)
        return
    needed = _needed(out)
    chosen = [n for n in needed if _chooses(n)]
    pairs = ((w, i) for i, w in product(chosen, reversed(needed)) if w is not i and _fits(w, i) and w < out)
    for (weights, indices), _ in zip(pairs, range(_TRIES), strict=False):
        yield Call(x, weights, indices, out)


def _needed(out: fx.Node) -> list[fx.Node]:
    """The calls that a value depends on, in order."""
    seen, todo = {out}, [out]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in seen and n.op == "call_function"]
        seen.update(new)
        todo += new
    return sorted(seen)


def _chooses(node: fx.Node) -> bool:
    """Whether a value holds the indices of a top-k, or of the largest: (..., k)."""
    held = fake(node)
    if held is None or held.dtype != torch.int64 or held.dim() < 2:
        return False
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    return opname(source) in ("topk", "sort") or (opname(node) in ("argmax", "slice", "narrow") and held.dim() > 1)


def _fits(weights: fx.Node, indices: fx.Node) -> bool:
    """Whether a value holds a number for each of the indices, of the same call of a module."""
    held = fake(weights)
    if held is None or not held.is_floating_point():
        return False
    sizes = [[on_example(size) for size in shape(node)] for node in (weights, indices)]
    return sizes[0] == sizes[1] and origin(weights).owner == origin(indices).owner
