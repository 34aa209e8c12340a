"""PLANET: each modality takes its context from the others through a gate, and becomes an entry of a codebook."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.codebook import Codebook
from gatecc.passes.branch.cross_attention import CrossAttention
from gatecc.passes.fuse import Fuse
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe

_TWO = {"sites": "residual[sequence.*].out", "context": 'at("residual[structure.*].out")'}


@recipe(
    "planet-edg",
    citation="PLANET: embedding-wise gates and discrete retrieval over multimodal graphs (a reading of its abstract)",
    cases=[
        Case(streams.two, ("identity", "cost", "gradient", "export", "reversible"), _TWO),
        Case(streams.two, ("cost", "reversible"), _TWO | {"entries": 5}),
    ],
)
def planet_edg(
    context: str, sites: str = "embedding[...]", heads: int = 4, entries: int = 0, beta: float = 0.25, mask: str = ""
) -> tuple[Rewrite, ...]:
    """h_m <- h_m + g * c_m with c_m = attention of h_m over the other modality, g = sigmoid(W [h_m; c_m]).

    ``sites`` are the values of one modality, ``context`` is where the other is read: ``at("block[image.*].out")``, the
    k-th for the k-th, or ``cond(image)``, an input of the model; ``mask`` names an input (B, M), 0 at its padding. Use
    the recipe once for each modality. The attention's output projection starts at 0: the start is the original.

    With ``entries`` each h_m is then replaced by the nearest of so many learned vectors, with a straight-through
    gradient and the losses of VQ-VAE, the one for the vectors times ``beta``; this changes the function from the start.

    A gate of 0 leaves the context out of one channel of one token, while the others read it: no form skips.
    """
    gate = GateSpec.parse("fused(0)+fused(1), linear, element, sigmoid, init=zero")
    attended = CrossAttention(context, heads, mask=mask, start="zero")
    chosen = Selector.parse(sites)
    fused = Fuse(chosen, gate, ("self", str(attended)), label="context_gate", mode="add")
    if not entries:
        return (fused,)
    return fused, Branch(chosen, Codebook(entries, beta), label="codebook", op="lerp")
