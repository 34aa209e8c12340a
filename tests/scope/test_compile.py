"""Scopes under torch.compile: every gate acts and learns, in one graph or one per layer; new kinds of call work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import gatecc
from gatecc.transform import history

LAYERS = 9  # more than the graphs that Dynamo makes of one code object before it gives up
RESIDUAL = gatecc.Gate(gatecc.Residual[...].branch, gatecc.GateSpec("skip", "linear", "element", "sigmoid"))


class Layer(nn.Module):
    """Residual self-attention over x: (B, N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return x + self.drop(self.out(y.transpose(1, 2).flatten(2)))


class Deep(nn.Module):
    """Nine layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def gates(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("gate.bias")]


def x(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch * length))


@pytest.fixture(scope="module", params=["gated-attention", RESIDUAL], ids=["attention", "residual"])
def original(request: pytest.FixtureRequest) -> nn.Module:
    """A model whose gates all differ."""
    model = gatecc.transform(Deep().eval(), request.param, (x(),), verify=False)
    assert len(gates(model)) == LAYERS
    for i, bias in enumerate(gates(model)):
        nn.init.constant_(bias, (i - LAYERS / 2) / 3)
    return model


@pytest.fixture
def model(original: nn.Module) -> Iterator[nn.Module]:
    """A copy for one test."""
    torch._dynamo.reset()
    yield copy.deepcopy(original)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def twin(original: nn.Module) -> nn.Module:
    """The same model with captures of its own."""
    twin = gatecc.transform(Deep().eval(), history(original)[0].recipe, (x(),), verify=False)
    twin.load_state_dict(original.state_dict())
    return twin


@pytest.fixture
def per_layer(twin: nn.Module) -> Iterator[nn.Module]:
    """The twin, to compile its layers."""
    yield twin
    for layer in twin.get_submodule("layers").children():
        layer._compiled_call_impl = None


def learn(model: nn.Module, output: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of every gate."""
    model.zero_grad()
    output.pow(2).mean().backward()
    found = [p.grad for p in gates(model)]
    assert all(g is not None and bool(g.any()) for g in found)
    return [g.clone() for g in found if g is not None]


def assert_same_step(model: nn.Module, run: Any, *args: Any) -> None:
    """Outputs and gradients of all gates are those of the eager model."""
    expected = model(*args)
    gradients = learn(model, expected)
    output = run(*args)
    assert torch.allclose(output, expected, atol=1e-6)
    for found, wanted in zip(learn(model, output), gradients, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "gatecc"])
def test_the_whole_model_is_one_graph(model: nn.Module, backend: str) -> None:
    options: dict[str, Any] = {"mode": "aot_eager"} if backend == "gatecc" else {}
    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    assert_same_step(model, compiled, x())


def test_other_sizes_take_one_dynamic_graph(model: nn.Module) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in ((2, 5), (3, 7), (4, 9), (5, 11)):
        assert torch.equal(compiled(x(*size)), model(x(*size)))
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_each_layer_compiled_by_itself(model: nn.Module, per_layer: nn.Module, grad: bool, training: bool) -> None:
    """Also in modes that no layer has run in: all layers learn from the first."""
    counter = torch._dynamo.testing.CompileCounter()
    for layer in per_layer.get_submodule("layers").children():
        layer.compile(backend=counter, fullgraph=True)
    model.train(training)
    per_layer.train(training)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        expected = model(x())
        torch.manual_seed(0)
        output = per_layer(x())
    assert torch.equal(output, expected)
    assert 1 <= counter.frame_count <= 3  # the first layer has yet to learn, and its input needs no gradient
    if grad:
        assert all(map(torch.equal, learn(per_layer, output), learn(model, expected)))


def test_a_changed_gate_is_seen(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x())
    with torch.no_grad():
        gates(model)[7].add_(1.0)
    after = compiled(x())
    assert not torch.equal(before, after)
    assert torch.equal(after, model(x()))


def test_kinds_of_call_that_were_never_seen(model: nn.Module) -> None:
    """Each is one graph, from the first call on."""
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    for args in ((x(), mask), (x(1, 5),), (x(2, 1),)):
        for _ in range(2):
            assert torch.equal(compiled(*args), model(*args))
    assert counter.frame_count == 3


def test_training_starts_compiled(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.train()
    for _ in range(2):
        torch.manual_seed(0)
        output = compiled(x())
        torch.manual_seed(0)
        expected = model(x())
        assert torch.equal(output, expected)
        assert not torch.equal(output, model(x()))  # dropout draws again
        learn(model, output)


class Opaque:
    """An object that neither a graph nor a key can hold."""


class Taking(Layer):
    """A layer with an argument that it passes by."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, cache: object = None) -> torch.Tensor:
        return super().forward(x, mask)


def test_an_argument_that_no_graph_holds_breaks_it() -> None:
    model = gatecc.transform(Taking().eval(), "gated-attention", (x(),), verify=False)
    nn.init.normal_(model.get_parameter("gate.weight"))
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(x(), None, Opaque()), model(x()), atol=1e-6)


def test_export_without_gradients_keeps_every_gate(model: nn.Module) -> None:
    """A kind of call that was never seen, inside torch.export: captured there, shared by all layers."""
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, (x(),), dynamic_shapes=(sizes,), strict=False)
        assert sum("sigmoid" in str(n.target) for n in program.graph.nodes) == LAYERS
        assert torch.allclose(program.module()(x(3, 7)), model(x(3, 7)), atol=1e-6)
