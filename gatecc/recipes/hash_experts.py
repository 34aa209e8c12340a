"""Hash experts: a point goes to the expert that a hash grid of its place chooses."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gates.choice import SoftmaxTopK
from gatecc.ir.gates.hashing import HashGrid
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.route import Route
from gatecc.passes.route.widths import Widths
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "hash-experts",
    citation="Switch-NeRF++: Learning Heterogeneous Mixture of Scene Experts for Large-scale Neural Radiance Fields "
    "(2025)",
    cases=[Case(samples.points, ("identity", "cost", "gradient", "state", "reversible"))],
)
def hash_experts(
    experts: int = 8,
    levels: int = 4,
    size: int = 1024,
    features: int = 2,
    resolution: float = 4.0,
    weigh: Literal["straight", "gate"] = "straight",
    balance: str = "aux(weight=0.01)",
    sites: str = "mlp[...]",
    init: str = "random(0.02)",
    widths: tuple[float, ...] = (),
) -> tuple[Rewrite, ...]:
    """An MLP of points becomes ``experts`` copies; one runs for each point, by a multi-resolution hash of its place.

    The table of each of ``levels`` resolutions has ``size`` rows of ``features`` learned numbers. ``weigh="gate"``
    multiplies the expert by the gate's value, as in the paper; "straight" by 1, with that value's gradient, so that
    the model starts as it was. ``widths`` instead of ``experts``: one of each size, as shares of the layer's hidden
    neurons, so that a place may have a smaller or larger network. Members of other classes are a `gatecc.ensemble`.
    """
    grid = HashGrid(levels, size, features, resolution)
    router = RouterSpec("in", grid, SoftmaxTopK(1, renorm=False, straight=weigh == "straight"), init, balance)
    return (Route(Selector.parse(sites), router, Widths(tuple(widths)) if widths else Copies(experts)),)
