"""Dynamic confidence: a spiking network stops at the first step that is sure of a sample."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.loop import Loop
from gatecc.passes.loop.carry import Spikes
from gatecc.passes.loop.merge import Confident
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "dynamic-confidence",
    citation="Unleashing the Potential of Spiking Neural Networks with Dynamic Confidence (ICCV 2023)",
    cases=[
        Case(samples.spiking, ("gradient", "export", "reversible"), {"threshold": 0.6}),
        Case(samples.spiking, ("gradient", "export", "reversible"), {"threshold": 1.1}),
    ],
)
def dynamic_confidence(
    sites: str = "model[...].out",
    steps: int = 8,
    threshold: float = 0.6,
    temperature: float = 1.0,
    spike_threshold: float = 1.0,
    amplitude: float = 1.0,
    neurons: str = "activation[...]",
    replaces: tuple[str, ...] = ("relu",),
) -> tuple[Rewrite, ...]:
    """Run a spiking network step by step and stop, for each sample, at the first step that is sure of it.

    Activations become integrate-and-fire neurons over ``steps`` steps (see `spiking`). The logits of the steps are
    added up; conf_t = max softmax(sum_t / ``temperature``), and a sample whose confidence is above ``threshold`` leaves
    the batch: its result is the mean of its logits so far, and later steps are computed for the others alone. With a
    threshold above 1 every sample takes all steps, which is `spiking` itself.

    ``gatecc.train.confidence`` has what picks the threshold: the traces of a calibration set, and the Pareto front of
    accuracy against the mean number of steps. The threshold is the buffer ``confidence.threshold``, which may be
    changed at any time. Under a compiler and in ONNX the masked form runs, which computes all steps.
    """
    carry = Spikes(neurons, spike_threshold, amplitude, replaces=replaces)
    return (Loop(Selector.parse(sites), steps, carry, Confident(threshold, temperature)),)
