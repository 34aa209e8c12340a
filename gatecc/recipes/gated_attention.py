"""Gates on attention values: where the gate stands, and what it varies over."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.granularity import Granularity
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "gated-attention",
    citation="Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free (2025)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "gradient", "export", "state", "reversible"))],
)
def gated_attention(
    sites: str = "attention[...]",
    position: Literal["heads", "v", "k", "q", "out"] = "heads",
    granularity: Literal["head", "element"] = "head",
    activation: str = "sigmoid",
    estimator: str = "exact",
    init: str = "identity",
    fuse_into: str | None = None,
) -> tuple[Rewrite, ...]:
    """A sigmoid gate on each head, read from the same normalised input as the query.

    ``position`` is one of the paper's five: after the attention core (``heads``, its best), on the value, key or query
    heads (after any rotary embedding), or after the output projection, where the heads are mixed and the gate is
    elementwise. ``granularity``: one gate per head, or one per element.

    The identity start is 2*sigmoid(0), exactly 1. ``init="identity(how=fold)"`` keeps a plain sigmoid and doubles the
    next linear instead (positions heads, exactly 1 as well); ``init="identity(how=bias)"`` starts at sigmoid(6) and
    reports what is missing to 1. ``fuse_into="q"`` puts the gate's rows into the query projection, laid out
    for each group of key heads as [query rows | gate rows], as the published models do; without a bias of the query
    projection the gate has none.
    """
    granularity = "element" if position == "out" else granularity
    source = "hidden_kv" if position in ("k", "v") else "hidden"
    spec = GateSpec(source, "linear", Granularity.coerce(granularity), activation, estimator, init, fuse_into)
    return (Gate(getattr(Selector.parse(sites), position), spec),)
