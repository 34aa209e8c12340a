"""Spiking convolutions with a number for each step, and networks that are converted to spikes."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.loop import Loop
from gatecc.passes.loop.carry import Spikes
from gatecc.passes.loop.merge import Mean
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "tsm-conv",
    citation="Spiking Diffusion Models (IEEE TAI 2024), temporal-wise spiking mechanism and threshold guidance",
    cases=[Case(samples.spiking, ("gradient", "export", "reversible"), {"threshold": 0.5})],
)
def tsm_conv(
    sites: str = "model[...].out",
    steps: int = 4,
    convolutions: str = "conv[...].out",
    threshold: float = 1.0,
    amplitude: float = 1.0,
    decay: float = 1.0,
    start: float = 0.5,
    neurons: str = "activation[...]",
    replaces: tuple[str, ...] = ("relu",),
) -> tuple[Rewrite, ...]:
    """A spiking network over ``steps`` steps, whose convolutions are scaled by a learned number for each step.

    y_t = p_t conv(x_t), p starts at 1: a convolution that all steps share. Activations become integrate-and-fire
    neurons, u <- u + x, s = 1[u >= ``threshold``], u <- u - threshold s (soft reset), that send ``amplitude`` s; their
    membranes start at ``start`` times the threshold, and the gradient of a spike is that of an arctangent. The result
    is the mean over the steps. What comes before the first neuron is computed once. ``convolutions=""`` leaves the
    numbers out.

    Threshold guidance: thresholds are buffers (``neuron_....threshold``), which inference may set otherwise than
    training did. ``gatecc.train.confidence.balance`` converts a trained ReLU network: threshold and amplitude of each
    neuron become the largest activation seen, and with more steps the output approaches that of the network, whose
    activations are rounded to multiples of threshold / steps and cut off at the threshold.

    Nothing is left out in inference: on a CPU each step costs what the network costs. It is a change of what is
    computed, and a start for `dynamic-confidence`, whose skipping form is in benchmarks/dynamic.py.
    """
    carry = Spikes(neurons, threshold, amplitude, start, decay, replaces=replaces)
    return (Loop(Selector.parse(sites), steps, carry, Mean(), convolutions),)
