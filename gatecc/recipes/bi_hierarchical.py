"""Two encoders that take from each other at several depths."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.exchange import Exchange
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe

_TWO = {"sequence": "residual[sequence.*].out", "structure": "residual[structure.*].out"}


@recipe(
    "bi-hierarchical",
    citation="Bi-hierarchical fusion of protein sequence and structure encoders (a reading of its abstract)",
    cases=[
        Case(streams.two, ("identity", "cost", "gradient", "export", "reversible"), _TWO),
        Case(streams.two, ("identity", "gradient"), _TWO | {"how": "attention"}),
    ],
)
def bi_hierarchical(
    sequence: str, structure: str, how: Literal["token", "mean", "attention"] = "token", heads: int = 4
) -> tuple[Rewrite, ...]:
    """h_seq <- h_seq + g * U h_str and h_str <- h_str + g' * U' h_seq, g = sigmoid(W [h_seq; h_str]), at each depth.

    ``sequence`` and ``structure`` select the layers of the two encoders that exchange, the k-th with the k-th. Both
    directions read what the streams were before the exchange. ``how="token"``: the same token of the other, where both
    encode the same residues; ``"mean"``: the mean of its tokens; ``"attention"``: the global variant, attention with
    ``heads`` heads over all of its tokens, whose output takes the place of the other's token.

    Every U starts at 0, so the two encoders start as they were, apart. What trains first is U; then gates and encoders.
    Both encoders run whole whatever the gates are, for each goes on by itself; there is no form that skips.
    """
    gate = GateSpec.parse("fused(0)+fused(1), linear, element, sigmoid, init=zero")
    return (Exchange(Selector.parse(sequence), structure, gate, how, heads),)
