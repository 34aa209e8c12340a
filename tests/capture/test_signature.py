"""Calls have one key exactly if a graph of one serves the other, up to sizes of two and more."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatecc.capture.signature import OpaqueArgumentError, flatten, leaf_paths, map_tensors, rebuild

X = torch.zeros(2, 3)

constants = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, width=16) | st.text(max_size=3)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
leaves = constants | shapes.map(torch.zeros)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(trees)
def test_rebuild_inverts_flatten(tree: Any) -> None:
    key, tensors = flatten((tree,), {})
    fresh = [torch.ones_like(t) for t in tensors]
    (again,) = rebuild((tree,), iter(fresh))
    other, found = flatten((again,), {})
    assert other == key
    assert all(a is b for a, b in zip(found, fresh, strict=True))
    assert len(leaf_paths((tree,), {}, ["tree"])) == len(tensors)


@given(trees)
def test_mapping_keeps_the_structure(tree: Any) -> None:
    doubled = map_tensors(lambda t: t.double(), tree)
    _, tensors = flatten((doubled,), {})
    assert all(t.dtype is torch.float64 for t in tensors)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (((X,), {}), ((X, None), {})),
        (((X, None), {}), ((X, X), {})),
        (((X, 1), {}), ((X, True), {})),
        (((X, 1), {}), ((X, 1.0), {})),
        (((X, "a"), {}), ((X, "b"), {})),
        (((X,), {}), ((), {"x": X})),
        (((X,), {}), ((X.double(),), {})),
        (((X,), {}), ((X[0],), {})),
        (((X,), {}), ((X[:1],), {})),
        (((X,), {}), ((X[:0],), {})),
        ((([X, X],), {}), (((X, X),), {})),
    ],
)
def test_what_a_graph_bakes_in_makes_another_key(a: Any, b: Any) -> None:
    assert flatten(*a)[0] != flatten(*b)[0]


@given(st.integers(2, 9), st.integers(2, 9))
def test_sizes_of_two_and_more_do_not(n: int, m: int) -> None:
    assert flatten((torch.zeros(n, m),), {})[0] == flatten((X,), {})[0]


def test_names_of_leaves() -> None:
    paths = leaf_paths((X, [X, {"k": X}]), {"mask": X, "flag": True}, ["x", "rest"])
    assert paths == [("x",), ("rest", 0), ("rest", 1, "k"), ("mask",)]


def test_registered_containers_are_taken_and_unknown_objects_are_not() -> None:
    assert len(flatten((OrderedDict(a=X, b=None),), {})[1]) == 1
    with pytest.raises(OpaqueArgumentError, match="object"):
        flatten((object(),), {})


def test_a_cache_is_opaque_even_if_it_is_a_registered_container() -> None:
    from transformers import DynamicCache

    with pytest.raises(OpaqueArgumentError, match="DynamicCache"):
        flatten((X,), {"past_key_values": DynamicCache()})
