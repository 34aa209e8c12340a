"""Selective Sinkhorn routing: balanced experts without a balancing loss."""

from __future__ import annotations

from gatecc.ir.gates.choices.sinkhorn import SinkhornTopK
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.route import Route
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "selective-sinkhorn",
    citation="Selective Sinkhorn Routing for Improved Sparse Mixture of Experts (2025)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "gradient", "reversible"))],
)
def selective_sinkhorn(
    experts: int = 8,
    k: int = 2,
    p: float = 0.5,
    iters: int = 20,
    eps: float = 1.0,
    sites: str = "mlp[...]",
    init: str = "random(0.02)",
) -> tuple[Rewrite, ...]:
    """Every feed-forward layer becomes ``experts`` copies of itself; a transport plan balances them while they train.

    In the fraction ``p`` of the training steps tokens and experts are matched by Sinkhorn's iteration: rows of the plan
    sum to 1 and each expert gets an equal share. In the other steps, and always in evaluation, the plan is the softmax.
    No auxiliary loss and no noise. Which steps use the plan is decided by ``gatecc.train.routing.step``.
    """
    router = RouterSpec("in", "linear(bias=False)", SinkhornTopK(k, p, iters, eps), init)
    return (Route(Selector.parse(sites), router, Copies(experts)),)
