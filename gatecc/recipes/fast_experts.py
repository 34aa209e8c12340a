"""Fast experts: the experts that a model has, computed by one operator."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.fuse_experts import FuseExperts
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "fast-experts",
    citation="MegaBlocks: Efficient Sparse Training with Mixture-of-Experts (2022)",
    cases=[Case(samples.mixture, ("identity", "causality", "gradient", "state", "reversible"))],
)
def fast_experts(sites: str = "mlp[...]") -> tuple[Rewrite, ...]:
    """The experts of Mixtral, Qwen-MoE, DeepSeek, gpt-oss and their like run as one operator, `gatecc::moe_ffn`.

    The function, the weights and their names stay. Tokens are sorted by expert once, every expert multiplies the rows
    that chose it, and what nobody chose costs nothing: in the place of every `experts_implementation` of transformers.
    """
    return (FuseExperts(Selector.parse(sites)),)
