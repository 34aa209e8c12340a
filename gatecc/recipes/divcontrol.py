"""DivControl: the singular parts of a matrix, weighed by an embedded condition."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.svd_split import SvdSplit
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "divcontrol",
    citation="DivControl: Knowledge Diversion for Controllable Image Generation (2025)",
    cases=[
        Case(
            samples.conditioned,
            ("identity", "cost", "gradient", "reversible"),
            {"condition": "text", "sites": "linear[*.0.*.q_proj]", "parts": 2},
        )
    ],
)
def divcontrol(
    condition: str,
    sites: str = "linear[*.q_proj,*.k_proj,*.v_proj,*.o_proj]",
    parts: int = 4,
    shared: float = 0.5,
    init: str = "identity",
) -> tuple[Rewrite, ...]:
    """Each matrix becomes a sum of its singular parts; a softmax over the embedding of the condition weighs them.

    The largest singular values (the fraction ``shared``) are for every condition (learngenes); the others are cut into
    ``parts`` (tailors), W x = W_shared x + sum over j of g_j(c) W_j x. ``condition`` is the input of the model that
    holds the embedding c, (B, C).

    At first g_j = parts * softmax = 1, so the model is as it was, up to the rounding of the decomposition (1e-5).
    ``init="zero"`` leaves the factor out, as in the paper: g_j = 1/parts at first.
    """
    gate = GateSpec(f"cond({condition})", "linear", "expert", "softmax", init=init)
    return (SvdSplit(Selector.parse(sites).out, gate, parts, shared),)
