"""Dynamo's graphs as Programs: what each placeholder is, by which name, and who owns the nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatecc.capture.dynamo import dynamo_program
from gatecc.ir.program import Program, attribute, origin

GLOBAL = torch.full((8,), 3.0)


def programs_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Program]:
    found: list[Program] = []

    def collect(graph_module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(dynamo_program(graph_module, inputs))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=collect)(*args, **kwargs)
    return found


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu() * self.scale


class Model(nn.Module):
    """One layer twice, a tied head, a buffer, and tensors that are no parameters."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.register_buffer("shift", torch.ones(8))
        self.plain = torch.full((8,), 2.0)
        self.listed = [torch.full((8,), 5.0)]
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, *, extra: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in (*self.layers, self.layers[0]):
            x = x + layer(x)
        return self.head(x + self.shift * self.plain + self.listed[0] * GLOBAL + extra)


def test_what_placeholders_are() -> None:
    model = Model()
    tokens, extra = torch.randint(11, (2, 5)), torch.randn(8)
    torch._dynamo.maybe_mark_dynamic(tokens, 1)
    (program,) = programs_of(model, tokens, extra=extra)
    assert program.paths == [("tokens",), ("extra",)]
    assert [x is y for x, y in zip(program.example, (tokens, extra), strict=True)] == [True, True]
    sizes = [n for n in program.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], torch.SymInt)]
    assert len(sizes) == 1
    assert program.tensor(sizes[0]) is None
    live = {**dict(model.named_parameters()), "shift": model.shift, "plain": model.plain}
    weights = {name: program.weight(n) for n in program.graph.nodes if (name := program.weight_name(n)) is not None}
    assert weights.keys() == live.keys()
    assert all(weights[name] is live[name] for name in live)
    constants = [held for n in program.graph.nodes if (held := program.constant(n)) is not None]
    assert sorted(float(held[0]) for held in constants) == [3.0, 5.0]


def test_owners_calls_and_lines() -> None:
    (program,) = programs_of(Model(), torch.randint(11, (2, 5)), extra=torch.randn(8))
    linear = [origin(n) for n in program.calls() if n.target is torch.ops.aten.linear.default]
    assert [(o.owner, o.call) for o in linear] == [
        ("layers.0.up", 0),
        ("layers.1.up", 0),
        ("layers.0.up", 1),
        ("head", 0),
    ]
    relu = [origin(n) for n in program.calls() if n.target is torch.ops.aten.relu.default]
    assert [(o.owner, o.call) for o in relu] == [("layers.0", 0), ("layers.1", 0), ("layers.0", 1)]
    assert all(o.line.startswith("test_dynamo.py:") for o in relu)


def test_the_module_has_the_structure_of_the_model() -> None:
    model = Model()
    (program,) = programs_of(model, torch.randint(11, (2, 5)), extra=torch.randn(8))
    found = program.module
    assert {name for name, _ in found.named_modules()} == {name for name, _ in model.named_modules()}
    assert isinstance(attribute(found, "layers"), nn.ModuleList)
    assert type(attribute(found, "layers.0")) is type(attribute(found, "layers.1"))
    assert type(attribute(found, "layers.0")) is not type(attribute(found, "layers.0.up"))
    assert attribute(found, "head.weight") is attribute(found, "table.weight")
    assert "up.weight" not in dict(attribute(found, "layers").named_parameters())


def test_a_function_of_two_models_keeps_their_names() -> None:
    one, other = Layer(), Layer()

    def function(x: Tensor) -> Tensor:
        return one(x) + other(x)

    (program,) = programs_of(function, torch.randn(2, 8))
    assert program.paths == [("x",)]
    assert len(program.lifted) == 6
    held = {id(program.weight(n)) for n in program.lifted}
    assert held == {id(p) for layer in (one, other) for p in layer.parameters()}
    owners = {origin(n).owner for n in program.calls() if n.target is torch.ops.aten.linear.default}
    assert len(owners) == 2
