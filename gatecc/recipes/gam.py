"""Gated associative memory: attention becomes a short convolution and a memory that all tokens share."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.gam import GAM
from gatecc.recipes import samples
from gatecc.recipes.linearize import chosen
from gatecc.recipes.registry import Case, recipe


@recipe(
    "gam",
    citation="Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling (2025)",
    cases=[Case(samples.language, ("causality", "cost", "gradient", "state", "reversible"))],
)
def gam(sites: str = "attention[...]", keep: str = "", slots: int = 512, taps: int = 3) -> tuple[Rewrite, ...]:
    """A causal convolution of 3 taps and a memory of 512 rows in the place of attention and of its projections.

    y = sigmoid(a) * conv(x) + sigmoid(b) * softmax(x M^T) M with [a, b] = W x: M, without a scale, is the same for all
    tokens, so a layer mixes ``taps`` neighbours and nothing else, and a model of L layers sees L * (``taps`` - 1)
    tokens back. ``keep="3::4"`` leaves every fourth attention as it is, which is where anything further comes from.
    The old projections stay in the state dict, unread. Nothing of the pretrained attention is used: train it.
    """
    return (Mix(chosen(sites, keep).out, GAM(slots, taps)),)
