"""Affine-scaled attention: weights a become alpha * a + beta, without touching the attention kernel."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.prefix_sum import PrefixSum
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "affine-attention",
    citation="Affine-Scaled Attention (a reading of its abstract)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "gradient", "state", "reversible"))],
)
def affine_attention(
    sites: str = "attention[...]", alpha: str = "sigmoid", beta: str = "tanh", init: str = "identity"
) -> tuple[Rewrite, ...]:
    """Scale and shift the attention weights of each head by two gates: a' = alpha * a + beta on the keys that are seen.

    Rows of a' sum to alpha + beta * (number of keys seen), so a head can attend to nothing, or to everything. It is
    computed as alpha * (a @ v) + beta * (sum of v over these keys): one gate on the head outputs and one prefix-sum
    branch, for any attention kernel. ``alpha`` and ``beta`` are the bounded activations of the two gates, which read
    the query's input. At init alpha is 1 and beta 0.

    The mask must be bidirectional, causal or a sliding window, with padding or packed rows; unproved masks are refused.
    """
    heads = Selector.parse(sites).heads
    scale = Gate(heads, GateSpec("hidden", "linear", "head", alpha, init=init), label="alpha")
    shift = GateSpec("hidden", "linear", "head", beta, init="zero")
    return scale, Branch(heads, PrefixSum(), shift, label="beta")
