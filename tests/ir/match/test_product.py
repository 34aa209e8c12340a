"""Every spelling of a product of two tensors, read as an einsum that computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc.ir.match.product import product
from gatecc.ir.ops import CONTRACTIONS, opname
from tests.graphs import program_of, record


def case(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return function, tuple(torch.randn(shape) for shape in shapes)


CASES = {
    "matmul": case(lambda a, b: a @ b, (2, 3, 4, 5), (2, 3, 5, 6)),
    "broadcast": case(lambda a, b: a @ b, (2, 3, 4, 5), (5, 6)),
    "broadcast left": case(lambda a, b: a @ b, (4, 5), (3, 5, 6)),
    "mm": case(torch.mm, (4, 5), (5, 6)),
    "bmm": case(torch.bmm, (3, 4, 5), (3, 5, 6)),
    "linear": case(F.linear, (2, 3, 5), (6, 5)),
    "einsum": case(lambda a, b: torch.einsum("bnhd, bmhd -> bhnm", a, b), (2, 4, 3, 5), (2, 6, 3, 5)),
    "ellipsis": case(lambda a, b: torch.einsum("...nd,...md->...nm", a, b), (2, 3, 4, 5), (2, 3, 6, 5)),
    "implicit": case(lambda a, b: torch.einsum("bnd,bdm", a, b), (2, 4, 5), (2, 5, 6)),
    "outer": case(lambda a, b: torch.einsum("nd,md->dnm", a, b), (4, 5), (6, 5)),
}


def only(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
    program = program_of(function, *inputs)
    (node,) = [n for n in program.calls() if opname(n) in CONTRACTIONS]
    return node, record(program)


@pytest.mark.parametrize("name", CASES)
def test_a_product_is_its_einsum(name: str) -> None:
    node, tensors = only(*CASES[name])
    found = product(node)
    assert found is not None
    equation = f"{found.left_axes},{found.right_axes}->{found.axes}".translate(str.maketrans("01234567", "STUVWXYZ"))
    again = torch.einsum(equation, tensors[found.left], tensors[found.right])
    torch.testing.assert_close(again, tensors[node])


def test_what_is_added_and_the_factor() -> None:
    node, tensors = only(*case(lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.5), (3, 4, 6), (3, 4, 5), (3, 5, 6)))
    found = product(node)
    assert found is not None
    assert found.addend is not None
    assert found.alpha == 0.5
    assert found.contracted == "d"
    again = tensors[found.addend] + found.alpha * tensors[found.left] @ tensors[found.right]
    torch.testing.assert_close(again, tensors[node])


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b, c: torch.einsum("nd,md,d->nm", a, b, c), [(4, 5), (6, 5), (5,)]),
        (lambda a, b: torch.einsum("nn,nm->nm", a, b), [(4, 4), (4, 5)]),
        (lambda a, b: torch.einsum("nd,mk->nm", a, b), [(4, 5), (6, 3)]),
        (lambda a, b: a @ b, [(4, 5), (5,)]),
    ],
)
def test_no_product(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    node, _ = only(*case(function, *shapes))
    assert product(node) is None


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_factor_that_is_no_constant(name: str) -> None:
    """Such a factor was read as 1."""
    node, _ = only(*case(torch.baddbmm, (3, 4, 6), (3, 4, 5), (3, 5, 6)))
    with node.graph.inserting_before(node):
        node.update_kwarg(name, node.graph.call_function(torch.ops.aten.item.default, (node.args[0],)))
    assert product(node) is None
