"""Arguments survive the way through JSON: structure, types and which tensors are one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatecc.capture.tree import decode, encode
from gatecc.errors import ArgumentError

CONSTANTS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False, allow_infinity=False),
    st.text(),
    st.binary(),
    st.sampled_from([torch.float16, torch.channels_last, torch.strided, torch.device("cpu"), torch.device("cuda", 1)]),
)
TREES = st.recursive(
    CONSTANTS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(TREES)
def test_constants_in_any_nesting(tree: Any) -> None:
    back = decode(json.loads(json.dumps(encode(tree, {}))), {})
    assert back == tree
    assert repr(back) == repr(tree)  # 1 and True, () and [], are different


def test_tensors_are_kept_apart_and_one_stays_one() -> None:
    x, y = torch.zeros(2), torch.ones(3)
    tensors: dict[str, torch.Tensor] = {}
    data = encode(((x, None, {"a": [y, x]}), {"k": float("inf")}), tensors)
    assert list(tensors) == ["0", "1"]
    (first, none, nested), keywords = decode(json.loads(json.dumps(data)), tensors)
    assert first is x
    assert none is None
    assert nested["a"][0] is y
    assert nested["a"][1] is x
    assert keywords == {"k": float("inf")}


def test_an_object_is_refused_with_its_place() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)inputs\[1\]\['cache'\].*object"):
        encode(((), {"cache": object()}), {}, "inputs")


@pytest.mark.parametrize("data", [[1], {"set": [1]}, {"tensor": "7"}, {"tuple": 3}, {"a": 1, "b": 2}])
def test_data_that_encode_never_makes(data: Any) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        decode(data, {})
