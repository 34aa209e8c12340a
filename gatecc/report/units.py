"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable


def si(value: float | None, unit: str = "") -> str:
    """``1234567`` as ``1.23 M``; whole numbers below 1000 stay whole; None is a dash."""
    if value is None:
        return "–"
    amount = float(value)
    if abs(amount) < 1000:
        return f"{amount:g} {unit}".rstrip()
    step = min(5, int(math.log10(abs(amount)) / 3))
    if abs(amount) / 1000**step >= 999.5 and step < 5:  # it would print as 1e+03
        step += 1
    return f"{amount / 1000**step:.3g} {' kMGTP'[step]}{unit}"


def change(before: float | None, after: float | None) -> str:
    """The relative change, with its sign; empty if one of the two is missing."""
    if before is None or after is None:
        return ""
    if before == after:
        return "="
    return f"{(after - before) / before:+.2%}" if before else f"+{si(after)}"


def error_text(error: float | None) -> str:
    """A measured error; zero is worth a word."""
    if error is None:
        return ""
    return "exact" if error == 0 else f"{error:.1e}"


def worst(errors: Iterable[float | None]) -> float | None:
    """The largest error that was measured. NaN is the worst of all: ``max`` would let it slip through."""
    measured = [error for error in errors if error is not None]
    if any(math.isnan(error) for error in measured):
        return math.nan
    return max(measured, default=None)
