"""Layers that are built alike are proved once, and none is taken for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc import backend
from gatecc.backend.options import Options
from gatecc.passes.causal import remembered
from gatecc.passes.lower import Outcome, linear_attention

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with each proof."""
    made: list[int] = []
    find = linear_attention.find_formula

    def counted(*args: object) -> object:
        made.append(1)
        return find(*args)  # pyright: ignore[reportArgumentType]  as they were given

    remembered.forget()
    monkeypatch.setattr(linear_attention, "find_formula", counted)
    yield made
    remembered.forget()


class Layer(nn.Module):
    """x + the mixing of its tokens. x: (B, N, 8); ``rate``: a buffer, one number per head."""

    rate: Tensor

    def __init__(self, mixing: Spelling, rate: float = -0.1) -> None:
        super().__init__()
        self.mixing, self.enter, self.leave = mixing, nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("rate", torch.tensor([rate, 2 * rate]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.enter(F.layer_norm(x, (8,))).chunk(3, -1)
        )
        return x + self.leave(self.mixing(q, k, v, self.rate).transpose(1, 2).flatten(2))


def masked(diagonal: int = 0) -> Spelling:
    return lambda q, k, v, rate: (q @ k.transpose(-1, -2)).tril(diagonal) @ v


def decayed(base: float) -> Spelling:
    """Powers of a number that stands in the graph."""

    def mixing(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        place = torch.arange(q.size(2))
        distance = place[:, None] - place
        weights = torch.where(distance >= 0, base ** distance.clamp_min(0).to(q.dtype), 0.0)
        return (q @ k.transpose(-1, -2) * weights) @ v

    return mixing


def with_rates(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """Queries times numbers that a buffer holds."""
    return ((q * rate[:, None, None]) @ k.transpose(-1, -2)).tril() @ v


def listed(numbers: list[float]) -> Spelling:
    """Decays of a tensor that is made in the graph."""

    def mixing(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        place = torch.arange(q.size(2))
        distance = place[:, None] - place
        decay = torch.tensor(numbers)[:, None, None]
        weights = torch.where(distance >= 0, (decay * distance.clamp_min(0)).exp(), 0.0)
        return (q @ k.transpose(-1, -2) * weights.to(q.dtype)) @ v

    return mixing


def lowered(*layers: nn.Module, tokens: int = 9) -> list[Outcome]:
    """What is said of the layers, one after the other; what they compute is compared."""
    torch.manual_seed(0)
    model, outcomes = nn.Sequential(*layers).double(), list[Outcome]()
    x = torch.randn(2, tokens, 8, dtype=torch.float64)

    def spy(graph_module: torch.fx.GraphModule, example: list[object]) -> Callable[..., object]:
        found = backend.lower(graph_module, example, Options(lowerings=("linear-attention",)))
        assert not found.faults
        outcomes.extend(found.outcomes)
        return found.graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y, expected = torch.compile(model, backend=spy, dynamic=False)(x), model(x)
    assert (y - expected).abs().max() < 1e-6 * expected.abs().max()
    return outcomes


@pytest.mark.parametrize(("mixing", "lowers"), [(masked(), True), (masked(-1), False), (with_rates, True)])
def test_layers_that_are_built_alike_are_proved_once(mixing: Spelling, lowers: bool, proofs: list[int]) -> None:
    """And the same layers of another graph not again; of another length they are."""
    first = lowered(Layer(mixing))
    once = len(proofs)
    assert once > 0
    several = lowered(Layer(mixing), Layer(mixing, -0.2), Layer(mixing))
    assert len(proofs) == once
    assert [bool(o.became) for o in [*first, *several]] == [lowers] * 4
    assert len({o.place for o in several}) == 3
    assert {o.reason for o in several} == {first[0].reason}
    lowered(Layer(mixing), tokens=7)
    assert len(proofs) == 2 * once


@pytest.mark.parametrize(
    ("one", "other", "lowers"),
    [
        (masked(), masked(-1), [True, False]),
        (masked(1), masked(), [False, True]),
        (decayed(0.9), decayed(0.8), [True, True]),
        (listed([-0.1, -0.2]), listed([-0.1, -0.3]), [True, True]),
        (masked(), with_rates, [True, True]),
    ],
)
def test_layers_that_differ_in_a_constant_are_not_confused(
    one: Spelling, other: Spelling, lowers: list[bool], proofs: list[int]
) -> None:
    outcomes = lowered(Layer(one), Layer(other), Layer(one))
    found = {o.place: bool(o.became) for o in outcomes}
    assert [found.get(str(place), False) for place in range(3)] == [*lowers, lowers[0]]
    assert len(proofs) >= 2
