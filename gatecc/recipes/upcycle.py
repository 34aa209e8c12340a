"""Upcycling: dense feed-forward layers become mixtures of experts that start as they were."""

from __future__ import annotations

from gatecc.ir.gates.choice import SoftmaxTopK
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.route import Route
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "upcycle",
    citation="Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints (2022)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "gradient", "reversible"))],
)
def upcycle(experts: int = 8, k: int = 2, sites: str = "mlp[...]", init: str = "random(0.02)") -> tuple[Rewrite, ...]:
    """Every feed-forward layer becomes ``experts`` copies of itself; a softmax router chooses ``k`` for each token."""
    router = RouterSpec("in", "linear(bias=False)", SoftmaxTopK(k), init)
    return (Route(Selector.parse(sites), router, Copies(experts)),)
