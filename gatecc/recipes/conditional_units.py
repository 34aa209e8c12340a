"""Conditional computation: hidden units that are on or off for each token."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "conditional-units",
    citation="Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (2013)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "state", "reversible"))],
)
def conditional_units(
    sites: str = "mlp[...]",
    estimator: str = "st",
    scorer: str = "lowrank(16)",
    source: str = "in",
    granularity: str = "channel",
    init: str = "identity",
) -> tuple[Rewrite, ...]:
    """Switch the hidden units of each MLP on or off by a small gater that reads the MLP's input.

    ``estimator`` is how the gater learns through the hard decision: ``st`` (straight-through), ``reinforce`` (unbiased,
    with a baseline; give the loss to ``gatecc.train.set_reward``), ``times_smooth``, ``noise(std)`` (soft),
    ``gumbel(T)``, ``supervised(label=...)``. In training units are sampled, in eval those with a probability above one
    half are on, and the others are exactly 0.

    At init every unit is on with probability sigmoid(6): in eval the model is the original, exactly. It has a masked
    form alone: tokens differ in their units, and to gather rows of a matrix takes as long as to multiply by them.
    """
    spec = GateSpec(source, scorer, granularity, "sigmoid", estimator, init)
    return (Gate(Selector.parse(sites).hidden, spec),)
