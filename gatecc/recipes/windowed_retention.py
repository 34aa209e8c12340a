"""Gated-SwinRMT's gate G1: an elementwise gate before the output projection of windowed attention."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "windowed-retention-gate",
    citation="Gated-SwinRMT, its gate G1 (a reading of its abstract)",
    cases=[Case(samples.sequences, ("identity", "gradient", "reversible"))],
)
def windowed_retention_gate(sites: str = "attention[...]", init: str = "identity") -> tuple[Rewrite, ...]:
    """The gate G1: an elementwise sigmoid of the window's input on the head outputs, before the output projection.

    Works on windowed attention (Swin) as on any other; the decay of the scores is a rewrite of its own. At init the
    gate is 2*sigmoid(0) = 1.
    """
    return (g1(Selector.parse(sites), init),)


def g1(where: Selector, init: str) -> Gate:
    """The gate at these sites."""
    return Gate(where.heads, GateSpec("hidden", "linear", "element", "sigmoid", init=init))
