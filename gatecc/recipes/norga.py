"""NoRGa: prefix tuning whose scores pass a non-linear residual gate."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.columns import Columns
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "norga",
    citation="Mixture of Experts Meets Prompt-Based Continual Learning (NoRGa, 2024)",
    cases=[
        Case(samples.sequences, ("gradient", "export", "reversible")),
        Case(samples.language, ("causality", "cost", "gradient", "export", "state", "reversible")),
    ],
)
def norga(
    sites: str = "attention[...]", tokens: int = 16, activation: Literal["tanh", "sigmoid", "gelu"] = "tanh"
) -> tuple[Rewrite, ...]:
    """Prefix tuning with scores s + t2 act(t1 s) of the prefix: ``tokens`` learned keys and values per key head.

    The softmax over prefix and tokens is joint, the scores s_ij of the tokens stay as they are, and t1 and t2 are two
    learned numbers per layer, ``prefix_gate.gains``, which start at 1. With t2 = 0 it is plain prefix tuning, bitwise.
    A prefix takes its share of the softmax, so the function changes from the start. The paper trains t1 and t2 on the
    first task alone: call ``requires_grad_(False)`` on them then.

    It adds to what runs and leaves nothing out: there is no skipping form.
    """
    return (AttentionEdit(Selector.parse(sites), Columns(tokens, activation)),)
