"""The attention-free module of RRNCO: keys weigh values by themselves, pairwise features say for whom."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.attention_free import AttentionFree
from gatecc.recipes import samples
from gatecc.recipes.linearize import chosen
from gatecc.recipes.registry import Case, recipe


@recipe(
    "attention-free",
    citation="RRNCO: Towards Real-World Routing with Neural Combinatorial Optimization (2025)",
    cases=[Case(samples.sequences, ("cost", "gradient", "reversible"))],
)
def attention_free(
    sites: str = "attention[...]",
    keep: str = "",
    edges: str = "",
    coordinates: str = "",
    width: int = 0,
    temperature: float = 5.0,
) -> tuple[Rewrite, ...]:
    """sigmoid(q) * (e^A' (e^K' * v)) / (e^A' e^K') between the model's own projections, without products of q and k.

    K' is the softmax of k over tokens, A' that of A over keys. ``edges="distance,duration"`` names inputs of the model,
    (B, N, N) each, that A is made from, and ``coordinates`` an input (B, N, 2) whose angles are one more: embeddings
    with ``width`` features, mixed by a gate (a sigmoid for two, a softmax at temperature exp(``temperature``) for
    more), then a linear. Without any, every token reads the same average of values, and only its own sigmoid(q) tells
    it from the others. Bidirectional; padding is left out.
    """
    names = tuple(name.strip() for name in edges.split(",") if name.strip())
    return (Mix(chosen(sites, keep), AttentionFree(names, coordinates, width, temperature)),)
