"""Free sizes have the names that users expect, and inputs can be made at other sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from gatecc.codegen.onnx.dims import Dims, fixed


class Add(nn.Module):
    """Adds its inputs up to a number."""

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.stack([t.double().sum() for t in tensors])


def dims_of(**inputs: torch.Tensor) -> Dims:
    """The dims of a program with these inputs, every size of 2 or more free."""
    leaves = tuple(inputs.values())
    shapes = tuple({i: Dim.AUTO for i, size in enumerate(x.shape) if size > 1} for x in leaves)
    program = export(Add(), leaves, dynamic_shapes=(shapes,))
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    return Dims.of(values, leaves, list(inputs))


def named(dims: Dims) -> list[list[int | str]]:
    return [[dims.rename(str(size)) for size in shape] for shape in dims.shapes]


def test_axes_of_one_usual_name_and_size_are_one_dimension() -> None:
    tokens = torch.zeros(2, 7, dtype=torch.long)
    dims = dims_of(input_ids=tokens, attention_mask=tokens.clone(), decoder_input_ids=torch.zeros(2, 4))
    assert named(dims) == [["batch", "sequence"], ["batch", "sequence"], ["batch", "decoder_sequence"]]


def test_other_sizes_get_the_input_in_their_name() -> None:
    dims = dims_of(
        x=torch.zeros(2, 5, 3), y=torch.zeros(4, 6, 3), image=torch.zeros(2, 3, 8, 9), fixed=torch.zeros(1, 3)
    )
    assert named(dims)[0] == ["batch", "sequence", "x_2"]
    assert named(dims)[1] == ["y_batch", "y_sequence", "y_2"]
    assert named(dims)[2] == ["batch", "channels", "height", "width"]
    assert named(dims)[3] == [1, "fixed_sequence"]


def test_inputs_at_other_sizes_repeat_their_entries() -> None:
    ids = torch.arange(6).reshape(2, 3)
    dims = dims_of(ids=ids, bias=torch.zeros(1, 3))
    assert dims.sizes([ids, torch.zeros(1, 3)]) == {"batch": 2, "sequence": 3}
    small, bias = dims.resized([ids, torch.zeros(1, 3)], {"batch": 1, "sequence": 2})
    assert small.tolist() == [[0, 1]]
    assert bias.shape == (1, 2)
    large, _ = dims.resized([ids, torch.zeros(1, 3)], {"batch": 3, "sequence": 4})
    assert large.tolist() == [[0, 1, 2, 0], [3, 4, 5, 3], [0, 1, 2, 0]]


def test_other_lengths() -> None:
    ids = torch.zeros(2, 2)
    dims = dims_of(ids=ids)
    base = dims.sizes([ids])
    assert [s["sequence"] for s in dims.longer(base, ["sequence"])][:3] == [5, 1, 3]
    assert {s["batch"] for s in dims.longer(base, ["sequence"])} == {2}
    assert list(dims.longer(base, [])) == []


@pytest.mark.parametrize(
    ("dimension", "sizes", "expected"),
    [
        ("batch", {"batch": 3}, 3),
        ("2*batch + 1", {"batch": 3}, 7),
        ("4*sequence", {"batch": 3}, "4*sequence"),
        ("batch*sequence", {"batch": 3}, "3*sequence"),
        ("(height//2)", {"height": 9, "width": 8}, 4),
        ("sequence_2", {"sequence": 5}, "sequence_2"),
        (None, {"batch": 3}, None),
    ],
)
def test_fixed_sizes(dimension: str | None, sizes: dict[str, int], expected: int | str | None) -> None:
    assert fixed(dimension, sizes) == expected


def test_sizes_that_no_input_has_get_a_readable_name() -> None:
    ids = torch.zeros(2, 2)
    dims = dims_of(ids=ids)
    assert dims.rename("u0") == "size_0"
    assert dims.rename("2*u7 + u0") == "2*size_1 + size_0"
    assert dims.rename("12") == 12
