"""gatecc.freeze: what is computed of parameters alone is kept, and never stale."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gatecc import backend
from gatecc.backend.freeze import freeze
from gatecc.backend.options import Options


class Gates(nn.Module):
    """Gates per head of x: (B, N, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.a(x)) * self.b(x) + self.c(x)


X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
MODES = ("eager", "aot_eager")


def compiled(model: Callable[..., torch.Tensor], mode: str = "eager") -> Any:
    def compiler(graph_module: Any, example: Any) -> Any:
        return backend.gatecc(graph_module, example, mode=mode, options={"gatecc.freeze": True})

    return torch.compile(model, backend=compiler)


def test_weights_are_concatenated_once() -> None:
    counts: list[list[int]] = []

    def spy(graph_module: Any, example: Any) -> Any:
        graph = backend.lower(graph_module, example, Options(freeze=True)).graph
        frozen = freeze(graph, example)
        assert frozen is not None
        graphs = (frozen.graph.graph, frozen.early.graph)
        counts.append([len(g.find_nodes(op="call_function", target=torch.ops.aten.cat.default)) for g in graphs])
        assert len(frozen.places) == 6
        return frozen.run(frozen.graph.forward)

    model = Gates()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend=spy)(X), model(X), atol=1e-6)
    assert counts == [[0, 2]]


def step(model: Gates) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load(model: Gates) -> None:
    model.load_state_dict(Gates().state_dict())


def assign(model: Gates) -> None:
    model.load_state_dict(Gates().state_dict(), assign=True)


def new_data(model: Gates) -> None:
    model.b.bias.data = torch.randn(8)


def new_parameter(model: Gates) -> None:
    model.c.weight = nn.Parameter(torch.randn(8, 32))


def write(model: Gates) -> None:
    with torch.no_grad():
        model.a.weight[3, 5] += 1


def write_through_data(model: Gates) -> None:
    model.a.weight.data.mul_(2)


def write_one_through_data(model: Gates) -> None:
    model.a.weight.data[3, 5] += 1


CHANGES = (step, load, assign, new_data, new_parameter, write, write_through_data, write_one_through_data)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_is_noticed(change: Callable[[Gates], None]) -> None:
    model = Gates()
    function = compiled(model)
    with torch.no_grad():
        before = function(X)
        assert torch.allclose(function(X), model(X), atol=1e-6)
    change(model)
    with torch.no_grad():
        assert not torch.allclose(function(X), before, atol=1e-3)
        assert torch.allclose(function(X), model(X), atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 400), (300, 200)])
@pytest.mark.parametrize("gaps", [False, True])
def test_weights_that_lie_otherwise_are_looked_at(shape: tuple[int, int], gaps: bool) -> None:
    model = nn.ParameterList(nn.Parameter(torch.randn(shape[1], 2 * shape[0])[:, :: 1 + gaps].mT[:8]) for _ in range(2))
    x = torch.randn(2, 40, shape[1])

    def function(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, model[0]) * nn.functional.linear(x, model[1])

    frozen = compiled(function)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(frozen(x), function(x), atol=1e-4, rtol=1e-4)
            model[1].data.mul_(2)


def test_weights_that_the_graph_writes_to_are_not_kept() -> None:
    model = Gates()

    def function(x: torch.Tensor) -> torch.Tensor:
        model.a.weight[0].mul_(0.5)
        return model(x)

    with torch.no_grad():
        for _ in range(2):
            before = model.a.weight.clone()
            found = compiled(function)(X)
            model.a.weight.copy_(before)
            torch.testing.assert_close(found, function(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_models_of_one_structure_keep_their_own(mode: str) -> None:
    models = [Gates(), Gates()]
    functions = [compiled(model, mode) for model in models]
    with torch.no_grad():
        for _ in range(2):
            for model, function in zip(models, functions, strict=True):
                assert torch.allclose(function(X), model(X), atol=1e-6)


def test_nothing_keeps_a_model_alive() -> None:
    model = Gates()
    with torch.no_grad():
        compiled(model)(X)
    weight = weakref.ref(model.a.weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_graph_that_learns_is_not_frozen() -> None:
    model = Gates()
    found, expected = compiled(model, "aot_eager")(X).sum(), model(X).sum()
    found.backward()
    gradients = [p.grad for p in model.parameters()]
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    for found_gradient, gradient in zip(gradients, expected_gradients, strict=True):
        assert found_gradient is not None
        assert torch.allclose(found_gradient, gradient, atol=1e-4)


def test_parameters_of_inference_mode_are_not_frozen() -> None:
    """They have no version, so a change would not be noticed."""
    with torch.inference_mode():
        model = Gates()
        function = compiled(model)
        function(X)
        model.a.weight[3, 5] += 1
        assert torch.allclose(function(X), model(X), atol=1e-6)


def test_inductor() -> None:
    model = Gates()
    function = torch.compile(model, backend="gatecc", options={"gatecc.freeze": True, "compile_threads": 1})
    with torch.no_grad():
        assert torch.allclose(function(X), model(X), atol=1e-5)
        step(model)
        assert torch.allclose(function(X), model(X), atol=1e-5)
