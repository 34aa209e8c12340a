"""Regions picked from programs: what is one kernel on a GPU, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
        "3 product(s) and linear silu linear mul linear tanh",
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
    assert [len(names(found)) for found in graphs] == [2]


class Block(nn.Module):
    """Norms before products, one of a library and one that is spelled out, and an adapter as peft adds it."""

    def __init__(self, width: int = 272, wide: int = 160, rank: int = 4) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.rand(width))
        self.mixed, self.gate, self.up = nn.Linear(width, wide), nn.Linear(width, wide), nn.Linear(width, wide)
        self.base, self.down = nn.Linear(wide, width), nn.Linear(wide, rank, bias=False)
        self.back = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixed(self.norm(x)).cumsum(-1)
        x = x + (self.base(mixed) + 0.5 * self.back(self.down(mixed)))
        held = x.float()
        normed = self.scale * (held * torch.rsqrt(held.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return (F.silu(self.gate(normed)) * self.up(normed)).cumsum(-1)


WHOLE = [
    "1 product(s) and layer_norm linear",
    "3 product(s) and linear linear linear mul add add",
    "2 product(s) and to pow mean add rsqrt mul to mul linear silu linear mul",
]


@pytest.mark.usefixtures("gpu")
def test_norms_before_products_and_adapters_are_part_of_them() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 5, 272)
    found, y = lowered(model, x, "regions")
    assert [(o.found, o.reason) for o in found.outcomes if o.became] == [(region, "") for region in WHOLE]
    assert len(names(found)) == len(WHOLE)
    torch.testing.assert_close(y, model(x))
    weights = list(model.parameters())
    grads = (torch.autograd.grad(value.square().sum(), weights) for value in (y, model(x)))
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-4)


def outcomes(model: nn.Module, x: Tensor) -> list[Any]:
    """What becomes of a model on a pretended GPU, which is not run."""
    found: list[Lowered] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(lower(graph, inputs, Options(lowerings=("regions",))))
        return graph.forward

    torch.compiler.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    return list(found[0].outcomes)


BEFORE, READ = "what is before it", "a product that it reads"
IN_PART = [  # what was looked at, whether it became an operator, and what two kernels do sooner
    ("1 product(s) and layer_norm linear", False, BEFORE),
    ("1 product(s) and linear mul add add", True, f"with linear linear: {READ}"),
    ("2 product(s) and linear linear", False, READ),
    ("2 product(s) and linear silu linear mul", True, f"with to pow mean add rsqrt mul to mul: {BEFORE}"),
]


@pytest.mark.parametrize(("rows", "wanted"), [(16, [(region, True, "") for region in WHOLE]), (4096, IN_PART)])
def test_the_model_decides_by_the_number_of_rows(
    rows: int, wanted: list[tuple[str, bool, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """For few rows a norm costs nothing before a product; for many it would be computed for each block of columns."""
    monkeypatch.setenv("GATECC_CACHE", str(tmp_path))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            model, x = Block(2048, 8192, 16), torch.randn(1, rows, 2048)
        found = outcomes(model, x)
    assert [(o.found, o.became != "") for o in found] == [(region, became) for region, became, _ in wanted]
    for outcome, (*_, why) in zip(found, wanted, strict=True):
        assert outcome.reason.startswith(why)
        assert (f"with {rows} rows" in outcome.reason) is (why != "")


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        product = self.first(F.layer_norm(x, (16,)))
        y.add_(1)
        x.mul_(2)
        return torch.sigmoid(product) * y


@pytest.mark.usefixtures("gpu")
def test_what_is_written_to_in_between_is_read_before() -> None:
    model, x, y = Written(), torch.randn(5, 16), torch.randn(5, 24)
    found: list[Lowered] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(lower(graph, inputs, Options(lowerings=("regions",))))
        return found[-1].graph.forward

    torch.compiler.reset()
    wanted = model(x.clone(), y.clone())
    torch.testing.assert_close(torch.compile(model, backend=backend)(x.clone(), y.clone()), wanted)
    (outcome,) = found[0].outcomes
    assert outcome.found == "1 product(s) and linear sigmoid mul"
    assert outcome.became
    assert outcome.reason.startswith("with layer_norm: ")
    assert outcome.reason.endswith("is written to before the last of it is computed")


@pytest.mark.usefixtures("gpu")
def test_under_autocast_they_stay() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = lowered(Gated(), torch.randn(2, 5, 16), "regions")
    assert {o.reason for o in found.outcomes} == {"operators run in another precision than the graph records"}
    assert names(found) == []


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
