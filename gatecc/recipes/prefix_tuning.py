"""Prefix tuning: learned keys and values before those of the tokens."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.prefix import Prefix
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "prefix-tuning",
    citation="Prefix-Tuning: Optimizing Continuous Prompts for Generation (2021); LLaMA-Adapter: Efficient Fine-tuning "
    "of Language Models with Zero-init Attention (2023)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "gradient", "export", "state", "reversible")),
        Case(samples.sequences, ("gradient", "reversible"), {"softmax": "joint"}),
    ],
)
def prefix_tuning(
    sites: str = "attention[...]",
    tokens: int = 16,
    softmax: Literal["apart", "joint"] = "apart",
    activation: str = "tanh",
) -> tuple[Rewrite, ...]:
    """Let every query of an attention see learned keys and values, ``tokens`` for each key head, beside its tokens.

    ``softmax="apart"`` is LLaMA-Adapter's form: attention to the prefix alone, times a gate per head that starts at 0,
    is added to the heads, so the model starts as it was. ``softmax="joint"`` is prefix tuning: one softmax over prefix
    and tokens, and no gate; it changes the function at once, for a prefix takes its share of the softmax.
    """
    heads = Selector.parse(sites).heads
    if softmax == "joint":
        return (Branch(heads, Prefix(tokens), op="lerp"),)
    gate = GateSpec("param", "none", "head", activation, init="zero")
    return (Branch(heads, Prefix(tokens, softmax="apart"), gate, label="prefix_gate"),)
