"""GELU, exact or by tanh, as one operator or written out: patterns whose ``x`` is what it is of."""

from __future__ import annotations

import math
from collections.abc import Callable

from gatecc.ir.pattern import Match, Part, Pattern, Patterns, anything, call, constant, one_of

_X = anything("x")


def _near(value: float) -> Part:
    return constant(_is_near(value))


def _is_near(value: float) -> Callable[[object], bool]:
    return lambda given: isinstance(given, int | float) and abs(given - value) <= 1e-6 * abs(value)


def _tanh_form() -> Part:
    cube = one_of(call("pow", _X, 3), call("mul", call("mul", _X, _X), _X))
    inner = call("add", _X, call("mul", cube, _near(0.044715)))
    factored = call("mul", _X, call("add", call("mul", call("mul", _X, _X), _near(0.044715)), 1))
    tanh = call("tanh", call("mul", one_of(inner, factored), _near(math.sqrt(2 / math.pi))))
    return _halved(call("add", tanh, 1))


def _erf_form() -> Part:
    scaled = one_of(call("div", _X, _near(math.sqrt(2))), call("mul", _X, _near(math.sqrt(0.5))))
    return _halved(call("add", call("erf", scaled), 1))


def _halved(factor: Part) -> Part:
    """0.5 * x * factor, in whatever order."""
    return one_of(
        call("mul", call("mul", _X, 0.5), factor),
        call("mul", call("mul", _X, factor), 0.5),
        call("mul", _X, call("mul", factor, 0.5)),
    )


GELU = Patterns(
    Pattern("gelu", call("gelu", _X)),
    Pattern("gelu tanh", call("gelu", _X, approximate="tanh")),
    Pattern("gelu tanh", _tanh_form()),
    Pattern("gelu", _erf_form()),
)


def by_tanh(match: Match) -> bool:
    """Whether a match of GELU is the form that tanh approximates."""
    return match.pattern.name == "gelu tanh"


__all__ = ["GELU", "by_tanh"]
