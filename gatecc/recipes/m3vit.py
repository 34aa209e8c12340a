"""M³ViT: one mixture of experts for several tasks, with a router per task."""

from __future__ import annotations

from typing import Literal

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
    "m3vit",
    citation="M³ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator "
    "Co-design (2022)",
    cases=[
        Case(samples.conditioned, ("identity", "cost", "gradient", "reversible"), {"experts": 4, "k": 2, "tasks": 3}),
        Case(
            samples.conditioned, ("identity", "reversible"), {"per": "embedding", "task": "text", "experts": 4, "k": 2}
        ),
    ],
)
def m3vit(
    experts: int = 16,
    k: int = 4,
    tasks: int = 2,
    task: str = "task",
    per: Literal["router", "embedding"] = "router",
    weight: float = 0.01,
    sites: str = "mlp[1::2]",
    init: str = "random(0.02)",
) -> tuple[Rewrite, ...]:
    """The feed-forward layer of every second block becomes ``experts`` copies, and the task decides who runs.

    ``per="router"``: each of ``tasks`` has a router of its own, chosen by the input ``task`` (B,), an integer.
    ``per="embedding"``: one router reads the input ``task`` (B, C), an embedding of the task, beside the token. Noise
    of a learned size explores the experts in training; CV² of importance and load, times ``weight``, balances them.
    `gatecc.specialise` makes the model of one task alone: that task's router, and the experts that its data use.
    """
    scorer = f"linear_by({tasks})" if per == "router" else "linear(bias=False)"
    router = RouterSpec(("in", f"cond({task})"), scorer, NoisyTopK(k), init, Variation(weight))
    return (Route(Selector.parse(sites), router, Copies(experts)),)
