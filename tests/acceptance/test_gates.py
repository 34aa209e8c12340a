"""Identity gates on the architectures of the zoo: sites, equality, gradients, sizes, masks, modes.

By default a selection with every family and spelling runs (one variant in two); GATECC_ZOO=all runs all of them.
"""

from __future__ import annotations

import os

import pytest

import gatecc
from gatecc.errors import EmptySelectionError
from tests.acceptance import gates
from tests.zoo.models import FAST, variants
from tests.zoo.spec import Spec

ALL = list(variants())
CHOSEN = [
    (name, spec) for i, (name, spec) in enumerate(ALL) if i % 2 == 0 or name in FAST or os.getenv("GATECC_ZOO") == "all"
]


def test_enough_architectures() -> None:
    """The issue asks for 40 architectures with attention, in every implementation that they have."""
    assert len({(s.family, s.name) for _, s in CHOSEN if s.cores}) >= 60


@pytest.mark.parametrize(("name", "spec"), CHOSEN, ids=[name for name, _ in CHOSEN])
def test_identity_gates(name: str, spec: Spec) -> None:
    case = spec.build()
    truth = gates.truth_of(case)
    try:
        gated = gatecc.transform(case.model, "gated-attention", (case.args, case.kwargs))
    except EmptySelectionError:
        gates.check_sites(gates.inspected(case), truth)  # nothing to gate: then every core is refused with a reason
        return
    gates.check_sites(gatecc.last_report(gated), truth)
    gates.check_identity(case, gated)
    gates.check_gradients(case, gated, gates.new_parameters(case.model, gated))
    gates.check_modes(case, gated)
