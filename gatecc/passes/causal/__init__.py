"""Causal mixing that a graph spells out: where, between which values, and by which formula."""

from gatecc.passes.causal.formula import find_formula
from gatecc.passes.causal.parts import Part, Probe
from gatecc.passes.causal.roles import Formula

__all__ = ["Formula", "Part", "Probe", "find_formula"]
