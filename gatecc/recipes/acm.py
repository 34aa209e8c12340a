"""Adaptive Computation Modules: a token takes as much of each layer as it needs."""

from __future__ import annotations

from gatecc.ir.gates.balance import Budget
from gatecc.ir.gates.choices.prefix import Prefix
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.route import Route
from gatecc.passes.route.split import Partition, Split
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "acm",
    citation="Adaptive Computation Modules: Granular Conditional Computation for Efficient Inference (2023)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "reversible")),
        Case(samples.language, ("identity", "state"), {"sites": "linear[*.mlp.up]", "learners": 2}),
    ],
)
def acm(
    learners: int = 4,
    share: float = 0.5,
    sites: str = "mlp[...]",
    scorer: str = "mlp(16)",
    by: str | Partition = "contiguous",
    T: float = 1.0,
    lead: float = 4.0,
) -> tuple[Rewrite, ...]:
    """Every layer becomes ``learners`` in an order; a small gate says how many of them a token takes, from none to all.

    The learners are groups of the layer's hidden neurons, at linear sites of its singular directions, the strongest
    first. All of them are the layer, and a fresh gate takes all: the model starts as it was. Training has three phases:
    ``gatecc.train.train_learners`` (each prefix of learners imitates the layer), ``gatecc.train.train_counts`` (the
    gate learns how many are worth it), and `heal`, end to end, where the counts are drawn by a hard Gumbel softmax of
    temperature ``T`` and the square of what tokens take beyond ``share`` is added to the loss. In evaluation the
    learners that a token does not take do not run.
    """
    router = RouterSpec("in", scorer, Prefix(T, lead), "zero", balance=Budget(share))
    return (Route(Selector.parse(sites), router, Split(learners, Partition.coerce(by)), combine="prefix"),)
