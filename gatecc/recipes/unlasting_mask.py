"""Output masks: a net of its own says which outputs are silent."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "unlasting-mask",
    citation="Unlasting: the mask model of a generator of gene expression (a reading of its abstract)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "export", "state", "reversible"))],
)
def unlasting_mask(
    sites: str = "head[...]",
    source: str = "in",
    scorer: str = "mlp(64)",
    estimator: str = "st",
    init: str = "identity",
) -> tuple[Rewrite, ...]:
    """Set outputs of a model to 0 where a net of its own predicts that they are silent, such as genes of a cell.

    y <- y * 1[p < 1/2], p = 1 - sigmoid(MLP(x)): a probability per output, from what the head reads, or from a
    condition of the model (``source="cond(cell)"``). In training masks are sampled, and the loss on the outputs reaches
    the net straight through (``estimator``: "reinforce" and the others of conditional-units do, too). In eval a mask is
    the likelier side.

    It starts with every output on: the model is the original, exactly. No skipping form exists: to gather the rows of a
    head that are on for a sample takes as long as to multiply by all of them.
    """
    spec = GateSpec(source, scorer, "channel", "sigmoid", estimator, init)
    return (Gate(Selector.parse(sites).out, spec, label="mask"),)
