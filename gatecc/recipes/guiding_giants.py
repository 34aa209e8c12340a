"""Guiding giants: a light controller that steers a frozen model along a direction, layer by layer."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.steer import Steer
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe

_EVEN = tuple(float((-1) ** i) for i in range(16))


@recipe(
    "guiding-giants",
    citation="Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs (2025)",
    cases=[
        Case(
            samples.language,
            ("identity", "causality", "cost", "export", "gradient", "state", "reversible"),
            {"direction": _EVEN, "size": 8, "tokens": "each"},
        ),
        Case(samples.language, ("identity", "cost", "gradient", "reversible"), {"direction": _EVEN, "size": 8}),
        Case(samples.language, ("identity", "reversible"), {"direction": _EVEN, "alpha": 0.0}),
    ],
)
def guiding_giants(
    direction: tuple[float, ...],
    alpha: float = 4.0,
    layers: int = 4,
    size: int = 1024,
    tokens: str = "last",
    at: str = "block[...]",
    end: str = "head[...].in",
) -> tuple[Rewrite, ...]:
    """A controller reads the last layers at the last token, and adds a direction at every layer: how much, it decides.

    h_l[last] <- h_l[last] + s sigmoid(z_l) alpha r, where (s, z) is the output of a ReLU network with ``size`` hidden
    units on c, the states of the last ``layers`` layers at that token. ``direction`` is r, for example of refusal
    (``gatecc.train.mean_difference(hidden, labels)``). What is added has rank one. s starts at 0, so the model is as it
    was; with ``alpha=0`` it stays that, bitwise.

    c comes from late layers, and early ones are steered by it. The rule here is a second pass: the model runs once
    without steering, which gives c, and once with it. (The other rule, the factors of the step before, would let the
    first token of an answer go unsteered.) So every call costs two forwards, no cache of keys and values can be passed,
    and there is no skipping form: the first pass is what decides.

    ``tokens="last"`` is the paper's: the prompt is steered at its last token, which must be the last column (padding on
    the left). It is no function of single tokens, so `gatecc.decoder` refuses it (GCC015). ``tokens="each"`` steers
    every token by its own c: causal, equal for a prompt of one token, and the decoder keeps the state of both passes.

    Only the controller is trained, by BCE(s, label) + 0.1 (mean |sigmoid(z) - 1/2| + 0.01 mean sigmoid(z)) on cached
    activations: `gatecc.train.fit_controller`. The layer weights z have no gradient of the labels.
    """
    where = Selector.parse(at)
    return (Steer(Selector.parse(end), where.out, tuple(direction), alpha, layers, size, tokens),)
