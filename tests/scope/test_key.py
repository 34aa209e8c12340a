"""A variant is used for calls alone whose graph it is: casts, other weights, settings and tables make another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gatecc
from gatecc.capture.reads import Read
from gatecc.scope.family import OF_ONE_KIND, Entry, Family
from gatecc.scope.refusals import LIMIT, SIZES, Refusals
from gatecc.scope.state import scopes

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    """A tuple that holds a tensor."""

    first: Tensor
    second: float


class Odd:
    """An object that cannot be compared."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Slots:
    """An object without a ``__dict__``."""

    __slots__ = ("shift",)

    def __init__(self) -> None:
        self.shift = 0.5


@dataclass(frozen=True)
class Settings:
    """As a configuration object; frozen, but what it holds is not."""

    scale: list[float] = field(default_factory=lambda: [2.0])
    more: Any = field(default_factory=lambda: SimpleNamespace(shift=0.5))
    slots: Slots = field(default_factory=Slots)


class Layer(nn.Module):
    """A feed-forward network that reads values of many kinds besides its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()
        self.settings: Any = Settings()
        self.tables: dict[str, Any] = {"a": torch.ones(8), "b": [torch.ones(8)]}
        self.pair = Pair(torch.ones(8), 1.0)
        self.odd = Odd(1.0)
        self.array = numpy.ones(8, dtype=numpy.float32)
        self.filled: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.filled:
            self.filled["bias"] = self.down.bias * 2
        y = self.down(self.act(self.up(x))) * self.settings.scale[0] + self.settings.more.shift
        y = y + self.settings.slots.shift
        y = y + (self.tables["a"] + self.tables["b"][0] + self.pair.first).to(y) * self.pair.second
        y = y * self.odd.value + torch.from_numpy(self.array).to(y) + torch.ones(8) / 3
        return y + self.filled["bias"].detach()


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()).eval()


GATE = gatecc.Gate(gatecc.MLP[...].out, gatecc.GateSpec("in"))


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Layer)]


def _each(change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    def all_layers(model: nn.Module) -> None:
        for layer in _layers(model):
            change(layer)

    return all_layers


def _wider(model: nn.Module) -> None:
    state = {n: t.repeat(2, *[1] * (t.dim() - 1)) if ".up." in n else t for n, t in model.state_dict().items()}
    state |= {n: t.repeat(1, 2) for n, t in state.items() if n.endswith("down.weight")}
    for name, tensor in state.items():
        holder, _, leaf = name.rpartition(".")
        model.get_submodule(holder).register_parameter(leaf, nn.Parameter(tensor))


def _recast(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.double()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda model: None,
    "a list in a frozen setting": _each(lambda m: m.settings.scale.__setitem__(0, 3.0)),
    "a nested setting": _each(lambda m: setattr(m.settings.more, "shift", -1.0)),
    "an attribute in a slot": _each(lambda m: setattr(m.settings.slots, "shift", 2.0)),
    "other settings": _each(lambda m: setattr(m, "settings", Settings([5.0]))),
    "an entry of a dict": _each(lambda m: m.tables.__setitem__("a", torch.full((8,), 3.0))),
    "an entry in place": _each(lambda m: m.tables["b"][0].add_(1)),
    "a named tuple": _each(lambda m: setattr(m, "pair", Pair(torch.zeros(8), 2.0))),
    "an object without ==": _each(lambda m: setattr(m.odd, "value", 2.0)),
    "another such object": _each(lambda m: setattr(m, "odd", Odd(0.5))),
    "an array in place": _each(lambda m: m.array.__setitem__(0, 7.0)),
    "wider weights": _wider,
    "float64": lambda model: model.double(),
    "back": lambda model: model.float(),
    "a child": lambda model: _layers(model)[1].to(torch.float64),
    "all data": _recast,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.half(),
}


def _run(model: nn.Module) -> Tensor:
    for layer in _layers(model):
        layer.filled.clear()
    x: Tensor = X
    for layer in model.children():  # a child may be in a dtype of its own
        x = layer(x.to(next(layer.parameters()).dtype))
    return x


def test_what_changes_the_plain_model_changes_the_rewritten_one_alike() -> None:
    """One model goes through all changes; its gates are the identity, so the plain one says what is right."""
    plain = _net()
    gated = gatecc.transform(_net(), GATE, (X,))
    for name, change in CHANGES.items():
        change(plain)
        change(gated)
        got, want = _run(gated), _run(plain)
        assert got.dtype == want.dtype, name
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def test_a_capture_leaves_no_fake_tensors_in_what_a_forward_fills() -> None:
    plain = _net()
    gatecc.inspect(plain, (X,))
    assert [layer.filled for layer in _layers(plain)] == [{}, {}]


def test_what_was_not_read_and_what_comes_back_makes_no_capture() -> None:
    gated = gatecc.transform(_net(), GATE, (X,))

    def captures() -> int:
        families = {id(state.family): state.family for _, _, state in scopes(gated)}
        return sum(len(entries) for family in families.values() for entries in family.entries.values())

    _run(gated)
    before = captures()
    for layer in _layers(gated):
        layer.odd.unused = 2
        layer.unknown = [torch.ones(1)]
    _run(gated)
    assert captures() == before
    for shift in (1.0, 0.5):
        for layer in _layers(gated):
            layer.settings.more.shift = shift
        _run(gated)
    more = captures()
    assert more > before
    gated.double()(X.double())
    gated.float()(X)
    torch.manual_seed(1)
    gated(X + 1)
    assert captures() > more
    again = captures()
    _run(gated)
    assert captures() == again


def test_defaults_of_torch_that_a_forward_uses() -> None:
    class Defaults(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.act(self.up(x)))
            return y + torch.ones(()).to("cpu" if torch.get_default_device().type == "meta" else y.device) / 3

    torch.manual_seed(0)
    plain = nn.Sequential(Defaults()).double().eval()
    gated = gatecc.transform(plain, GATE, (X.double(),))
    single = gated(X.double())
    torch.set_default_dtype(torch.float64)
    try:
        got, want = gated(X.double()), plain(X.double())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert not torch.equal(got, single)


def test_functional_call_with_weights_of_another_dtype() -> None:
    plain = _net()
    gated = gatecc.transform(plain, GATE, (X,))
    weights = {n: p.detach().double() for n, p in gated.named_parameters()}
    got = functional_call(gated, weights, (X.double(),))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, plain.double()(X.double()))


def test_tied_weights_that_come_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.GELU()
            self.down.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    plain = nn.Sequential(Tied())
    gated = gatecc.transform(plain, GATE, (X,))
    for model in (plain, gated):
        weight = model.get_parameter("0.up.weight")
        model.get_submodule("0.down").register_parameter("weight", nn.Parameter(weight.detach().mT.clone()))
    torch.testing.assert_close(gated(X), plain(X))


def test_captures_of_one_kind_are_bounded_with_a_note() -> None:
    entries: list[Any] = [Entry(SimpleNamespace(), SimpleNamespace()) for _ in range(OF_ONE_KIND + 1)]  # pyright: ignore[reportArgumentType]
    family = Family()
    for entry in entries[:-1]:
        family.add(("kind",), entry)
    with pytest.warns(UserWarning, match="the oldest capture is dropped"):
        family.add(("kind",), entries[-1])
    assert not family.holds(entries[0])
    assert all(family.holds(entry) for entry in entries[1:])


def test_refused_calls_are_tried_again_where_the_reason_may_go() -> None:
    module = nn.Module()
    flag = [1]
    vars(module)["flag"] = flag
    refusals = Refusals()
    refusals.add(("kind",), [X], (Read.of("", "flag", flag),), "because")
    assert refusals.find(("kind",), [X], module) == "because"
    assert refusals.find(("other",), [X], module) is None
    assert refusals.find(("kind",), [X[:1]], module) is None, "other sizes are tried"
    flag[0] = 2
    assert refusals.find(("kind",), [X], module) is None
    for n in range(SIZES):
        refusals.add(("kind",), [torch.ones(n + 2)], (), "always")
    assert refusals.find(("kind",), [torch.ones(99)], module) == "always"
    for n in range(2 * LIMIT):
        refusals.add((n,), [X], (), "so")
    assert len(refusals) == LIMIT
