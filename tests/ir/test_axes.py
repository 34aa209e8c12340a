"""Axes: their text, what they count, and the permutation between two."""

from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatecc.errors import ArgumentError
from gatecc.ir import axes
from gatecc.ir.axes import Axes

ORDERS = st.permutations("bhnd").map("".join)


@pytest.mark.parametrize("text", ["", "bhnd", "gnd", "bcyx", "bbn"])
def test_they_are_their_text(text: str) -> None:
    made = Axes(text)
    assert str(made) == text == "".join(made)
    assert made == text
    assert made == Axes.of(made)
    assert hash(made) == hash(text)
    assert bool(made) == bool(text)
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
    assert made != text + "x"


@pytest.mark.parametrize("text", ["B", "bz", "b n"])
def test_every_letter_counts_something(text: str) -> None:
    with pytest.raises(ArgumentError, match="names no axis"):
        Axes(text)


@given(have=ORDERS, wanted=ORDERS)
def test_the_order_of_one_in_another(have: str, wanted: str) -> None:
    size = dict(zip("bhnd", (2, 3, 5, 7), strict=True))
    x = torch.empty([size[a] for a in have])
    moved = x.permute(Axes(have).order(wanted))
    assert Axes(wanted).sizes(moved.shape) == Axes(have).sizes(x.shape) == size


def test_an_axis_that_is_not_there() -> None:
    assert Axes("bnc").index("c") == 2
    for ask in (lambda: Axes("bnc").index("h"), lambda: Axes("bnc").order("bhn")):
        with pytest.raises(ArgumentError, match="no axis h"):
            ask()
    with pytest.raises(ValueError, match="zip"):
        Axes("bnc").sizes((1, 2))


@pytest.mark.parametrize(
    ("text", "positions", "features", "per_head", "per_token"),
    [
        ("bhnd", "bn", "hd", True, True),
        ("gnm", "bnm", "h", True, True),
        ("bc", "b", "c", False, False),
        ("bhdc", "b", "hdc", True, False),
        ("bctyx", "btyx", "c", False, True),
        ("bwhrnd", "bwn", "hrd", True, True),
    ],
)
def test_what_they_count(text: str, positions: str, features: str, per_head: bool, per_token: bool) -> None:
    made = Axes(text)
    assert (made.positions, made.features) == (positions, features)
    assert (made.per_head, made.per_token) == (per_head, per_token)


def test_renamed() -> None:
    assert Axes("bhmd").renamed("m", "n") == "bhnd"
    assert Axes("bhrmd").renamed("r", "") == "bhmd"


def test_the_examples() -> None:
    assert doctest.testmod(axes).failed == 0
    assert doctest.testmod(axes).attempted > 0
