"""Channel windows that move with the timestep of a diffusion model."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.scorer import Schedule
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.bypass import Bypass
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "timestep-windows",
    citation="Denoising Task Routing for Diffusion Models (ICLR 2024)",
    cases=[Case(samples.diffusion, ("gradient", "reversible"))],
)
def timestep_windows(
    sites: str = "block[...]",
    timestep: str = "timestep",
    beta: float = 0.8,
    alpha: float = 4.0,
    steps: int = 1000,
) -> tuple[Rewrite, ...]:
    """Each block sees a window of the channels that depends on the timestep; the other channels go around it.

    r = x * m, y = block(r) + x * (1 - m), where m is 1 on beta*C channels from round((t / steps)^alpha * (C - beta*C))
    on: near timesteps share most of their channels, far ones few. No parameters. ``timestep`` names the model's input,
    a number per sample. With ``beta=1`` all channels are in the window and the model is the original, bitwise.
    """
    window = GateSpec(f"cond({timestep})", Schedule(beta, alpha, steps), "channel", "linear")
    return (Bypass(Selector.parse(sites), window),)
