"""CGIB: nodes that give way to noise unless what they say is worth it."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.init import Identity
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.noise_gate import NoiseGate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "cgib",
    citation="Conditional Graph Information Bottleneck for Molecular Relational Learning (ICML 2023)",
    cases=[Case(samples.sequences, ("cost", "gradient", "export", "reversible"))],
)
def cgib(
    sites: str = "block[-1:].out", source: str = "self", scorer: str = "mlp(32)", beta: float = 1e-2, start: float = 6.0
) -> tuple[Rewrite, ...]:
    """Let each node pass, or replace it by noise: a bottleneck that keeps the nodes which the task needs.

    h <- lambda h + (1 - lambda) (mu + sigma eps): lambda = sigmoid(MLP(h) + logistic noise) per node (a token, a
    pixel), mu and sigma of the nodes of its sample. The loss gains ``beta`` times the information that is left,
    KL(h' | N(mu, sigma^2)) per node and channel; ``gatecc.aux_losses`` shows it. With
    ``source="self+at(...)"`` the gate reads a partner's context, too.

    The noise is normal, where the authors' code draws it uniformly, and the divergence is whole, where the code leaves
    a logarithm out: without it the loss is least at a gate of 1/2 or so rather than at 0. In eval nothing is drawn: h
    <- lambda h + (1 - lambda) mu. It starts at lambda = sigmoid(``start``), 0.9975: nearly the original.

    No skipping form exists: lambda is never exactly 0, and what follows reads every node.
    """
    stage = Selector.parse(sites)
    spec = GateSpec(source, scorer, "token", "sigmoid", "gumbel", Identity("bias", start))
    return (NoiseGate(stage, spec, beta),)
