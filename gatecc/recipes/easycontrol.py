"""EasyControl: conditions as further tokens, each with adapters of its own."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.scorer import Index
from gatecc.ir.gates.source import Cond
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.low_rank import Loras
from gatecc.passes.segment_mask import SegmentMask
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "easycontrol",
    citation="EasyControl: Adding Efficient and Flexible Control for Diffusion Transformer (2025)",
    cases=[Case(samples.conditioned, ("gradient", "reversible"), {"rank": 2, "sites": "linear[*.0.*.q_proj]"})],
)
def easycontrol(
    segment: str = "segment",
    conditions: int = 2,
    sites: str = "linear[*.q_proj,*.k_proj,*.v_proj]",
    attention: str = "attention[...]",
    rank: int = 8,
    alpha: float = 16.0,
) -> tuple[Rewrite, ...]:
    """Adapters that act on the tokens of one condition each, and a mask that keeps conditions to themselves.

    ``segment`` is the input of the model that numbers the segment of each token: 0 for the image, c for condition c, up
    to ``conditions``. The adapter of condition c is added at its tokens; image tokens go through the base alone. Image
    queries see every token, those of a condition its own tokens only: what they compute does not depend on the image
    or on other conditions. Without tokens of a condition the model is the base, exactly.

    The caller appends the condition's tokens. Their keys and values are the same in every denoising step: inside of
    `gatecc.condition_cache` they are computed in the first, and later steps are called with the tokens of the image
    alone.
    """
    gate = GateSpec(Cond(segment), Index(first=1), "expert", "linear", init="zero")
    adapters = Branch(Selector.parse(sites).out, Loras(conditions, rank, alpha), gate, label="segment")
    return adapters, SegmentMask(Selector.parse(attention).heads, segment)
