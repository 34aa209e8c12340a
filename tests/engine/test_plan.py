"""Planning: sites that lack what a rewrite reads."""

from __future__ import annotations

import pytest

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.ir.gate import GateSpec
from gatecc.ir.site import Attention
from gatecc.passes.gate import Gate
from tests.zoo.models import variants
from tests.zoo.spec import Case


@pytest.fixture(name="case")
def make_case() -> Case:
    """Two attentions per owner: the queries of the second come from no projection, so it has no ``hidden``."""
    return dict(variants())["hand/two_in_one"].build()


def test_sites_without_a_value_are_left_out_with_a_reason(case: Case) -> None:
    gated = gatecc.transform(case.model, "gated-attention", (case.args, case.kwargs))
    report = gatecc.last_report(gated)
    done = {row.site for row in report.rewrites}
    left_out = [r for r in report.refusals if r.code == SiteRefusedError.code]
    assert done == {"blocks.0.attention#0", "blocks.1.attention#0"}
    assert [r.owner for r in left_out] == ["blocks.0.attention", "blocks.1.attention"]
    assert all("hidden" in r.reason and r.line and r.remedy for r in left_out)


def test_a_named_site_without_a_value_is_an_error(case: Case) -> None:
    rewrite = Gate(Attention["blocks.0.attention#1"], GateSpec("hidden"))
    with pytest.raises(SiteRefusedError, match="hidden"):
        gatecc.transform(case.model, [rewrite], (case.args, case.kwargs))
