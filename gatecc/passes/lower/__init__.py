"""Lowerings: what a graph spells out becomes the operator that computes it fastest. One per file."""

from gatecc.ir.discover import discover
from gatecc.passes.lower.lowering import LOWERINGS, Lowering, Outcome, Settings

__all__ = ["LOWERINGS", "Lowering", "Outcome", "Settings"]

discover(__name__, __path__)
