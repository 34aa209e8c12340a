"""A query for each region reads the tokens, in the place of a dense head."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.readout import Readout
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe


@recipe(
    "brain-readout",
    citation="Transformer brain encoders explain human high-level visual responses (a reading of its abstract)",
    cases=[Case(streams.classifier, ("cost", "gradient", "export", "reversible"), {"regions": 3})],
)
def brain_readout(
    regions: int, features: str = "block[-1].out", sites: str = "head[...]", train_features: bool = False
) -> tuple[Rewrite, ...]:
    """y_r = W_r sum_n softmax_n(q_r · x_n / sqrt(C)) x_n + b_r: a learned query for each of ``regions`` regions.

    ``features`` is what the queries attend over, tokens or a feature map; the outputs of the head (voxels) are split
    among the regions in their order. The queries start at 0, where every region reads the mean of the tokens. The old
    head is computed no more, and `gatecc.revert` finds it. The features are frozen, so only queries and W train, unless
    ``train_features``.

    Against a dense map from all tokens to K outputs, N C K weights, it has (K + R) C. Every region attends over all
    tokens: nothing is gated off, and no form skips.
    """
    body = Readout(f'at("{features}")', regions, train_features)
    return (Branch(Selector.parse(sites).out, body, label="readout", op="lerp"),)
