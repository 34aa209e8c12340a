"""Causal mixing that a graph spells out: where, between which values, and by which formula."""

from gatecc.passes.causal.formula import Formula, find_formula
from gatecc.passes.causal.parts import Part, Probe

__all__ = ["Formula", "Part", "Probe", "find_formula"]
