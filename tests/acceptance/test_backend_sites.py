"""Sites are found alike in an exported model and in the graph that the compile backend gets.

A few models by default, more than thirty with GATECC_ZOO=all.
"""

from __future__ import annotations

import os

import pytest

from tests.acceptance.backend_sites import BAR, FEW, both_doors
from tests.zoo import SPECS


def test_enough_models() -> None:
    assert len(set(BAR)) >= 30
    assert {*BAR, *FEW} <= SPECS.keys()


@pytest.mark.parametrize("name", BAR if os.getenv("GATECC_ZOO") == "all" else FEW)
def test_sites_are_equal_through_both_doors(name: str) -> None:
    doors = both_doors(SPECS[name].build())
    assert doors.graphs == 1
    assert doors.exported
    assert doors.differences == []
    assert doors.equal
