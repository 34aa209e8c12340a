"""Linear sites: every spelling of a product with a weight, with the orientation that reproduces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.ir.match.found import Lambda, find


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module | nn.Parameter], str]] = {
    "nn.Linear": (lambda m, x: m.p(x), {"p": nn.Linear(6, 4)}, "out_in"),
    "functional": (lambda m, x: nn.functional.linear(x, m.w, m.b), {"w": matrix(4, 6), "b": matrix(4)}, "out_in"),
    "matmul": (lambda m, x: x @ m.w, {"w": matrix(6, 4)}, "in_out"),
    "matmul of .T": (lambda m, x: x @ m.w.T, {"w": matrix(4, 6)}, "out_in"),
    "matmul of permute": (lambda m, x: x @ m.w.permute(1, 0), {"w": matrix(4, 6)}, "out_in"),
    "matmul of .T.T": (lambda m, x: x @ m.w.transpose(0, 1).mT, {"w": matrix(6, 4)}, "in_out"),
    "mm": (lambda m, x: torch.mm(x.flatten(0, 1), m.w), {"w": matrix(6, 4)}, "in_out"),
    "addmm": (lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w), {"w": matrix(6, 4), "b": matrix(4)}, "in_out"),
    "einsum io": (lambda m, x: torch.einsum("bni,io->bno", x, m.w), {"w": matrix(6, 4)}, "in_out"),
    "einsum oi": (lambda m, x: torch.einsum("bni,oi->bno", x, m.w), {"w": matrix(4, 6)}, "out_in"),
    "cast": (lambda m, x: x @ m.w.to(x.dtype), {"w": nn.Parameter(torch.randn(6, 4).double())}, "in_out"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, parts, orientation = SPELLINGS[name]
    found = find(Lambda(function, **parts), torch.randn(2, 3, 6))
    (site,) = found.sites("linear")
    weight = site.weights["weight"]
    assert weight.orientation == orientation
    out = found.value(site, "in") @ found.matrix(site, "weight").float().mT
    if weight.bias is not None:
        out = out + found.parameter(weight.bias).detach()
    torch.testing.assert_close(found.value(site, "out"), out)
    assert not found.refusals("linear")


def test_owner_key_and_line() -> None:
    found = find(Lambda(lambda m, x: m.p(m.p(x)) @ m.w, p=nn.Linear(6, 6), w=matrix(6, 4)), torch.randn(2, 3, 6))
    assert [site.key for site in found.sites("linear")] == ["p#0", "p#0@1", "#0"]
    assert found.sites("linear")[2].line.startswith("found.py:")  # the forward that says it
    assert found.axes(found.sites("linear")[0]) == {"in": "bnc", "out": "bnc"}


def test_addmm_of_a_flattened_input_keeps_its_tokens() -> None:
    """transformers' Conv1D: the site's values are those before the flattening and after the shape is restored."""

    def conv1d(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.b, x.view(-1, x.size(-1)), m.w).view(*x.shape[:-1], 4)

    found = find(Lambda(conv1d, w=matrix(6, 4), b=matrix(4)), torch.randn(2, 3, 6))
    (site,) = found.sites("linear")
    assert found.value(site, "in").shape == (2, 3, 6)
    assert found.value(site, "out").shape == (2, 3, 4)
    assert site.weights["weight"].bias == "b"


def test_a_tied_weight_is_called_as_its_module_calls_it() -> None:
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    found = find(Lambda(lambda m, x: m.head(m.table(x)), table=embedding, head=head), torch.tensor([[1, 2, 3]] * 2))
    assert found.sites("linear")[0].weights["weight"].fqn == "head.weight"
    assert found.sites("embedding")[0].weights["weight"].fqn == "table.weight"


def test_a_submodule_has_names_of_the_whole_model() -> None:
    found = find(nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 3, 6), fqn="model.layers.1")
    (site,) = found.sites("linear")
    assert (site.owner, site.weights["weight"].fqn) == ("model.layers.1.0", "model.layers.1.0.weight")


@pytest.mark.parametrize(
    ("code", "function", "parts"),
    [
        ("GCC130", lambda m, x: m.p(x), {"p": parametrizations.weight_norm(nn.Linear(6, 4))}),
        ("GCC130", lambda m, x: x @ m.w.tanh(), {"w": matrix(6, 4)}),
        ("GCC131", lambda m, x: x @ m.w, {"w": matrix(2, 6, 4)}),
        ("GCC131", lambda m, x: torch.bmm(x, m.w.mT), {"w": matrix(2, 4, 6)}),
        ("GCC131", lambda m, x: torch.einsum("bni,iho->bnho", x, m.w), {"w": matrix(6, 2, 4)}),
        ("GCC132", lambda m, x: m.w @ x, {"w": matrix(5, 3)}),
        ("GCC132", lambda m, x: torch.einsum("bni,nm->bmi", x, m.w), {"w": matrix(3, 3)}),
    ],
)
def test_refusals(code: str, function: Callable[..., Tensor], parts: dict[str, nn.Module | nn.Parameter]) -> None:
    found = find(Lambda(function, **parts), torch.randn(2, 3, 6))
    assert found.codes("linear") == [code]
    assert not found.sites("linear")
    assert all((r.line and r.reason and r.remedy) for r in found.refusals("linear"))


def test_products_of_two_values_are_neither() -> None:
    found = find(Lambda(lambda m, x: (x @ x.mT) @ x), torch.randn(2, 3, 6))
    assert not found.sites("linear")
    assert not found.refusals("linear")
