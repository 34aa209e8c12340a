"""GUESS: the tokens of conditions are scaled by their weight at this step, before attention reads them."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.fuse import Fuse
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe

_MOTION = {"sites": "merge[0]", "time": 'at("linear[time].out")', "width": 8}


@recipe(
    "guess",
    citation="GUESS: Gradually Enriching Synthesis for Text-Driven Human Motion Generation (2024; its fusion is a "
    "reading of the abstract, the public code only concatenates)",
    cases=[Case(streams.motion, ("identity", "cost", "gradient", "export", "reversible"), _MOTION)],
)
def guess(
    sites: str = "merge[...]", conditions: str = "in0,in1", time: str = "cond(timestep)", width: int = 64
) -> tuple[Rewrite, ...]:
    """cat(w_0 c_0, w_1 c_1, x): conditions are weighed by the step and by what they say, then read by attention.

    w = 2 sigmoid(MLP([t; mean c_0; mean c_1])), one weight for each sample and condition, exactly 1 at the start.
    ``sites`` are the joins where ``conditions`` (a text, a coarser motion) stand before the tokens x, and ``time`` is
    what tells the step: ``cond(NAME)``, a number that the model is given, or better the model's own embedding of it,
    ``at("linear[time_mlp.2].out")``. ``width`` is that of the hidden layer.

    A norm right behind the join undoes a weight for all but the sign: such models (VisualBERT) gain nothing by it.
    A condition with weight 0 is still attended to, as tokens of value 0, so nothing can be left out: no form skips.
    """
    names = tuple(name.strip() for name in conditions.split(","))
    read = "+".join([time, *(f"pool({name})" for name in names)])
    gate = GateSpec.parse(f"{read}, mlp({width}), expert, sigmoid")
    return (Fuse(Selector.parse(sites).out, gate, names, label="condition_gate", mode="scale"),)
