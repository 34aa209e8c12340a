"""MixER: an expert per family of contexts, found by clusters and not by gradients."""

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
    "mixer",
    citation="MixER: Better Mixture of Experts Routing for Hierarchical Meta-Learning (2025)",
    cases=[Case(samples.sequences, ("identity", "cost", "gradient", "reversible"))],
)
def mixer(experts: int = 4, context: str = "pool(in)", sites: str = "mlp[...]") -> tuple[Rewrite, ...]:
    """Every MLP becomes ``experts`` copies of itself; a sample goes to one of them, by its context.

    ``context`` is what the router reads: ``pool(in)``, the mean over the tokens of the MLP's input, or ``cond(name)``,
    an input of the model with a vector per sample. The router has no gradient: ``gatecc.train.fit_contexts`` makes
    clusters of contexts by k-means, gives each cluster an expert (with ``gatecc.train.expert_losses``, the unused one
    that does best), and fits the router to them by least squares. Call it between epochs.
    """
    router = RouterSpec(context, "lstsq", SoftmaxTopK(1), "zero")
    return (Route(Selector.parse(sites), router, Copies(experts)),)
