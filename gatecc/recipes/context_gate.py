"""Context gates: a second stream modulates the activations of the first."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.source import At, Pool, Source
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "context-gates",
    citation="Two-point cells, multisensory cooperative computing (a reading of its abstract)",
    cases=[
        Case(
            samples.language,
            ("identity", "causality", "cost", "gradient", "state", "reversible"),
            {"context": "activation[0].out", "sites": "activation[1]"},
        )
    ],
)
def context_gates(
    context: str, sites: str = "activation[...]", pool: bool = False, init: str = "identity"
) -> tuple[Rewrite, ...]:
    """Multiply the activations of one stream by 1 + tanh(W c), where c is a value of another stream.

    ``context`` selects that value, for example ``activation[audio.*].out`` or ``block[encoder.layers.5].out``: one for
    all gated sites, or as many as there are, the k-th for the k-th. It must be computed before the sites that it gates.
    ``pool`` takes its mean over tokens, which is needed where the streams have different lengths.

    Without context (c = 0) and at init (W = 0) the gate is exactly 1.
    """
    source: Source = At(str(Selector.parse(context)))
    spec = GateSpec(Pool(source) if pool else source, "linear", "channel", "1+tanh", init=init)
    return (Gate(Selector.parse(sites).out, spec),)
