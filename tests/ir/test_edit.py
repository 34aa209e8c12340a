"""The editor: traced calls at the right place, replacement, new modules under names that are free."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.capture import capture
from gatecc.errors import GraphError
from gatecc.ir.edit import Editor
from gatecc.ir.program import Program, origin
from gatecc.ir.site import Site
from gatecc.pipeline import prepare
from gatecc.scope.variant import Variant


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.gate = 3  # a name that is taken

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        return self.down(h) + x.mean()


X = torch.randn(2, 3, 4)


def opened(module: nn.Module | None = None) -> tuple[Program, Site]:
    """A canonical program of Net (or another) and its MLP site."""
    program = capture(module or Net(), (X,))
    return program, next(s for s in prepare(program).found if s.kind == "mlp")


def outcome(program: Program, x: Tensor = X) -> Tensor:
    program.graph.lint()
    return Variant(program, ())(program.module, [x])


def test_call_and_replace() -> None:
    program, site = opened()
    before = outcome(program)
    edit = Editor(program, site, "test")
    out = site.values["out"].node
    edit.replace(out, edit.call(torch.mul, out, 2.0))
    expected = before + program.module.get_submodule("down")(F.relu(program.module.get_submodule("up")(X)))
    assert torch.allclose(outcome(program), expected, atol=1e-6)
    other = torch.randn(5, 7, 4)
    down = program.module.get_submodule("down")(F.relu(program.module.get_submodule("up")(other)))
    expected = 2 * down + other.mean()
    assert torch.allclose(outcome(program, other), expected, atol=1e-6)
    assert {origin(n).inserted_by for n in edit.inserted} == {"test"}
    assert {origin(n).owner for n in edit.inserted} == {site.owner}


def test_a_source_that_comes_late_is_hoisted() -> None:
    program, site = opened()
    edit = Editor(program, site, "test")
    hidden = site.values["hidden"].node
    late = next(n for n in program.calls() if "mean" in str(n.target))
    assert late > hidden
    before = outcome(program)
    edit.replace(hidden, edit.call(_scaled, hidden, late))
    assert not torch.equal(outcome(program), before)


def _scaled(x: Tensor, by: Tensor) -> Tensor:
    return x * (1 + by)


def test_a_source_that_depends_on_the_value_is_refused() -> None:
    program, site = opened()
    edit = Editor(program, site, "test")
    new = edit.call(_by_mean, site.values["hidden"].node, program.outputs[0])
    with pytest.raises(GraphError, match="depends on the one it replaces"):
        edit.replace(site.values["hidden"].node, new)


def _by_mean(x: Tensor, y: Tensor) -> Tensor:
    return x * y.mean()


def test_new_modules_take_free_names_and_are_made_once() -> None:
    program, site = opened()
    edit = Editor(program, site, "test")
    made: list[nn.Module] = []

    def build() -> nn.Module:
        made.append(nn.Linear(4, 4))
        return made[-1]

    first, second = edit.module("gate", build), edit.module("gate", build)
    assert (first, second) == ("gate_1", "gate_2"), "the model's own attribute keeps its name"
    assert len(made) == 2
    again = Editor(program, site, "test", own=edit.own)
    assert again.module("gate", build) == first
    assert len(made) == 2, "a replay finds the module that it made before"


def test_a_container_never_gets_a_child() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    program, site = opened(model)
    edit = Editor(program, site, "test")
    path = edit.module("gate", lambda: nn.Linear(4, 4))
    assert path == "2.gate"
    assert len(model) == 3
    assert model(X).shape == X.shape
