"""LINA's gates: learned constants for each token and head on keys and values."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "token-head-gates",
    citation="LINA, its gates on keys and values (linear attention for image generation)",
    cases=[Case(samples.sequences, ("identity", "gradient", "reversible"))],
)
def token_head_gates(sites: str = "attention[...]") -> tuple[Rewrite, ...]:
    """Learned constants kappa and nu of shape (tokens, heads): k <- k * kappa, v <- v * nu, both 1 at init.

    They belong to places, so the model takes sequences of one length only, that of the example inputs; other lengths
    are refused. Once they differ, the attention depends on the order of the tokens.
    """
    constant = GateSpec("param", "none", "token*head", "linear")
    chosen = Selector.parse(sites)
    return Gate(chosen.k, constant, label="kappa"), Gate(chosen.v, constant, label="nu")
