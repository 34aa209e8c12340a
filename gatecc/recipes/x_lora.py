"""X-LoRA: adapters that are weighed by a first pass of the model without them."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.low_rank import Loras
from gatecc.passes.branch.two_pass import TwoPass
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe

_ONE = {"sites": "linear[*.q_proj,*.up]", "experts": 3, "rank": 2}


@recipe(
    "x-lora",
    citation="X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models (2024)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "gradient", "state", "reversible"), _ONE),
        Case(samples.language, ("identity", "gradient"), {**_ONE, "k": 2, "depth": 2, "size": 8, "per_layer": False}),
    ],
)
def x_lora(
    sites: str = "linear[*.q_proj,*.k_proj,*.v_proj,*.o_proj]",
    hidden: str = "head[...].in",
    experts: int = 4,
    rank: int = 8,
    alpha: float = 16.0,
    k: int = 0,
    T: float = 1.0,  # as papers call it
    depth: int = 1,
    size: int = 2048,
    per_layer: bool = True,
) -> tuple[Rewrite, ...]:
    """Low-rank adapters, weighed per token and layer by a classifier that reads what the model computes without them.

    The model runs twice. In the first pass no adapter is on; from its last hidden state (``hidden``) a classifier of
    ``depth`` linear layers scores the experts of each bank, or with ``per_layer=False`` of all banks alike. A softmax
    over the experts of a token, never over tokens, weighs them in the second pass; ``k`` keeps the k largest. The
    hidden state of a causal model is causal, so the rewritten model is.

    Every call costs two forwards. Only the classifier is trained in the paper: load trained adapters with
    `gatecc.adapters.load(model, adapters, inputs, recipe="x-lora")` and train ``*.classifier.*``.
    """
    body, at = Loras(experts, rank, alpha), Selector.parse(sites).out
    return (TwoPass(Selector.parse(hidden), body, at, depth, size, T, k, per_layer),)
