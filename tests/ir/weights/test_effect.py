"""Effects on weights: done, undone bitwise, and said as plain data."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gatecc.errors import ArgumentError, UnsupportedModelError
from gatecc.ir.weights import Drop, Effect, NewModule, ScaleWeight, Split, WidenWeight, effect_from_json, suspended
from gatecc.ir.weights.aside import aside_state, load_aside
from gatecc.ir.widen import Rows


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)


class Ledger:
    def __init__(self) -> None:
        self.own: set[str] = set()
        self.changes: list[Effect] = []


ROWS = Rows(2, 3, 1)
EFFECTS: dict[str, tuple[Effect, dict[str, int], str]] = {
    "new": (NewModule("extra", lambda: nn.Linear(2, 3)), {"extra.weight": 6, "extra.bias": 3}, "new extra"),
    "scale": (ScaleWeight("proj.weight", 2.0), {}, "scale proj.weight by 2"),
    "widen": (
        WidenWeight("proj.weight", ROWS, lambda: torch.ones(2, 4)),
        {"proj.weight": 8},
        "widen proj.weight: 2 times [3 rows | 1 rows of the gate]",
    ),
    "drop": (Drop("proj.bias"), {}, "drop proj.bias"),
    "drop a module": (Drop("proj"), {}, "drop proj"),
    "split": (
        Split("proj.weight", "parts", 1, (3, 1)),
        {"parts.0": 18, "parts.1": 6},
        "split proj.weight: axis 1 into parts of 3, 1",
    ),
}


@pytest.mark.parametrize("kind", EFFECTS)
def test_an_effect_is_undone_bitwise_in_a_model_too(kind: str) -> None:
    effect, made, text = EFFECTS[kind]
    model = nn.ModuleDict({"a": Layer()})
    before = copy.deepcopy(model.state_dict())
    assert effect.apply(model["a"]) == made
    changed = {**model.state_dict(), **aside_state(model)}
    assert model.state_dict().keys() != before.keys() or any(not torch.equal(before[n], t) for n, t in changed.items())
    placed = effect.placed("a")
    assert placed.path == f"a.{effect.path}"
    without = placed.before(dict(changed), {})
    assert without.keys() == before.keys()
    assert all(torch.equal(without[name], t) for name, t in before.items())
    written = json.loads(json.dumps(placed.to_json()))
    for record in (pickle.loads(pickle.dumps(placed)), effect_from_json(written)):
        again = copy.deepcopy(model)
        record.undo(again)
        assert list(again.state_dict()) == list(before)
        assert [name for name, _ in again.named_modules()] == ["", "a", "a.proj"]
        assert all(torch.equal(again.state_dict()[name], t) for name, t in before.items())
    assert effect.describe() == text


def test_what_is_written_tells_effects_apart() -> None:
    written = [effect.placed("a").to_json() for effect, _, _ in EFFECTS.values()]
    assert written == [
        ["NewModule", "a.extra"],
        ["ScaleWeight", "a.proj.weight", 2.0],
        ["WidenWeight", "a.proj.weight", [2, 3, 1]],
        ["Drop", "a.proj.bias"],
        ["Drop", "a.proj"],
        ["Split", "a.proj.weight", "a.parts", 1, [3, 1]],
    ]
    assert [effect_from_json(data).to_json() for data in written] == written
    with pytest.raises(ValueError, match="Melt"):
        effect_from_json(["Melt", "a.proj.weight"])


def test_a_scope_remembers_what_it_must() -> None:
    ledger = Ledger()
    for effect, _, _ in EFFECTS.values():
        effect.note(ledger)
    assert ledger.own == {"extra", "parts"}
    assert [type(effect) for effect in ledger.changes] == [ScaleWeight, WidenWeight, Drop, Drop, Split]
    pickle.dumps(ledger.changes)  # a scope is pickled with its module


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


@pytest.mark.parametrize("kind", [kind for kind in EFFECTS if kind != "scale"])
def test_the_own_forward_runs_as_it_was_for_a_while(kind: str) -> None:
    effect = EFFECTS[kind][0]
    layer = Layer()
    x = torch.randn(3, 4)
    expected = layer.proj(x)
    effect.apply(layer)
    changed = list(layer.state_dict())
    with suspended(layer, [effect]):
        assert torch.equal(layer.proj(x), expected)
    assert list(layer.state_dict()) == changed

    def fails() -> None:
        with suspended(layer, [effect]):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list(layer.state_dict()) == changed


def test_effects_on_one_weight_are_taken_back_in_reverse() -> None:
    layer = Layer()
    before = copy.deepcopy(layer.state_dict())
    effects = [EFFECTS["widen"][0], Split("proj.weight", "parts", 0, (2, 6)), Drop("parts.1")]
    for effect in effects:
        effect.apply(layer)
    assert [name for name, _ in layer.named_parameters()] == ["proj.bias", "parts.0"]
    with suspended(layer, effects):
        assert torch.equal(layer.proj.weight, before["proj.weight"])
    for effect in reversed(effects):
        effect.undo(layer)
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in before.items())


def test_what_is_dropped_moves_and_is_saved_with_the_layer() -> None:
    a, b = Layer(), Layer()
    model = nn.ModuleDict({"a": a, "b": b})
    expected = b.proj.weight.detach().double()
    for layer in model.children():
        Drop("proj").apply(layer)
    assert not list(model.parameters())
    assert not model.state_dict()
    kept = aside_state(model)
    assert sorted(kept) == ["a.proj.bias", "a.proj.weight", "b.proj.bias", "b.proj.weight"]
    filled = {name: torch.full_like(t, 2.0) for name, t in kept.items() if name.startswith("a.")}
    assert load_aside(model, {**kept, **filled, "c": torch.ones(1)}).keys() == {"c"}
    model.double().eval()
    for path in ("a.proj", "b.proj"):
        Drop(path).undo(model)
    assert torch.equal(b.proj.weight, expected)
    assert bool((a.proj.weight == 2).all())
    assert not a.proj.training


def test_a_buffer_that_no_state_dict_holds_comes_back_as_such() -> None:
    layer = Layer()
    layer.register_buffer("table", torch.ones(2), persistent=False)
    Drop("table").apply(layer)
    assert not dict(layer.named_buffers())
    assert not aside_state(layer)
    Drop("table").undo(layer)
    assert torch.equal(layer.get_buffer("table"), torch.ones(2))
    assert "table" not in layer.state_dict()


def test_the_parts_hold_what_was_trained() -> None:
    layer = Layer()
    effect = Split("proj.weight", "parts", 0, (2, 4))
    effect.prepare(layer)
    layer.proj.weight.data.mul_(2)  # by another effect, before this one is done
    expected = layer.proj.weight.detach().clone()
    effect.apply(layer)
    assert torch.equal(layer.get_parameter("parts.1"), expected[2:])
    layer.get_parameter("parts.0").data.add_(1)
    effect.undo(layer)
    assert torch.equal(layer.proj.weight, torch.cat([expected[:2] + 1, expected[2:]]))


def test_what_cannot_be_undone_is_told_before() -> None:
    model = nn.ModuleDict({"a": Layer()})
    effect = Drop("proj.bias")
    effect.apply(model["a"])
    effect.placed("a").check(model)
    model["a"] = Layer()
    with pytest.raises(UnsupportedModelError, match=r"a\.proj\.bias"):
        effect.placed("a").check(model)
    with pytest.raises(UnsupportedModelError, match=r"parts\.0"):
        Split("proj.weight", "parts", 0, (2, 4)).check(nn.ModuleDict({"parts": nn.ParameterDict()}))
