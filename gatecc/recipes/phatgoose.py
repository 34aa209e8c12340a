"""PHATGOOSE: adapters that were trained apart, chosen per token by the gate vectors that each brings along."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.choice import SoftmaxTopK
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.low_rank import Lora, Loras
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe

_ONE = {"sites": "linear[*.0.*.q_proj]", "rank": 2}
VECTOR = "vector"  # the module that holds the gate vectors of a Linear


@recipe(
    "phatgoose",
    citation="Learning to Route Among Specialized Experts for Zero-Shot Generalization (PHATGOOSE, 2024)",
    cases=[
        Case(samples.language, ("identity", "cost", "gradient", "state"), {**_ONE, "experts": 3}),
        Case(samples.language, ("identity", "gradient", "reversible"), {**_ONE, "phase": "gate"}),
    ],
)
def phatgoose(
    sites: str = "linear[*.q_proj,*.k_proj,*.v_proj,*.o_proj]",
    experts: int = 4,
    rank: int = 8,
    alpha: float = 16.0,
    k: int = 2,
    phase: Literal["route", "gate"] = "route",
) -> tuple[Rewrite, ...]:
    """Adapters that were trained apart: at each Linear a token takes the k whose gate vectors are nearest to its input.

    First each adapter is trained for itself, and then, frozen, a vector v per Linear: y <- W x + σ(v x) * adapter(x).
    That is ``phase="gate"``; v starts at 0. Then the adapters are put side by side, each with its vectors. An expert's
    score is LN(x) · LN(v) / sqrt(d), without an affine map; the softmax over the k best weighs them. Nothing is
    trained any more, and a further expert changes none of the others'.

    `gatecc.adapters.load([model, ...], recipe="phatgoose")` puts models of the first phase side by side.
    """
    chosen = Selector.parse(sites).out
    if phase == "gate":
        gate = GateSpec("in", "linear(bias=False)", "token", "sigmoid", init="zero")
        return (Branch(chosen, Lora(rank, alpha), gate, label=VECTOR),)
    router = RouterSpec("in", "cosine", SoftmaxTopK(k), "random(1.0)")
    return (Branch(chosen, Loras(experts, rank, alpha), label=VECTOR, router=router),)
