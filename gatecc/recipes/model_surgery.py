"""Model surgery: rows of MLP gates that lie against a direction are moved along it."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.reweight.reweight import Reweight
from gatecc.passes.reweight.shift import Shift
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe

_EVEN = tuple(float((-1) ** i) for i in range(16))


@recipe(
    "model-surgery",
    citation="Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing (2024)",
    cases=[
        Case(samples.language, ("causality", "reversible"), {"direction": _EVEN, "count": 9, "weight": "up"}),
        Case(samples.language, ("identity", "reversible"), {"direction": _EVEN, "alpha": 0.0, "weight": "up"}),
    ],
)
def model_surgery(
    direction: tuple[float, ...],
    alpha: float = 1.0,
    count: int = 16384,
    sites: str = "mlp[...]",
    weight: str = "gate",
) -> tuple[Rewrite, ...]:
    """The rows of MLP gates that point most against a direction are moved along it: w <- w + alpha v.

    ``direction`` is the v of a linear probe on hidden states (``gatecc.train.probe(hidden, labels)``), for example of
    toxic text against other text, as wide as what the MLPs read. Of all selected MLPs together, the ``count`` rows w
    with the least cos(w, v) are shifted; every other row stays as it is, bitwise. Nothing is trained. ``alpha=0``
    changes nothing. ``weight="up"`` is for MLPs without a gate.

    The rows of before are kept beside each matrix as buffers, so `revert` puts them back bitwise, after a cast or a
    move too; rows that were trained since lose alpha v and keep the rest.

    There is no skipping form: it is an edit of numbers, and the model runs what it ran before.
    """
    return (Reweight(Selector.parse(sites), Shift(tuple(direction), alpha, count, weight)),)  # pyright: ignore[reportArgumentType]
