"""MM-DREX: a router that reads everything weighs all experts."""

from __future__ import annotations

from gatecc.ir.gates.choices.threshold import Dense
from gatecc.ir.gates.scorer import MLP
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "mm-drex",
    citation="MM-DREX: multimodal-driven dynamic routing of LLM experts (a reading of its abstract)",
    cases=[Case(ensembles.classifiers, ("cost", "gradient", "reversible"), {"hidden": 8})],
)
def mm_drex(reads: str = "features", hidden: int = 256) -> tuple[Rewrite, ...]:
    """y = Σ_e softmax(MLP(features))_e f_e(x): every member runs, and the weights sum to 1.

    ``reads`` is what the router knows of a sample: a vision language model, given as a feature. At inference a member
    whose weight is exactly 0 does not run.
    """
    return (Choose(Model[...], RouterSpec(reads, MLP(hidden), Dense())),)
