"""ArmoRM: a mixture of objectives that the prompt weighs."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.activation import Softmax
from gatecc.ir.gates.scorer import MLP
from gatecc.ir.gates.source import Stage, Token
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.penalty import Penalty
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "armorm",
    citation="Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts (ArmoRM, 2024)",
    cases=[
        Case(samples.prompted, ("identity", "cost", "gradient", "reversible"), {"hidden": 8}),
        Case(samples.prompted, ("gradient",), {"hidden": 8, "penalty_of": 1, "init": "zero", "scale": 2.0}),
    ],
)
def armorm(
    prompt: str = "prompt",
    sites: str = "head[...]",
    hidden: int = 1024,
    layers: int = 3,
    T: float = 10.0,
    scale: float = 1.0,
    penalty_of: int = -1,
    init: str = "identity",
) -> tuple[Rewrite, ...]:
    """The objectives r of a reward head, weighed by the prompt: r <- g * r, g = scale * softmax(MLP(h) / T).

    h is what the head reads at the last token of the prompt, whose number in each sample is the model's input
    ``prompt``, so the weights do not depend on the response. The score is the sum of what the head then yields,
    ``model(...).sum(-1)``. ``penalty_of``: the objective (verbosity) that is subtracted from all others first, each
    time a penalty of its own, which starts at 0: set the buffer ``penalty`` to what makes them uncorrelated.

    With ``init="identity"`` all weights start at 1, so the score starts as the sum of the objectives; with
    ``init="zero"`` at scale/K, as in the paper, where they always sum to ``scale``.
    """
    chosen = Selector.parse(sites).out
    score = MLP(hidden, layers=layers)
    gate = GateSpec(Token(Stage("in"), prompt), score, "channel", Softmax(T=T, scale=scale), init=init)
    weigh = Gate(chosen, gate, label="objectives")
    return (weigh,) if penalty_of < 0 else (Branch(chosen, Penalty(penalty_of), label="penalty"), weigh)
