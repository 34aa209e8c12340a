"""StepNet: the size of a residual step, from summaries of the state and of the update."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "stepnet",
    citation="StepNet (a reading of its abstract)",
    cases=[Case(samples.sequences, ("identity", "cost", "gradient", "reversible"))],
)
def stepnet(sites: str = "residual[...]", scorer: str = "mlp(32)", init: str = "identity") -> tuple[Rewrite, ...]:
    """Gate each residual branch a channel by a function of the pooled skip and the pooled branch.

    x <- x + 2*sigmoid(W phi([mean(x), mean(f(x))])) * f(x), the means over tokens or space, W = 0 at init. phi can
    measure how far successive summaries differ, and shorten the step where they do. Made for vision: a mean over tokens
    lets a token see later ones, so a causal language model is causal no more.
    """
    spec = GateSpec("pool(skip)+pool(branch)", scorer, "channel", "sigmoid", init=init)
    return (Gate(Selector.parse(sites).branch, spec),)
