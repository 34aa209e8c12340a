"""Calls of any nesting become functions of named tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from gatecc.codegen.onnx.leaves import flat_call
from gatecc.errors import ExampleInputsError

A, B, C = (torch.full((2,), float(i)) for i in range(3))


class Nested(nn.Module):
    """Returns its arguments in a structure of another kind."""

    def forward(self, a: torch.Tensor, *rest: Any, scale: float = 1.0, **named: Any) -> dict[str, Any]:
        return {"a": a * scale, "list": [r * 2 for r in rest if isinstance(r, torch.Tensor)], "n": 3, "none": None}


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Returns(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def test_names_and_values() -> None:
    call = flat_call(Nested(), (A, B, None, C), {"scale": 3.0, "extra": {"deep": (A, "text")}})
    assert call.inputs == ("a", "rest_0", "rest_2", "extra_deep_0")
    assert call.outputs == ("a_out", "list_0", "list_1")
    out = call.flat(*(x + 1 for x in call.leaves))
    assert [y.tolist() for y in out] == [[3.0, 3.0], [4.0, 4.0], [6.0, 6.0]]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x, ("output",)),
        (lambda x: (x, x), ("output_0", "output_1")),
        (lambda x: Pair(x, x), ("first", "second")),
        (lambda x: {"last hidden": x}, ("last_hidden",)),
        (lambda x: [{"x": x}], ("output_0_x",)),
    ],
)
def test_output_names(function: Any, names: tuple[str, ...]) -> None:
    assert flat_call(Returns(function), (A,), {}).outputs == names


def test_no_tensor_on_a_side() -> None:
    with pytest.raises(ExampleInputsError, match="1 inputs, 0 outputs"):
        flat_call(Returns(lambda x: None), (A,), {})
