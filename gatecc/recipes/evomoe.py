"""EvoMoE: experts grow out of one layer, and a gate goes from dense to sparse."""

from __future__ import annotations

from gatecc.ir.gates.anneal import Exponential
from gatecc.ir.gates.choices.dense_to_sparse import DenseToSparse
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.masked import Masked
from gatecc.passes.route.route import Route
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "evomoe",
    citation="EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate (2021)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "reversible"), {"share": 0.0}),
        Case(samples.language, ("cost", "gradient", "state", "reversible"), {"experts": 4, "k": 2}),
    ],
)
def evomoe(
    experts: int = 8,
    k: int = 1,
    share: float = 0.1,
    start: float = 2.0,
    end: float = 0.3,
    steps: int = 10_000,
    threshold: float = 1e-3,
    sites: str = "mlp[...]",
    init: str = "random(0.02)",
) -> tuple[Rewrite, ...]:
    """Every feed-forward layer spawns ``experts`` copies of itself, each without a random ``share`` of its weights.

    The gate starts dense: in training a softmax with Gumbel noise and temperature T picks all experts above
    ``threshold``, and T falls from ``start`` to ``end`` in ``steps`` steps of the optimizer, until ``k`` are left. In
    evaluation k run. Train the dense model first: that is the first phase of the paper. With ``share=0`` the model
    starts as it was.
    """
    choice = DenseToSparse(k, Exponential(start, end, steps), threshold)
    router = RouterSpec("in", "linear", choice, init)
    return (Route(Selector.parse(sites), router, Masked(experts, share)),)
