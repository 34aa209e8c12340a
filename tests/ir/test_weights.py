"""Effects on weights: done, undone bitwise, and said as plain data."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gatecc.errors import ArgumentError
from gatecc.ir.weights import Effect, NewModule, ScaleWeight, WidenWeight
from gatecc.ir.widen import Rows


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)


class Ledger:
    def __init__(self) -> None:
        self.own: set[str] = set()
        self.widened: dict[str, Rows] = {}


ROWS = Rows(2, 3, 1)
EFFECTS: dict[str, tuple[Effect, dict[str, int], str]] = {
    "new": (NewModule("extra", lambda: nn.Linear(2, 3)), {"extra.weight": 6, "extra.bias": 3}, "new extra"),
    "scale": (ScaleWeight("proj.weight", 2.0), {}, "scale proj.weight by 2"),
    "widen": (
        WidenWeight("proj.weight", ROWS, lambda: torch.ones(2, 4)),
        {"proj.weight": 8},
        "widen proj.weight: 2 times [3 rows | 1 rows of the gate]",
    ),
}


@pytest.mark.parametrize("kind", EFFECTS)
def test_an_effect_is_undone_bitwise_in_a_model_too(kind: str) -> None:
    effect, made, text = EFFECTS[kind]
    model = nn.ModuleDict({"a": Layer()})
    before = copy.deepcopy(model.state_dict())
    assert effect.apply(model["a"]) == made
    changed = model.state_dict()
    assert not all(name in before and torch.equal(before[name], t) for name, t in changed.items())
    placed = effect.placed("a")
    assert placed.path == f"a.{effect.path}"
    without = placed.before(dict(changed), {})
    assert without.keys() == before.keys()
    assert all(torch.equal(without[name], t) for name, t in before.items())
    pickle.loads(pickle.dumps(placed)).undo(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert effect.describe() == text


def test_what_is_written_tells_effects_apart() -> None:
    written = [effect.placed("a").to_json() for effect, _, _ in EFFECTS.values()]
    assert written == [
        ["NewModule", "a.extra"],
        ["ScaleWeight", "a.proj.weight", 2.0],
        ["WidenWeight", "a.proj.weight", [2, 3, 1]],
    ]


def test_a_scope_remembers_what_it_must() -> None:
    ledger = Ledger()
    for effect, _, _ in EFFECTS.values():
        effect.note(ledger)
    assert ledger.own == {"extra"}
    assert ledger.widened == {"proj.weight": ROWS}


def test_a_module_that_is_there_stays() -> None:
    layer = Layer()
    NewModule("extra", lambda: nn.Linear(2, 3)).apply(layer)
    first = layer.get_submodule("extra")
    NewModule("extra", lambda: nn.Linear(2, 3)).apply(layer)
    assert layer.get_submodule("extra") is first


def test_each_layer_fills_from_its_own_weights_and_follows_its_mode() -> None:
    def fill(new: Any, layer: nn.Module) -> None:
        new.weight.copy_(layer.get_parameter("proj.weight")[:3, :2])

    effect = NewModule("extra", lambda: nn.Linear(2, 3), fill)
    for layer in (Layer(), Layer().eval()):
        effect.apply(layer)
        new = layer.get_submodule("extra")
        assert torch.equal(new.get_parameter("weight"), layer.get_parameter("proj.weight")[:3, :2])
        assert new.get_parameter("weight").requires_grad
        assert new.training == layer.training


def test_memory_of_the_layer_is_refused_and_a_tie_is_taken() -> None:
    layer = Layer()

    def view() -> nn.Module:
        made = nn.Linear(4, 6)
        made.weight = nn.Parameter(layer.proj.weight.data)
        return made

    def tied() -> nn.Module:
        made = nn.Linear(4, 6)
        made.weight = layer.proj.weight
        return made

    with pytest.raises(ArgumentError, match=r"proj\.weight"):
        NewModule("extra", view).apply(layer)
    NewModule("extra", tied).apply(layer)
    assert layer.get_parameter("extra.weight") is layer.proj.weight


def test_a_builder_makes_a_module() -> None:
    with pytest.raises(ArgumentError, match="something else"):
        NewModule("extra", lambda: torch.zeros(2)).apply(Layer())  # pyright: ignore[reportArgumentType]
