"""MoE²: a gate over many models, restricted to those that a budget allows."""

from __future__ import annotations

from gatecc.ir.gates.choices.models import Among
from gatecc.ir.gates.scorer import MLP
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "moe2",
    citation="MoE²: Optimizing Collaborative Inference for Edge Large Language Models (a reading of its overview)",
    cases=[Case(ensembles.classifiers, ("cost", "gradient", "export", "reversible"), {"hidden": 8})],
)
def moe2(reads: str = "features", hidden: int = 256) -> tuple[Rewrite, ...]:
    """y = Σ_(e in S) g_e f_e(x) / Σ_(e in S) g_e, g = softmax(MLP(features)), S the members that are allowed.

    The gate is trained once, with all members. ``gatecc.train.choose_subset`` finds the best S within a budget of
    energy and latency, ``gatecc.train.restrict(ensemble, S)`` sets it (the buffer ``router.allowed``): members outside
    of it do not run, and the weights of the others are those of the whole gate, divided by their sum.
    """
    return (Choose(Model[...], RouterSpec(reads, MLP(hidden), Among())),)
