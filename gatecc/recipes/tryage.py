"""Tryage: the model with the least predicted loss plus what it costs."""

from __future__ import annotations

from gatecc.ir.gates.choices.models import Least
from gatecc.ir.gates.scorer import MLP
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "tryage",
    citation="Tryage: Real-time, intelligent Routing of User Prompts to Large Language Models (2023)",
    cases=[Case(ensembles.classifiers, ("cost", "export", "reversible"), {"hidden": 8, "size": 0.1})],
)
def tryage(
    reads: str = "features",
    hidden: int = 256,
    size: float = 0.0,
    flops: float = 0.0,
    penalties: tuple[float, ...] = (),
) -> tuple[Rewrite, ...]:
    """The member m with the least L̂_m(x) + Σ_j λ_j c_j(m), for each sample.

    L̂ is an MLP on what the router ``reads``, trained to predict each member's loss:
    ``F.mse_loss(ensemble.logits(x), gatecc.train.member_losses(ensemble, loss, x))``. ``size`` and ``flops`` are λ of a
    member's parameters and operations, relative to the largest; ``penalties`` are other costs, one for each member
    (recency, price), λ included. The sum is the buffer ``router.cost``, which may be changed at any time.
    """
    return (Choose(Model[...], RouterSpec(reads, MLP(hidden), Least()), penalties=penalties, size=size, flops=flops),)
