"""DVLA-RL: a policy decides, layer by layer, between attention to the image and attention to a text."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.cross_attention import CrossAttention
from gatecc.passes.fuse import Fuse
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe


@recipe(
    "dvla-rl",
    citation="DVLA-RL: dual-level vision-language alignment with reinforcement learning for few-shot learning (a "
    "reading of its abstract)",
    cases=[
        Case(streams.motion, ("identity", "cost", "reversible"), {"width": 8}),
        Case(streams.motion, ("identity", "gradient"), {"width": 8, "estimator": "exact", "bias": 40.0}),
    ],
)
def dvla_rl(
    text: str = "cond(text)",
    sites: str = "attention[...]",
    heads: int = 4,
    width: int = 64,
    mask: str = "",
    bias: float = 6.0,
    estimator: str = "reinforce",
) -> tuple[Rewrite, ...]:
    """a * SelfAttn(h) + (1 - a) * CrossAttn(h, text): a policy of each layer says whether it looks at the text.

    The state of the policy is what the layer reads and the text, both as means over their tokens, through one hidden
    layer of ``width``: p = sigmoid(MLP([mean h; mean text])), one number for each sample. In training a is 1 or 0, a
    draw with probability p, and the policy learns by REINFORCE from the loss of each sample (``estimator="reinforce"``,
    which see in docs/gates.md); in eval a = 1 where p > 1/2. ``estimator="exact"`` is a = p, learned by gradient.
    ``text`` is an input of the model, ``cond(text)``, or a value of it, ``at("block[text.*].out")``; ``mask`` names an
    input (B, M), 0 at the padding of the text. ``bias`` is the score at which every policy starts: at 6 self-attention
    is nearly sure, and in eval the start is the original.

    Both attentions run for all samples: samples of one batch decide differently. There is no form that skips.
    """
    gate = GateSpec.parse(
        f"pool(hidden)+pool({text}), mlp({width}), sample, sigmoid, estimator={estimator}, "
        f"init=identity(how=bias, bias={bias})"
    )
    attended = CrossAttention(text, heads, query="hidden", mask=mask)
    return (Fuse(Selector.parse(sites).out, gate, ("self", str(attended)), label="policy"),)
