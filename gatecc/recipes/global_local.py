"""A small local model beside a global one, for each sample that the global one would get wrong."""

from __future__ import annotations

from gatecc.ir.gates.choices.models import Defer
from gatecc.ir.gates.scorer import MLP
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "global-local",
    citation="Global/Local expert customisation (a reading of its abstract)",
    cases=[Case(ensembles.classifiers, ("cost", "gradient", "export", "reversible"), {"hidden": 8})],
)
def global_local(reads: str = "features", hidden: int = 64, t: float = 0.5) -> tuple[Rewrite, ...]:
    """The global member's output where a gating network is below ``t``, else that of the local member.

    For ensembles of two members, the global one first. The gating network, an MLP of ``hidden`` units on what it
    ``reads``, is a binary classifier: its probability that the global member errs, p = softmax(logits)[1].
    A ``t`` above 1 is the global member alone; the threshold is the buffer ``router.threshold``.

    Train the local member on the samples that the global one gets wrong, then the gate on which ones these are:
    ``F.cross_entropy(ensemble.logits(x), wrong.long())``.
    """
    return (Choose(Model[...], RouterSpec(reads, MLP(hidden), Defer(t))),)
