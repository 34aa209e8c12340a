"""Mixtures of low-rank adapters on Linears."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.choice import SoftmaxTopK
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.low_rank import Loras
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe

_ONE = {"sites": "linear[*.0.*.q_proj,*.0.*.up]"}


@recipe(
    "lora-mixture",
    citation="LoRA: Low-Rank Adaptation of Large Language Models (2021); Mixture of LoRA Experts (2024)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "gradient", "state", "export", "reversible"), _ONE),
        Case(samples.language, ("identity", "cost", "gradient", "state"), {**_ONE, "k": 2}),
    ],
)
def lora_mixture(
    sites: str = "linear[*]",
    experts: int = 4,
    rank: int = 8,
    alpha: float = 16.0,
    k: int = 0,
    gate: str = "in, linear, expert, softmax, init=zero",
    init: str = "random(0.02)",
) -> tuple[Rewrite, ...]:
    """Low-rank adapters on each Linear, weighed per token: y <- W x + sum over experts of g_e * alpha/rank * B_e A_e x.

    ``k=0`` runs all of them in two products, with the weights of ``gate``, a gate over experts; at first all weights
    are 1/experts. ``gate="param, none, expert, linear, init=identity"`` is their sum, with a learned number for each.
    With ``k`` above 0 a softmax router chooses k for each token, and the others do not run; ``init`` is its start.

    Every B starts at 0. `gatecc.adapters.load` fills the experts from checkpoints of peft.
    """
    body, chosen = Loras(experts, rank, alpha), Selector.parse(sites).out
    if not k:
        return (Branch(chosen, body, GateSpec.parse(gate), label="weights"),)
    return (Branch(chosen, body, router=RouterSpec("in", "linear(bias=False)", SoftmaxTopK(k), init), label="router"),)
