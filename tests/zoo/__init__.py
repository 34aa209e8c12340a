"""Tiny models with known attention, and the truth about them: what runs, seen while it runs."""

from tests.zoo.models import FAST, SPECS, find, sample, variants
from tests.zoo.spec import Case, Inputs, Spec
from tests.zoo.truth import Core, Softmax, Truth, observe

__all__ = [
    "FAST",
    "SPECS",
    "Case",
    "Core",
    "Inputs",
    "Softmax",
    "Spec",
    "Truth",
    "find",
    "observe",
    "sample",
    "variants",
]
