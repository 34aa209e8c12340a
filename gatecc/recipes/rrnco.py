"""RRNCO: coordinates and distances of a routing problem, fused before and inside the encoder."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.nearest_distances import NearestDistances
from gatecc.passes.fuse import Fuse
from gatecc.recipes import streams
from gatecc.recipes.attention_free import attention_free
from gatecc.recipes.registry import Case, recipe


@recipe(
    "rrnco",
    citation="RRNCO: Towards Real-World Routing with Neural Combinatorial Optimization (2025)",
    cases=[
        Case(streams.routing, ("cost", "gradient", "export", "reversible"), {"k": 3, "hidden": 8}),
        Case(streams.routing, ("gradient", "reversible"), {"k": 3, "hidden": 8, "attention": ""}),
    ],
)
def rrnco(
    distance: str = "distance",
    edges: str = "",
    coordinates: str = "",
    sites: str = "linear[0]",
    attention: str = "attention[...]",
    k: int = 8,
    hidden: int = 64,
) -> tuple[Rewrite, ...]:
    """e = g * c + (1 - g) * d, g = sigmoid(MLP([c; d])), then attention that knows distances, angles and durations.

    ``sites`` is the layer that embeds the coordinates of each node: c. d is linear in the distances to its ``k``
    nearest nodes; ``distance`` is an input of the model, (B, N, N). (The paper draws k neighbours with probabilities
    that fall with the distance; here they are the nearest.) g is one number for each element and starts at 1/2, with
    ``hidden`` units in its MLP.

    The attentions become `attention-free`, with A_ij linear in a gated mixture of embeddings of the distance, of the
    ``edges`` that are named beside it (durations) and of the angles between ``coordinates``; ``attention=""`` keeps
    them. Bidirectional models only. Distances are no function of coordinates in real cities: both are always read, g
    differs from channel to channel, and there is no form that skips.
    """
    gate = GateSpec.parse(f"fused(0)+fused(1), mlp({hidden}), element, sigmoid, init=zero")
    near = NearestDistances(distance, k)
    fused = Fuse(Selector.parse(sites).out, gate, ("self", str(near)), label="distance_gate")
    if not attention:
        return (fused,)
    return fused, *attention_free(attention, edges=",".join(filter(None, (distance, edges))), coordinates=coordinates)
