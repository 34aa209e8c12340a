"""AFA: several frozen models of one architecture go on from one mixture of their features, pixel by pixel."""

from __future__ import annotations

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.fuse import Fuse
from gatecc.recipes import streams
from gatecc.recipes.registry import Case, recipe

_TWO = {"models": "models.0,models.1", "features": "residual[{}].out;conv[{}.out].out", "reads": "cond(timestep)"}


@recipe(
    "afa",
    citation="Adaptive Feature Aggregation for combining diffusion models (a reading of its abstract)",
    cases=[Case(streams.denoisers, ("cost", "gradient", "export", "reversible"), _TWO)],
)
def afa(models: str, features: str, reads: str = "", kernel: int = 3) -> tuple[Rewrite, ...]:
    """f <- sum_m w_m * f_m at each pixel, w = softmax_m(conv([f_1; ...; f_M; t])): all models go on from the sum.

    For a module that calls several models on the same input and returns the mean of their outputs. ``models`` names
    them, separated by commas ("a,b"); ``features`` selects what is fused, with {} for the model, several selectors
    separated by semicolons: ``block[{}.*].out;conv[{}.conv_out].out``. Each selects as many values in all models, the
    k-th of each are fused. Take the outputs of the models in, as the last: their mean is then that of equal things.

    The weights are a convolution with a window of ``kernel`` pixels over all features, and over what is named in
    ``reads``: ``cond(timestep)``, ``pool(cond(prompt))``. They start equal. Only they need training: freeze the models.
    A map that is one-hot everywhere is that model exactly. The models are run in step, so those that compute in place
    (x += f(x), ReLU(inplace=True)) between the features are refused.

    All models run, whatever the maps are, since the maps are read from the features of all; there is no form that
    skips. Where the best model is known for a whole sample, choose models instead: `gatecc.ensemble`.
    """
    names = [name.strip() for name in models.split(",") if name.strip()]
    if len(names) < 2 or "{}" not in features:
        raise ArgumentError(
            "several models are mixed, by features that name them",
            found=f"models={models!r}, features={features!r}",
            expected='models="a,b", features="block[{}.*].out"',
        )
    read = "+".join([*(f"fused({i})" for i in range(len(names))), *([reads] if reads else [])])
    gate = GateSpec.parse(f"{read}, conv({kernel}), expert, softmax, init=zero")
    made: list[Rewrite] = []
    for text in features.split(";"):
        first, *others = (str(Selector.parse(text.strip().replace("{}", name))) for name in names)
        values = ("self", *(f"at({other!r})" for other in others))
        made.append(Fuse(Selector.parse(first), gate, values, label="map", everywhere=True))
    return tuple(made)
