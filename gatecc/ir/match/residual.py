"""Residual sites: ``skip + branch``, where the branch is computed from the skip by something with weights.

Pre-norm and post-norm blocks, branches scaled by layer scale or dropped by stochastic depth, adds in place, the long
skips of a U-Net, and the projection shortcut of a ResNet stage, whose skip is one convolution of the common input.
"""

from __future__ import annotations

from collections.abc import Iterator

from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.registry import matcher
from gatecc.ir.site import Residual


@matcher
def match_residual(facts: JoinedFacts) -> Iterator[Residual]:
    """One site a join, in execution order. Other adds are the business of match_merge."""
    for add, (skip, branch) in facts.residuals.items():
        values = {"skip": facts.value(skip, add), "branch": facts.value(branch, add), "out": facts.value(add)}
        yield Residual(**facts.place("residual", add), values=values, add=add)
