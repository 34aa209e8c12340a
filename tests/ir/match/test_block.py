"""Block sites: the repeated unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.ir.match.found import Found, Lambda, find

X = torch.randn(2, 5, 6)


class Layer(nn.Module):
    def __init__(self, width: int = 6, out: int | None = None) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(width, width), nn.Linear(width, out or width)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x + self.f(x if other is None else other).relu()
        return self.g(x)


def check(found: Found, model: nn.Module, x: Tensor) -> None:
    """in and out of every block are what the module reads and yields."""
    for site in found.sites("block"):
        module = model.get_submodule(site.owner)
        torch.testing.assert_close(module(found.value(site, "in")), found.value(site, "out"))


def test_layers_of_a_sequential() -> None:
    model = nn.Sequential(*[Layer() for _ in range(3)])
    found = find(model, X)
    assert found.owners("block") == ["0", "1", "2"]
    assert found.axes(found.sites("block")[1]) == {"in": "bnc", "out": "bnc"}
    check(found, model, X)


def test_a_single_layer_is_no_block_unless_it_runs_again() -> None:
    assert not find(nn.Sequential(Layer(), nn.Linear(6, 6)), X).sites("block")

    def loop(m: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = m.get_submodule("layers.0")(x)
        return x

    model = Lambda(loop, layers=nn.ModuleList([Layer()]))
    found = find(model, X)
    assert [site.key for site in found.sites("block")] == ["layers.0#0", "layers.0#0@1", "layers.0#0@2"]
    assert [site.key for site in found.sites("residual")] == ["layers.0#0", "layers.0#0@1", "layers.0#0@2"]
    check(found, model, X)


def test_single_layers_are_no_blocks() -> None:
    normed = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()) for _ in range(2)])
    assert not find(normed, X).sites("block")
    assert not find(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()), X).sites("block")


def test_a_cross_reading_block_takes_the_stream() -> None:
    def decoder(m: nn.Module, x: Tensor, encoded: Tensor) -> Tensor:
        for i in range(2):
            x = m.get_submodule(f"layers.{i}")(x, encoded)
        return x

    def model(m: nn.Module, x: Tensor) -> Tensor:
        encoded = m.get_submodule("encoder")(x)
        return decoder(m, m.get_submodule("embed")(x), encoded)

    parts = dict(encoder=nn.Linear(6, 6), embed=nn.Linear(6, 6), layers=nn.ModuleList([Layer(), Layer()]))
    found = find(Lambda(model, **parts), X)
    first, second = found.sites("block")
    assert first.values["in"].node.meta["gatecc"].owner == "embed"
    assert second.values["in"].node is first.values["out"].node


def test_a_stage_that_changes_the_width_is_refused() -> None:
    found = find(nn.Sequential(Layer(6, 8), Layer(8, 8), Layer(8, 4)), X)
    assert found.owners("block") == ["1"]
    assert [(r.code, r.owner) for r in found.refusals("block")] == [("GCC170", "0"), ("GCC170", "2")]


def test_two_streams_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.f(y), y + self.g(x)

    def model(m: nn.Module, x: Tensor) -> Tensor:
        y = x.roll(1, 0)
        for i in range(2):
            x, y = m.get_submodule(f"layers.{i}")(x, y)
        return x + y

    found = find(Lambda(model, layers=nn.ModuleList([Two(), Two()])), X)
    assert not found.sites("block")
    assert found.codes("block") == ["GCC171"] * 2
