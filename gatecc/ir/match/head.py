"""Head sites: the last projection before an output of the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.ops import CASTS, SOFTMAXES, VIEWS, opname
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Head, Refusal

_AFTER = (
    VIEWS
    | CASTS
    | SOFTMAXES
    | frozenset("log_softmax mul div neg exp clamp dropout upsample_bilinear2d _upsample".split())
)


def match_head(facts: Facts) -> Iterator[Head | Refusal]:
    """One site a projection that yields an output, in the order of the outputs; none in a submodule's program.

    A model without any is refused once (GCC161).
    """
    if facts.program.fqn:
        return  # the outputs of a submodule are not those of the model
    leaves = [leaf for leaf in facts.program.outputs if isinstance(leaf, fx.Node) and leaf in facts.data]
    heads: dict[fx.Node, None] = {}
    for leaf in leaves:
        node = _last_projection(facts, leaf)
        if node is not None:
            heads[node] = None
    for node in sorted(heads):
        projection = facts.projections[node]
        values = {"in": facts.value(projection.inp), "out": facts.value(projection.out)}
        yield Head(**facts.place("head", node), values=values, weights={"weight": projection.weight})
    if leaves and not heads:
        yield refuse("GCC161", "head", leaves[0], f"the first output comes from {opname(leaves[0])}", owner="")


def _last_projection(facts: Facts, node: fx.Node) -> fx.Node | None:
    """The projection behind an output, through views and element-wise functions of it alone."""
    while node not in facts.projections:
        if node in facts.nonlinearities:
            node = facts.nonlinearities[node].inp
            continue
        sources = [source for source in node.all_input_nodes if source in facts.data and source in facts.source]
        if opname(node) not in _AFTER or len(sources) != 1:
            return None
        node = sources[0]
    return node
