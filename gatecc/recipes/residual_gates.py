"""Gated residual joins."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.fuse import Fuse
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "residual-gates",
    citation="Deconstructing Recurrence, Attention, and Gating: Investigating the transferability of Transformers and "
    "Gated Recurrent Neural Networks in forecasting of dynamical systems (2024; recalled, not re-read)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "gradient", "state", "reversible"))],
)
def residual_gates(
    sites: str = "residual[...]",
    join: Literal["additive", "scalar", "input", "coupled"] = "input",
    on: Literal["skip", "branch"] = "skip",
    granularity: Literal["element", "scalar"] = "element",
    estimator: str = "exact",
    init: Literal["identity", "half"] = "identity",
) -> tuple[Rewrite, ...]:
    """Gated residual joins in the place of y = x + f(x).

    ``join``: ``additive`` is the model's own join (the gate is the constant 1 and is not trained: the baseline of an
    ablation); ``scalar`` multiplies one side by a learned number; ``input`` by 2*sigmoid(W x + b); ``coupled`` is
    y = g * x + (1 - g) * f with g = sigmoid(W x + b).

    ``on`` says which side is gated (not for coupled); the skip is gated where it is added only, the branch still reads
    it whole. All start as the original: a coupled join at g = 1/2 is the average, so it is doubled;
    ``init="half"`` leaves the average undoubled, as in the paper, which changes the function.
    """
    chosen = Selector.parse(sites)
    if join == "coupled":
        gate = GateSpec("skip", "linear", granularity, "sigmoid", estimator, init="zero")
        return (Fuse(chosen.out, gate, scale=2.0 if init == "identity" else 1.0),)
    side = getattr(chosen, on)
    if join == "input":
        return (Gate(side, GateSpec("self", "linear", granularity, "sigmoid", estimator)),)
    learned = "exact" if join == "scalar" else "frozen"
    return (Gate(side, GateSpec("param", "none", "scalar", "linear", learned)),)
