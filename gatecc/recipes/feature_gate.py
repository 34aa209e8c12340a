"""The feature gate of TSMixer: a softmax over the channels after each MLP."""

from __future__ import annotations

from typing import Literal

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "feature-gate",
    citation="TSMixer: Lightweight MLP-Mixer Model for Multivariate Time Series Forecasting (2023)",
    cases=[Case(samples.language, ("identity", "causality", "cost", "gradient", "state", "reversible"))],
)
def feature_gate(sites: str = "mlp[...]", init: Literal["identity", "paper"] = "identity") -> tuple[Rewrite, ...]:
    """Weigh the channels of each MLP's output by their importance: h <- h * d * softmax(W h + b) over the d channels.

    At W = b = 0 every weight is exactly 1. The paper leaves the factor d out (``init="paper"``): its weights sum to 1,
    so that a pretrained model would shrink by d at once.
    """
    if init == "paper":
        return (Gate(Selector.parse(sites).out, GateSpec("self", "linear", "channel", "softmax", init="uniform")),)
    return (Gate(Selector.parse(sites).out, GateSpec("self", "linear", "channel", "softmax")),)
