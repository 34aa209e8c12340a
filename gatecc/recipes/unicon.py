"""UniCon: an image and its condition in one network, each with its adapters, and attention between them."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.joint import JointAttention
from gatecc.passes.branch.low_rank import Loras
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "unicon",
    citation="A Simple Approach to Unifying Diffusion-based Conditional Generation (UniCon, 2024)",
    cases=[
        Case(
            samples.conditioned,
            ("identity", "gradient", "reversible"),
            {"sites": "linear[*.0.*.q_proj]", "attention": "attention[0]", "rank": 2},
        )
    ],
)
def unicon(
    stream: str = "stream",
    partner: str = "partner",
    sites: str = "linear[*.q_proj,*.k_proj,*.v_proj,*.o_proj]",
    attention: str = "attention[...]",
    streams: int = 2,
    rank: int = 8,
    alpha: float = 16.0,
) -> tuple[Rewrite, ...]:
    """Images and conditions are samples of one batch; each stream has adapters, and partners attend to one another.

    ``stream`` is the input of the model that numbers the stream of a sample (0 for images, 1 for conditions), and
    ``partner`` the one that holds the row of its partner. A sample runs the adapters of its stream and no others.
    Beside each attention, y <- y + s * W attention(q of x, k and v of the partner's x). W and every B start at 0.

    s is ``joint_scale``, a learned number that starts at 1; at 0 the streams do not know of one another.
    """
    router = RouterSpec(f"cond({stream})", "index", "softmax_topk(1)", init="zero")
    adapters = Branch(Selector.parse(sites).out, Loras(streams, rank, alpha), label="stream", router=router)
    scale = GateSpec("param", "none", "scalar", "linear")
    joint = Branch(Selector.parse(attention).out, JointAttention(partner), scale, label="joint_scale")
    return adapters, joint
