"""Early exits with learned gates, trained in turn."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.exit.exit import Exit
from gatecc.passes.exit.head import ExitHead
from gatecc.passes.exit.rule import NEVER, Learned
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "jei-dnn",
    citation="Jointly-Learned Exit and Inference for a Dynamic Neural Network: JEI-DNN (ICLR 2024)",
    cases=[
        Case(samples.classifier, ("identity", "export", "reversible"), {"sites": "block[0]"}),
        Case(samples.classifier, ("export", "reversible"), {"sites": "block[0]", "threshold": 0.5}),
    ],
)
def jei_dnn(
    sites: str = "block[:-1]",
    head: str = "pooled",
    power: float = 2.0,
    threshold: float = NEVER,
    output: str = "",
) -> tuple[Rewrite, ...]:
    """A sample leaves the model at the first block whose exit is sure of it; the blocks behind do not run for it.

    At each exit a linear ``head`` yields logits z, and a gate reads four statistics u of them, without gradient: the
    largest probability, entropy, margin, and entropy of p^``power``. The sample leaves if σ(w·u + b) >= ``threshold``,
    which above 1 is never: so it starts, as the original, bitwise.

    `gatecc.train.fit_exits` trains heads and gates in turn, the model frozen: the gates at and behind
    argmin_l CE_l + λ c_l of a sample are to be open (binary cross entropy, positives weighted by negatives per
    positive, at most 5), and each head counts a sample by the probability that it leaves there. c_l are measured FLOPs.
    Then the threshold is 1/2; `gatecc.train.calibrate` moves it, for each exit.

    What follows an exit runs for the samples that are left, and not at all if none is; who leaves depends on the sample
    alone. Exports at batch 1 hold an If for each exit, which above runs if one sample goes on.
    """
    return (Exit(Selector.parse(sites).out, ExitHead.coerce(head), Learned(threshold, power), output),)
