"""Head sites: the last projection before an output of the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.registry import matcher
from gatecc.ir.ops import CASTS, SOFTMAXES, VIEWS, opname
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Head, Refusal

_AFTER = (
    VIEWS
    | CASTS
    | SOFTMAXES
    | frozenset("log_softmax add mul div neg exp clamp dropout upsample_bilinear2d _upsample".split())
)


@matcher
def match_head(facts: JoinedFacts) -> Iterator[Head | Refusal]:
    """One site a projection that yields an output, in the order of the outputs; none in a submodule's program.

    A model without any is refused once (GCC161).
    """
    if facts.program.fqn:
        return  # the outputs of a submodule are not those of the model
    leaves = [leaf for leaf in facts.program.outputs if isinstance(leaf, fx.Node) and leaf in facts.data]
    heads = {node for leaf in leaves for node in _last_projections(facts, leaf)}
    for node in sorted(heads):
        projection = facts.whole.get(node) or facts.projections[node]
        values = {"in": facts.value(projection.inp), "out": facts.value(projection.out)}
        yield Head(**facts.place("head", node), values=values, weights=projection.weights)
    if leaves and not heads:
        yield refuse("GCC161", "head", leaves[0], f"the first output comes from {opname(leaves[0])}", owner="")


def _last_projections(facts: JoinedFacts, leaf: fx.Node) -> list[fx.Node]:
    """The projections behind an output, through views and element-wise functions of them alone.

    Several if their outputs are added (LeViT averages a classifier and a distilled one); none if anything else is read.
    """
    found: list[fx.Node] = []
    stack = [leaf]
    while stack:
        node = stack.pop()
        if (node in facts.whole or node in facts.projections) and not facts.is_sum_of_equals(node):
            found.append(node)
            continue
        sources = [source for source in facts.inputs[node] if source in facts.source]
        if node in facts.nonlinearities:
            sources = [facts.nonlinearities[node].inp]
        elif node in facts.residuals or opname(node) not in _AFTER or (len(sources) > 1 and opname(node) != "add"):
            return []
        stack += sources
    return found
