"""Upcycling: dense feed-forward layers become mixtures of experts that start as they were."""

from __future__ import annotations

from typing import Literal

from gatecc.errors import ArgumentError
from gatecc.ir.gates.choice import Choice, SoftmaxTopK
from gatecc.ir.gates.choices.per_group import PerGroup
from gatecc.ir.gates.choices.sigmoid import SigmoidTopK
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.copies import Copies, Drop
from gatecc.passes.route.route import Route
from gatecc.passes.route.shared import Shared
from gatecc.passes.route.spec import ExpertsSpec
from gatecc.passes.route.split import Groups
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe

How = Literal["copies", "noise", "drop", "shared", "gated-shared", "groups"]
Scores = Literal["softmax", "sigmoid"]


@recipe(
    "upcycle",
    citation="Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints (2022)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "gradient", "reversible")),
        Case(samples.language, ("identity", "state"), {"how": "gated-shared", "k": 1}),
        Case(samples.language, ("identity", "gradient", "export"), {"how": "groups", "k": 4}),
    ],
)
def upcycle(
    experts: int = 8,
    k: int = 2,
    how: How = "copies",
    share: float = 0.0,
    sites: str = "mlp[...]",
    init: str = "random(0.02)",
    scores: Scores = "softmax",
) -> tuple[Rewrite, ...]:
    """Every feed-forward layer becomes ``experts`` experts, of which a softmax router chooses ``k`` for each token.

    ``how`` they are made:

    - ``copies`` of the layer; with ``k=1`` the weight is 1, and the router learns by straight-through;
    - ``noise``: copies with normal noise, ``share`` (0.1) of the standard deviation of each matrix;
    - ``drop``: copies of which a ``share`` (0.5) of the hidden neurons starts anew (Drop-Upcycling, 2025);
    - ``shared``: the layer stays, for every token, and experts that start at zero are added; ``gated-shared``: the
      layer is scaled by a sigmoid per token (Qwen2-MoE);
    - ``groups``: the layer in ``k`` parts, ``experts / k`` copies of each, of which a token takes one: as much computed
      per token as before (virtual groups, 2024).

    All but ``noise`` and ``drop`` start as the dense model, up to rounding. ``scores="sigmoid"``: the ``k`` experts are
    those of the largest sigmoids, weighed by them divided by their sum, as in DeepSeek-V3.
    """
    spec, choice = _made(how, experts, k, share, scores)
    return (Route(Selector.parse(sites), RouterSpec("in", "linear(bias=False)", choice, init), spec),)


def _made(how: How, experts: int, k: int, share: float, scores: Scores) -> tuple[ExpertsSpec, Choice]:
    """What experts are made of, and how they are chosen. Raises ArgumentError."""
    if share and how not in ("noise", "drop"):
        raise ArgumentError(
            "share is that of noise or of new neurons",
            found=f"share={share}, how={how!r}",
            expected="how='noise' or 'drop'",
        )
    if scores == "sigmoid" and (how == "groups" or k < 2):
        raise ArgumentError(
            "one expert is weighed by 1 whatever its sigmoid is, so that the router would not learn",
            found=f"scores='sigmoid', how={how!r}, k={k}",
            expected="k of at least 2, and another how than 'groups'",
        )
    if how == "groups":
        if k < 1 or experts % k:
            raise ArgumentError(
                "the experts are copies of k parts",
                found=f"experts={experts}, k={k}",
                expected="a multiple of k experts",
            )
        return Groups(k, experts // k), PerGroup(k)
    choice = SigmoidTopK(k) if scores == "sigmoid" else SoftmaxTopK(k, straight=k == 1)
    if how == "noise":
        return Copies(experts, noise=share or 0.1), choice
    if how == "drop":
        return Drop(experts, share or 0.5), choice
    copies = Copies(experts)
    return (copies if how == "copies" else Shared(copies, gated=how == "gated-shared")), choice
