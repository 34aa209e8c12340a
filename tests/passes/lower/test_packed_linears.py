"""packed-linears: narrow products of one value are one product, with the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatecc import backend
from gatecc.passes.lower import Outcome


class Products(nn.Module):
    """Products of x: (B, N, 32) with ``widths`` outputs each."""

    def __init__(self, widths: list[int], bias: bool = True) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(32, width, bias) for width in widths)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x).flatten(0, 1).view(-1) for linear in self.linears]


def x(rows: int = 40) -> torch.Tensor:
    return torch.randn(2, rows // 2, 32, generator=torch.Generator().manual_seed(rows))


def packed(function: Any, *args: Any) -> tuple[list[Outcome], int]:
    """What the lowering says of the graph of a function, and the products of what it becomes, which is the same."""
    outcomes: list[Outcome] = []
    products: list[int] = []

    def spy(graph_module: Any, example: Any) -> Callable[..., Any]:
        lowered = backend.lower(graph_module, example)
        outcomes.extend(o for o in lowered.outcomes if o.lowering == "packed-linears")
        products.append(sum("linear" in str(n.target) for n in lowered.graph.graph.nodes if n.op == "call_function"))
        return lowered.graph.forward

    found, expected = torch.compile(function, backend=spy, fullgraph=True)(*args), function(*args)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    return outcomes, products[0]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.booleans())
def test_narrow_products_become_one(widths: list[int], bias: bool) -> None:
    torch._dynamo.reset()
    (outcome,), products = packed(Products(widths, bias), x())
    narrow = [width for width in widths if width < 16]
    if len(narrow) > 1 and sum(narrow) >= 16:
        assert outcome.became == f"one product with {sum(narrow)} outputs"
        assert products == len(widths) - len(narrow) + 1
    else:
        assert outcome.reason
        assert not outcome.became


def test_gradients() -> None:
    model = Products([8, 8, 8])

    def step(function: Any) -> list[torch.Tensor]:
        model.zero_grad()
        torch.stack([part.square().sum() for part in function(x())]).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    found = step(torch.compile(model, backend="gatecc", mode="aot_eager"))
    for a, b in zip(found, step(model), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_few_rows_and_other_types_are_left_alone() -> None:
    (outcome,), _ = packed(Products([8, 8]), x(16))
    assert outcome.reason.startswith("16 rows")
    (outcome,), _ = packed(Products([8, 8]).double(), x().double())
    assert "float32" in outcome.reason


class Written(Products):
    """Between two products something is written into what they read."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x + 1
        first = self.linears[0](x)
        x[:, 0].mul_(2)
        return [first, self.linears[1](x)]


class Overwritten(Products):
    """Something is written into a result."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        first, second = (linear(x) for linear in self.linears)
        first.add_(1)
        return [first, second]


class Tied(nn.Module):
    """The same product twice, which the compiler sees by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.one(x), self.one(x)]


class Computed(Products):
    """One of the weights is computed from another input."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.linears[0](x), nn.functional.linear(x, x[0, :8])]


@pytest.mark.parametrize("model", [Written([8, 8]), Tied(), Computed([8])])
def test_not_the_same_value_or_no_weights_of_their_own(model: nn.Module) -> None:
    assert packed(model, x()) == ([], 2)


def test_results_that_are_written_into() -> None:
    (outcome,), products = packed(Overwritten([8, 8]), x())
    assert outcome.became
    assert products == 1


def test_wide_products_are_packed_on_accelerators_when_frozen() -> None:
    """On the meta device, which has the rules of an accelerator: nothing is computed."""
    model, given_x = Products([64, 64]).to("meta"), x().to("meta")
    for freeze, became in ((True, "one product with 128 outputs"), (False, "")):
        found: list[Outcome] = []

        def spy(graph_module: Any, example: Any, freeze: bool = freeze, found: list[Outcome] = found) -> Any:
            lowered = backend.lower(graph_module, example, backend.Options(freeze=freeze))
            found.extend(lowered.outcomes)
            return lowered.graph.forward

        with torch.no_grad():
            torch.compile(model, backend=spy)(given_x)
        (outcome,) = found
        assert outcome.became == became
        assert became or "gatecc.freeze" in outcome.reason
