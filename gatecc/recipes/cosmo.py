"""COSMO: two classifiers, of seen and of unseen classes, blended by how sure the first one is."""

from __future__ import annotations

from gatecc.ir.gates.centres import Confidence
from gatecc.ir.gates.choices.models import Blend
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "cosmo",
    citation="Adaptive Confidence Smoothing for Generalized Zero-Shot Learning (COSMO, 2019)",
    cases=[Case(ensembles.experts_of_classes, ("cost", "export", "reversible"), {"seen": (0, 1, 2), "unseen": (3, 4)})],
)
def cosmo(
    seen: tuple[int, ...],
    unseen: tuple[int, ...],
    expert: str = "seen",
    t: float = 0.5,
    T: float = 0.1,  # the paper's letter
) -> tuple[Rewrite, ...]:
    """p = g (g p_unseen + (1 - g) / |unseen|) + (1 - g) ((1 - g) p_seen + g / |seen|), with g = σ((t - s) / T).

    For ensembles of two members that return probabilities over all classes, the one of the ``seen`` classes first,
    which is called ``expert``; s is its largest probability. ``seen`` and ``unseen`` are numbers of classes. Each
    expert is smoothed towards the uniform distribution over its classes as far as the gate turns away from it, so rows
    sum to 1.

    Experts stay as they are; t and T are found on validation data, by ``gatecc.train.sweep``.
    """
    router = RouterSpec(Confidence(expert), "none", Blend(t, T))
    return (Choose(Model[...], router, combine="smooth", classes=(tuple(seen), tuple(unseen))),)
