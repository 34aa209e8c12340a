"""Ensembles: several whole models behind one call, and the rewrite that chooses between them for each sample."""

from gatecc.passes.ensemble.build import ensemble as ensemble
from gatecc.passes.ensemble.choose import Choose as Choose
from gatecc.passes.ensemble.ensemble import Ensemble as Ensemble
