"""G2GNet: products between groups of units, pruned and regrown while the model trains."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.reweight.groups import Groups
from gatecc.passes.reweight.reweight import Reweight
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "g2gnet",
    citation="G2GNet: sparse modular connectivity between groups of units",
    cases=[
        Case(
            samples.language,
            ("identity", "causality", "cost", "export", "state", "reversible"),
            {"sites": "linear[*.up,*.down]", "groups": 4, "density": 1.0},
        ),
        Case(
            samples.language,
            ("causality", "cost", "export", "state", "reversible"),
            {"sites": "linear[*.up,*.down]", "groups": 4, "density": 0.25},
        ),
    ],
)
def g2gnet(
    sites: str = "linear[*mlp*]",
    groups: int = 8,
    density: float = 0.25,
    every: int = 100,
    share: float = 0.1,
    start: str = "strongest",
) -> tuple[Rewrite, ...]:
    """Units in groups, and between the groups of consecutive linears a mask of constant density that is regrown.

    The inputs and outputs of each selected linear are cut into ``groups`` groups of neighbours; W is multiplied by one
    bit for each pair of groups, exactly ``round(density * groups^2)`` of which are 1, at every time. Masked weights get
    no gradient. After every ``every`` steps of the optimizer the weakest ``share`` of the kept pairs is pruned, by the
    mean of the absolute weights, and as many others grow: those whose groups are most correlated, in absolute value, by
    the mean activation of each group since the last change. A pair that grows goes on with the weights that it had.

    ``gatecc.train.routing.step(model)``, which `heal` and the callbacks of transformers and Lightning call, counts the
    steps. With ``density=1`` it is the model of before, bitwise.

    The definition is a reading of the abstract. Where no gradient is wanted, masked pairs are not computed: each run of
    kept blocks is a product on a slice of the input, so no rows are gathered (``gatecc::group_linear``; on a GPU the
    masked product runs). With a quarter of 8 x 8 groups of a 1024 x 1024 matrix kept, 512 tokens take 0.37 of the dense
    time on one thread of a busy machine; a single token takes longer than dense (1.4), for it pays for 16 calls.
    """
    edit = Groups(groups, density, every, share, start)  # pyright: ignore[reportArgumentType]
    return (Reweight(Selector.parse(sites), edit),)
