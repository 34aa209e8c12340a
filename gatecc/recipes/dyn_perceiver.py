"""Early exits on a branch of latent codes."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.exit.exit import Exit
from gatecc.passes.exit.latent import Latent
from gatecc.passes.exit.rule import NEVER, Confidence
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "dyn-perceiver",
    citation="Dynamic Perceiver for Efficient Visual Recognition (ICCV 2023)",
    cases=[Case(samples.classifier, ("identity", "export", "reversible"), {"codes": 2, "width": 8, "heads": 2})],
)
def dyn_perceiver(
    sites: str = "block[:-1]",
    codes: int = 8,
    width: int = 64,
    heads: int = 4,
    threshold: float = NEVER,
    output: str = "",
) -> tuple[Rewrite, ...]:
    """Latent codes beside the model read its features and write to them; exits are on the codes alone.

    z <- z + A(z, x), z <- z + MLP(LN z), x <- x + A(x, z) behind each of ``sites``, A attention of ``heads`` heads with
    norms. An exit yields W LN(mean z), so the features need not be ones that a classifier could read early. A sample
    leaves where its largest probability reaches the exit's threshold; above 1, the start, it never does, and the last
    matrix of x <- x + A(x, z) starts at 0: so it starts, as the original, bitwise. Give sites at the ends of stages.

    `gatecc.train.fit_exits(..., distill=1.0)` trains the branch, with the model's own logits as the teacher of the
    exits; the model's weights stay. Thresholds are those at which q^k of all samples, up to a factor, leave at exit k:
    `gatecc.train.calibrate(..., by="quantile", share=gatecc.train.geometric_shares(q, exits))`; ``by="cost"`` tries
    many q.

    What follows an exit, the branch included, runs for the samples that are left, and not at all if none is.
    """
    head = Latent(codes, width, heads)
    return (Exit(Selector.parse(sites).out, head, Confidence(threshold), output),)
