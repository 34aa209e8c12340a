"""The value gate of PILL: how much each head sees of image tokens."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "value-gate",
    citation="PILL: Plug Into LLM with Adapter Expert and Attention Gate (2023), the modality attention gate",
    cases=[Case(samples.images, ("gradient", "reversible"))],
)
def value_gate(
    sites: str = "attention[...]",
    where: str = "",
    activation: Literal["tanh", "1+tanh"] = "tanh",
    init: str = "zero",
) -> tuple[Rewrite, ...]:
    """A tanh gate per head on the values of image tokens: v <- v * tanh(W x).

    ``where`` names the input of the model that marks image tokens (a mask over tokens); the values of the others are
    not gated, and without it those of all tokens are.

    The paper starts at W = 0: image values are 0. That is not the text-only model: image keys still take their share of
    the attention, and the text's contribution shrinks by it. tanh cannot start at 1 exactly, ``init="identity"`` starts
    at tanh(6) and reports the rest (1e-5); ``activation="1+tanh", init="identity"`` is an exact start.
    """
    return (Gate(Selector.parse(sites).v, GateSpec("hidden_kv", "linear", "head", activation, init=init), where=where),)
