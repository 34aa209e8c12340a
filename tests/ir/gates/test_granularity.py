"""Granularity: which features, which positions."""

from __future__ import annotations

import pytest

from gatecc.errors import ArgumentError
from gatecc.ir.gates.granularity import Granularity
from gatecc.ir.gates.layout import GateShape

SIZES = {"h": 2, "d": 3, "c": 6, "e": 4}


@pytest.mark.parametrize(
    ("name", "axes", "features", "positions"),
    [
        ("head", "bhnd", "h", ""),
        ("head", "bnc", "h", ""),
        ("channel", "bhnd", "hd", ""),
        ("channel", "gnd", "hd", ""),
        ("row", "bnc", "c", ""),
        ("element", "bcyx", "c", "yx"),
        ("token", "bcyx", "", "yx"),
        ("token*head", "bnhd", "h", "n"),
        ("token*channel", "bnc", "c", "n"),
        ("edge*head", "bhnm", "h", "nm"),
        ("expert", "bnc", "e", ""),
        ("scalar", "bnc", "", ""),
    ],
)
def test_axes(name: str, axes: str, features: str, positions: str) -> None:
    shape = GateShape(axes, SIZES)
    granularity = Granularity.coerce(name)
    assert granularity.features(shape) == features
    assert granularity.positions(shape) == positions
    assert str(granularity) == name


@pytest.mark.parametrize("name", ["", "heads", "head*head", "sample*pixel"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ArgumentError):
        Granularity.coerce(name)


@pytest.mark.parametrize(("name", "axes"), [("pixel", "bnc"), ("edge", "bhnd"), ("channel", "bnm")])
def test_values_without_the_axis(name: str, axes: str) -> None:
    granularity, shape = Granularity.coerce(name), GateShape(axes, SIZES)
    with pytest.raises(ArgumentError, match="value has no"):
        _ = granularity.features(shape), granularity.positions(shape)
