"""AdaptDHM: clusters of samples, each with a network of its own; centres follow the data without a gradient."""

from __future__ import annotations

from gatecc.ir.gates.centres import Centres
from gatecc.ir.gates.choice import SoftmaxTopK
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "adaptdhm",
    citation="AdaptDHM: Adaptive Distribution Hierarchical Model for Multi-Domain CTR Prediction (from its abstract)",
    cases=[Case(ensembles.classifiers, ("cost", "gradient", "reversible"))],
)
def adaptdhm(
    reads: str = "features",
    k: int = 1,
    T: float = 0.1,
) -> tuple[Rewrite, ...]:
    """The ``k`` members whose cluster centres are nearest, with weights softmax(cos(x, μ) / T) over those.

    Each member is the network of one cluster. Centres ``router.weight`` (E, C) start at random and have no gradient:
    call ``gatecc.train.update_centres(ensemble, x)`` once per step. With one member it is that member.
    """
    return (Choose(Model[...], RouterSpec(reads, Centres(T), SoftmaxTopK(k), "random(1.0)")),)
