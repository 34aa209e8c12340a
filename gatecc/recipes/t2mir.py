"""T2MIR: half of the features from experts for tokens, half from experts for tasks."""

from __future__ import annotations

from gatecc.ir.gates.balance import Variation
from gatecc.ir.gates.choices.noisy import NoisyTopK
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.route import Route
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "t2mir",
    citation="Mixture-of-Experts Meets In-Context Reinforcement Learning (T2MIR, 2025)",
    cases=[Case(samples.sequences, ("identity", "cost", "gradient", "reversible"))],
)
def t2mir(
    experts: int = 8, k: int = 2, balance: float = 0.01, task: str = "pool(in)", sites: str = "mlp[...]"
) -> tuple[Rewrite, ...]:
    """Every MLP becomes two mixtures; each yields half of the features, from ``experts`` of which ``k`` run.

    The first router reads the token, and a CV² loss of weight ``balance`` spreads tokens over its experts. The second
    reads ``task``, the mean over the sequence, so that all tokens of a sequence take the same experts;
    ``gatecc.train.TaskContrast`` is its loss (InfoNCE against a momentum copy of the router). Both draw noise in
    training and start at zero. Experts are copies of the MLP with half of its last rows, so that the model starts as it
    was. A router that reads the mean over a sequence is not causal.
    """
    token = RouterSpec("in", "linear(bias=False)", NoisyTopK(k), "zero", balance=Variation(balance))
    other = RouterSpec(task, "linear(bias=False)", NoisyTopK(k), "zero")
    return (Route(Selector.parse(sites), token, Copies(experts), combine="cat", also=other),)
