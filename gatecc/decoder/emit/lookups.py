"""Lookups: tables that are read at positions which a call gives: counted in an attention_mask, or position_ids.

A step reads them as the model does, and no size of the graph tells how far they reach. That is tried on rows without
padding.
"""

from __future__ import annotations

from torch import Tensor, fx

from gatecc.decoder.analysis.inputs import continued
from gatecc.decoder.emit.tables import longest
from gatecc.decoder.plan import Plan
from gatecc.ir.evaluate import Slice, UnprovableError
from gatecc.ir.ops import opname

_LOOKUPS = frozenset("embedding index index_select gather".split())


def reach(plan: Plan, wanted: int) -> int:
    """The largest length up to ``wanted`` at which all of them find what they look for."""
    example = dict(zip(plan.program.placeholders, plan.program.example, strict=True))
    given = {node: example[node][:1] for node in plan.inputs.history}
    for node in plan.nodes if given else ():
        if opname(node) in _LOOKUPS and plan.depends_on(node) == "live":
            part = _part(plan, node)
            if part is not None and _fits(plan, part, given, next(iter(given.values())).shape[1]):
                wanted = longest(lambda length, part=part: _fits(plan, part, given, length), wanted)
    return wanted


def _part(plan: Plan, node: fx.Node) -> Slice | None:
    """What is to be evaluated, None for a mask over queries and keys and for what depends on a context."""
    try:
        part = plan.evaluator.slice(node)
    except UnprovableError:
        return None
    large = any(len(plan.lengths.axes(n)) > 1 for n in part.nodes)
    return None if large or not set(part.inputs) <= set(plan.inputs.history) else part


def _fits(plan: Plan, part: Slice, given: dict[fx.Node, Tensor], length: int) -> bool:
    sizes = dict.fromkeys(plan.lengths.length, length) | dict.fromkeys(plan.lengths.batch, 1)
    try:
        plan.evaluator.run(part, sizes, {node: continued(node, x, length) for node, x in given.items()})
    except UnprovableError:
        return False
    return True
