"""Regions picked from programs: what is one kernel on a GPU, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.backend.lower import Lowered, lower
from gatecc.backend.options import Options
from gatecc.passes.lower import regions


class Gated(nn.Module):
    """A gated unit, and a gate on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.silu(self.gate(x)) * self.up(x))
        return x + torch.sigmoid(self.down(y.tanh().repeat(1, 1, 2)[..., :24])) * x


def lowered(model: nn.Module, x: Tensor, *names: str) -> tuple[Lowered, Tensor]:
    found: list[Lowered] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(lower(graph, inputs, Options(lowerings=names or None)))
        return found[-1].graph.forward

    torch.compiler.reset()
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    return found[0], y


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Tensors on the CPU pass for some on a GPU; the operators run their ATen form."""
    monkeypatch.setattr(regions, "_on_gpu", lambda node: True)
    monkeypatch.setenv("GATECC_CACHE", str(tmp_path))


def names(found: Lowered) -> list[str]:
    return [str(n.target) for n in found.graph.graph.nodes if "gatecc_regions" in str(n.target)]


@pytest.mark.usefixtures("gpu")
def test_regions_become_operators() -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, 5, 16)
    found, y = lowered(model, x, "regions")
    torch.testing.assert_close(y, model(x))
    taken = [o for o in found.outcomes if o.became]
    assert [o.found for o in taken] == [
        "2 product(s) and linear silu linear mul",
        "1 product(s) and linear tanh",
        "1 product(s) and linear sigmoid mul add",
    ]
    assert len(names(found)) == len(taken)
    assert all("MB" in o.gain for o in taken)


@pytest.mark.usefixtures("gpu")
def test_they_are_differentiated() -> None:
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(2, 5, 16)
    found, y = lowered(model, x, "regions")
    assert names(found)
    weights = list(model.parameters())
    for ours, wanted in zip(
        torch.autograd.grad(y.square().sum(), weights),
        torch.autograd.grad(model(x).square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("gpu")
def test_free_sizes() -> None:
    """One compilation serves any number of rows."""
    model, graphs = Gated(), list[Lowered]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(lower(graph, inputs, Options(lowerings=("regions",))))
        return graphs[-1].graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (5, 7, 12):
        x = torch.randn(2, rows, 16)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), model(x))
    assert [len(names(found)) for found in graphs] == [3]


def test_on_a_cpu_they_are_inductors() -> None:
    found, _ = lowered(Gated(), torch.randn(2, 5, 16), "regions")
    assert {o.reason for o in found.outcomes} == {"on a CPU it is Inductor's to fuse"}
    assert names(found) == []


@pytest.mark.usefixtures("gpu")
def test_only_by_request() -> None:
    found, _ = lowered(Gated(), torch.randn(2, 5, 16))
    (left,) = [o for o in found.outcomes if o.lowering == "regions"]
    assert left.found == "a gated unit, 2 times"
    assert "'regions'" in left.reason
    assert not left.became
    assert names(found) == []


class Between(nn.Module):
    """What is added to a product depends on it by way of what is no region."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.sigmoid(y) * y.cumsum(-1)


@pytest.mark.usefixtures("gpu")
def test_regions_are_convex() -> None:
    model, x = Between(), torch.randn(2, 5, 16)
    found, y = lowered(model, x, "regions")
    torch.testing.assert_close(y, model(x))
    assert names(found) == []
