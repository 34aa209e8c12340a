"""Gating and recurrence as parts of a transformer that are switched on and off."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.loop import Loop
from gatecc.passes.loop.carry import Output
from gatecc.passes.loop.merge import Last
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe
from gatecc.recipes.residual_gates import residual_gates


@recipe(
    "deconstructing",
    citation="Deconstructing Recurrence, Attention, and Gating: Investigating the transferability of Transformers and "
    "Gated Recurrent Neural Networks in forecasting of dynamical systems (2024; recalled, not re-read)",
    cases=[
        Case(samples.sequences, ("identity", "cost", "reversible"), {"join": "additive"}),
        Case(samples.sequences, ("gradient", "cost", "reversible"), {"join": "coupled", "recurrence": 3}),
        Case(samples.language, ("causality", "gradient", "state", "reversible"), {"recurrence": 2}),
    ],
)
def deconstructing(
    blocks: str = "block[...]",
    residuals: str = "residual[...]",
    join: Literal["additive", "scalar", "input", "coupled"] = "input",
    recurrence: int = 1,
) -> tuple[Rewrite, ...]:
    """Gated joins in the residuals of a transformer, and blocks that are recurrent: the switches of an ablation.

    ``join`` is that of `residual-gates`, on the skip: ``additive`` is y = x + f(x) as it is, ``scalar`` a learned
    number times x, ``input`` 2*sigmoid(W x + b) times x, ``coupled`` g*x + (1 - g)*f(x). All start as the original.

    ``recurrence``: how often each block is applied to its own output, h <- block(h), with the same weights and gates,
    which with a gated join is a recurrent highway network in depth. 1 is the block once: ``join="additive"`` with it is
    the original. More steps change the function, and cost what they compute: nothing is left out.
    """
    gates = residual_gates(residuals, join)
    again = (Loop(Selector.parse(blocks), recurrence, Output(), Last()),) if recurrence != 1 else ()
    return (*gates, *again)
