from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatecc.report.units import change, error_text, si, worst


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (1_234_567, "1.23 M"),
        (999_999, "1 M"),
        (2.5e15, "2.5 P"),
        (-1500, "-1.5 k"),
    ],
)
def test_si(value: float | None, text: str) -> None:
    assert si(value) == text


@given(st.integers(0, 10**17))
def test_si_is_right_to_three_digits(value: int) -> None:
    number, _, prefix = si(value).partition(" ")
    assert math.isclose(float(number) * 1000 ** " kMGTP".index(prefix or " "), value, rel_tol=6e-3)
    assert "e+" not in number or value >= 10**18 or prefix == "P"


def test_change() -> None:
    assert change(100, 150) == "+50.00%"
    assert change(100, 99) == "-1.00%"
    assert change(7, 7) == "="
    assert change(0, 1500) == "+1.5 k"
    assert change(None, 3) == ""


def test_an_error_that_is_not_a_number_is_the_worst() -> None:
    assert worst([]) is worst([None]) is None
    assert worst([1e-7, None, 2e-7]) == 2e-7
    assert math.isnan(worst([1.0, math.nan, 2.0]) or 0)
    assert error_text(worst([math.nan, 1.0])) == "nan"
    assert (error_text(0.0), error_text(None), error_text(1.25e-7)) == ("exact", "", "1.2e-07")
