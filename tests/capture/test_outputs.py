"""Outputs of any class are opened, in order and with the names that their entries have."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from gatecc.capture.outputs import output_leaves, output_tensors

A, B = torch.zeros(1), torch.ones(1)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Sample:
    sample: Any
    extra: Any = None


class Output(OrderedDict[str, Any]):
    """Like those of transformers and diffusers."""


@pytest.mark.parametrize(
    ("output", "paths"),
    [
        (A, [()]),
        ((A, [B, None]), [("0",), ("1", "0")]),
        (Pair(A, Pair(B, 3)), [("first",), ("second", "first"), ("second", "second")]),
        (Sample(A, {"b": B}), [("sample",), ("extra", "b")]),
        (Output(logits=A, loss=None, n="text"), [("logits",), ("n",)]),
        (UserDict(x=Sample(A)), [("x", "sample")]),
        ({"x": object()}, [("x",)]),
        (None, []),
    ],
)
def test_names(output: Any, paths: list[tuple[str, ...]]) -> None:
    assert [leaf.path for leaf in output_leaves(output)] == paths


def test_tensors_in_order() -> None:
    assert output_tensors(Pair([B, 2], Sample(A))) == (B, A)
