"""Fine-grained experts: the hidden neurons of a feed-forward layer in parts."""

from __future__ import annotations

from gatecc.ir.gates.choices.unweighted import Unweighted
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.route import Route
from gatecc.passes.route.split import Partition, Split
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "split-experts",
    citation="MoEfication: Transformer Feed-forward Layers are Mixtures of Experts (2021)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "gradient", "reversible")),
        Case(samples.language, ("cost", "gradient", "state", "reversible"), {"experts": 4, "k": 2, "by": "random"}),
    ],
)
def split_experts(
    experts: int = 8, k: int = 0, by: str | Partition = "kmeans", sites: str = "mlp[...]", init: str = "similar"
) -> tuple[Rewrite, ...]:
    """The hidden neurons of every feed-forward layer fall into ``experts`` parts of one size, ``k`` of which run.

    With ``k=0`` all run, and the model is as it was. Fewer change it: tokens go to the parts whose neurons look for
    what they are (``init="similar"``), and training makes up for what is lost. ``by``: which neurons share a part:
    ``contiguous``, ``random``, ``kmeans`` of their weight rows, or ``measured(...)``, which
    ``gatecc.train.coactivation`` makes from calibration inputs: neurons that fire together.
    """
    router = RouterSpec("in", "linear(bias=False)", Unweighted(k or experts), init)
    return (Route(Selector.parse(sites), router, Split(experts, Partition.coerce(by))),)
