"""TableDART: a gate sends each table to a text model, an image model, or one that fuses both."""

from __future__ import annotations

from gatecc.ir.gates.choice import SoftmaxTopK
from gatecc.ir.gates.scorer import MLP
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "tabledart",
    citation="TableDART: dynamic adaptive multi-modal routing for table understanding (a reading of its abstract)",
    cases=[Case(ensembles.with_fusion, ("cost", "gradient", "export", "reversible"), {"hidden": 8})],
)
def tabledart(reads: str = "features", hidden: int = 256) -> tuple[Rewrite, ...]:
    """One path for each sample, the most probable of softmax(MLP(features)).

    Members are the paths: text, image, and a fusion that may read the outputs of the other two
    (``gatecc.ensemble(..., inputs={"fusion": {"text": "text", "image": "image"}})``); a sample that is fused runs all
    three. ``reads`` are frozen embeddings, given as ``features``. The gate alone is trained, on accuracy plus cost:
    ``gatecc.train.expected_loss``; the gradient of a task's loss reaches it, too.
    """
    return (Choose(Model[...], RouterSpec(reads, MLP(hidden), SoftmaxTopK(1, straight=True))),)
