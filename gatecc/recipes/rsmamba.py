"""RSMamba: one mixer over the tokens in three orders."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.scan import Scan
from gatecc.passes.fuse import Fuse
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe


@recipe(
    "rsmamba",
    citation="RSMamba: Remote Sensing Image Classification with State Space Model (2024)",
    cases=[
        Case(streams.ordered, ("cost", "gradient", "export", "reversible")),
        Case(streams.ordered, ("identity", "gradient"), {"lead": 40.0}),
    ],
)
def rsmamba(sites: str = "residual[...]", seed: int = 0, lead: float = 0.0) -> tuple[Rewrite, ...]:
    """y = sum_i w_i y_i, y_i the same mixer on the tokens as they are, flipped, and shuffled; each order is undone.

    w = softmax(W [mean y_0; mean y_1; mean y_2]), one set of weights for each sample, from means over the tokens; W has
    no bias and starts at 0, which is the plain mean. With ``lead`` there is a bias, which starts at ``lead`` for the
    tokens as they are: 40 is the original to rounding, 6 to about 0.5 %. ``sites`` are the mixers: branches of
    residuals, attentions, blocks. The shuffle is an order that looks random and is the same for as many tokens;
    ``seed`` makes another.

    Training and inference cost three times the mixer. The weights are read from the outputs of all three scans, so none
    can be left out before it has run: no form skips. Fix ``w`` (`gatecc.revert`) where one order takes all the weight.
    """
    head, init = ("linear", f"first(bias={lead})") if lead else ("linear(bias=False)", "zero")
    means = "+".join(f"pool(fused({i}))" for i in range(3))
    gate = GateSpec.parse(f"{means}, {head}, expert, softmax, init={init}")
    orders = (str(Scan("flip")), str(Scan("shuffle", seed)))
    return (Fuse(Selector.parse(sites), gate, ("self", *orders), label="scan_gate"),)
