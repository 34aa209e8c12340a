"""PILL: an adapter per modality beside each MLP, and a gate on the values of image tokens."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.branch.bottleneck import Bottlenecks
from gatecc.passes.branch.branch import Branch
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe
from gatecc.recipes.value_gate import value_gate


@recipe(
    "pill",
    citation="PILL: Plug Into LLM with Adapter Expert and Attention Gate (2023)",
    cases=[
        Case(samples.images, ("cost", "gradient", "reversible"), {"width": 4}),
        Case(samples.images, ("identity",), {"width": 4, "activation": "1+tanh", "init": "identity"}),
    ],
)
def pill(
    where: str = "image",
    sites: str = "mlp[...]",
    attention: str = "attention[...]",
    width: int = 64,
    modalities: int = 2,
    activation: Literal["tanh", "1+tanh"] = "tanh",
    init: str = "zero",
) -> tuple[Rewrite, ...]:
    """Adapters that are chosen by the modality of a token, and a tanh gate per head on the values of image tokens.

    Beside each MLP y <- y + U (silu(G x) * D x), one such adapter for each of ``modalities``; ``where`` is the input of
    the model that numbers the modality of a token (a mask of image tokens: 0 and 1). Each token runs its own adapter
    and no other. U starts at 0, so the adapters start as nothing. The gate is that of `value-gate`, which see for why
    its start at 0 is not the model without images; ``activation="1+tanh", init="identity"`` is an exact start.
    """
    router = RouterSpec(f"cond({where})", "index", "softmax_topk(1)", init="zero")
    body = Bottlenecks(modalities, width, gated=True, activation="silu", of="in")
    adapters = Branch(Selector.parse(sites).out, body, label="modality", router=router)
    return adapters, *value_gate(attention, where, activation, init)
