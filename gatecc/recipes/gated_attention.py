"""Gates on attention values: where the gate stands, and what it varies over."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes.registry import recipe

Position = Literal["heads", "v", "k", "q", "out"]


@recipe(
    "gated-attention",
    system=2,
    citation="Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free (2025)",
)
def gated_attention(
    sites: str = "attention[...]",
    position: Position = "heads",
    granularity: Literal["head", "element"] = "head",
    init: str = "identity",
    fuse_into: str | None = None,
) -> tuple[Rewrite, ...]:
    """A sigmoid gate on each head, read from the same normalised input as the query.

    ``position`` is one of the paper's five: after the attention core (``heads``, its best), on the value, key or query
    heads, or after the output projection. ``granularity``: one gate a head, or one an element. The identity start is
    2*sigmoid(0), exactly 1; ``init="identity(how=fold)"`` keeps a plain sigmoid and doubles the next linear instead.
    ``fuse_into="q"`` puts the gate's rows into the query projection, as the published models do.
    """
    if position == "out":
        granularity = "element"
    source = "hidden_kv" if position in ("k", "v") else "hidden"
    spec = GateSpec(source, "linear", granularity, "sigmoid", init=init, fuse_into=fuse_into)
    selector = Selector.parse(sites)
    return (Gate(getattr(selector, position), spec),)
