"""Persistent and transient: a parent that always runs, and a child that runs while a switch is on."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.transient import Transient
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "persistent-transient",
    citation="Persistent-Transient Duality: A Multi-mechanism Approach for Modeling Human-Object Interaction (ICCV "
    "2023; a reading of its abstract)",
    cases=[
        Case(samples.series, ("identity", "causality", "gradient", "reversible"), {"hidden": 8}),
        Case(
            samples.language,
            ("identity", "causality", "gradient", "state", "reversible"),
            {"sites": "mlp[...].out", "hidden": 8},
        ),
    ],
)
def persistent_transient(
    sites: str = "rnn[...].out", hidden: int = 64, reads: str = "in", open: float = 0.0
) -> tuple[Rewrite, ...]:
    """A transient child beside each persistent parent: y_t = parent_t + s_t U child_t, s_t = 1[σ(w x_t + b) > 1/2].

    The parent is the model's own recurrent layer (or any layer over tokens, ``sites="mlp[...].out"``). The child is a
    GRU of ``hidden`` units whose state is 0 each time that its switch comes on; while it is off the child does not run,
    so that a switch that is always off leaves the parent, exactly. U starts at 0: the original. The switch learns by
    its probability where it is on. ``open`` is b before training.

    The child has no form in ONNX, where a step cannot be left out.
    """
    return (Branch(Selector.parse(sites), Transient(hidden, reads, open), label="transient"),)
