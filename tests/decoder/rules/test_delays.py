"""Delays in all spellings keep the values of so many tokens before; what looks ahead is refused by node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import gatecc
from gatecc.decoder.rules.delays import Shifted
from gatecc.errors import DecoderError
from tests.decoder.mixing import D, Mixed, V
from tests.decoder.stepping import difference, full, stepped

Move = Callable[[Tensor], Tensor]
DELAYS: dict[str, tuple[Move, list[int]]] = {
    "padded, cut to the length": (lambda x: F.pad(x, (0, 0, 3, 0))[:, : x.shape[1]], [3]),
    "padded, cut by a number": (lambda x: F.pad(x, (0, 0, 3, 0))[:, :-3], [3]),
    "narrowed": (lambda x: F.pad(x, (0, 0, 3, 0)).narrow(1, 0, x.shape[1]), [3]),
    "a padding that cuts": (nn.ZeroPad2d((0, 0, 1, -1)), [1]),
    "zeros before": (lambda x: torch.cat([torch.zeros(x.shape[0], 2, D), x[:, :-2]], 1), [2]),
    "zeros before, then cut": (lambda x: torch.cat([x.new_zeros(x.shape[0], 2, D), x], 1)[:, :-2], [2]),
    "another constant": (lambda x: F.pad(x, (0, 0, 3, 0), value=0.5)[:, :-3], [3]),
    "along the last axis": (lambda x: F.pad(x.mT, (2, 0))[..., : x.shape[1]].mT, [2]),
    "twice": (lambda x: nn.ZeroPad2d((0, 0, 1, -1))(nn.ZeroPad2d((0, 0, 1, -1))(x)), [1, 1]),
    "all taps of a convolution": (lambda x: sum_of_taps(F.pad(x, (0, 0, 2, 0)), x.shape[1]), [2, 1]),
}


def sum_of_taps(x: Tensor, length: int) -> Tensor:
    return x[:, :length] + 2 * x[:, 1 : length + 1] + 3 * x[:, 2 : length + 2]


class Moved(nn.Module):
    """Every way of moving x, weighed differently."""

    def __init__(self, *moves: Move) -> None:
        super().__init__()
        self.moves = moves

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        total = torch.zeros_like(x)
        for i, move in enumerate(self.moves):
            total = total + (i + 1) * move(x)
        return total


def test_every_spelling_of_a_delay() -> None:
    model = Mixed(Moved(*(move for move, _ in DELAYS.values()))).eval()
    made = gatecc.decoder(model, (torch.randint(V, (2, 16)),))
    assert [slot.kind for slot in made.plan.slots] == ["taps"] * len(made.plan.slots)
    assert [slot.count for slot in made.plan.slots] == [count for _, counts in DELAYS.values() for count in counts]
    ids = torch.randint(V, (3, 16))
    assert difference(full(model, ids), stepped(made, ids)) <= 1e-5
    assert difference(full(model, ids), stepped(made, ids, (1, 1, 1, 2, 11))) <= 1e-5


@pytest.mark.parametrize(
    ("move", "culprit"),
    [
        (lambda x: F.pad(x, (0, 0, 0, 1))[:, 1:], "pad"),
        (nn.ZeroPad2d((0, 0, -1, 1)), "pad"),
        (lambda x: F.pad(x[:, 1:], (0, 0, 1, 0)), "slice"),
        (lambda x: F.pad(x.mT, (2, 0), mode="reflect")[..., :-2].mT, "pad"),
    ],
    ids=["ahead", "ahead in one", "a hole", "a mirror"],
)
def test_what_is_no_delay_is_refused_by_node(move: Move, culprit: str) -> None:
    with pytest.raises(DecoderError, match=f"mixes positions(.|\n)*{culprit}"):
        gatecc.decoder(Mixed(Moved(move)).eval(), (torch.randint(V, (2, 16)),))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), max_size=6))
def test_padding_and_cutting_in_any_order(steps: list[tuple[bool, int, int]]) -> None:
    x = torch.arange(1.0, 41.0)
    found: Shifted | None = Shifted(fx.Graph().placeholder("x"))
    for pads, front, back in steps:
        assert found is not None
        found = found.pad(front, back, 0.0) if pads else found.cut(front, back)
        x = F.pad(x, (front, back)) if pads else x[front : len(x) - back]
    assert found is not None
    first, last = found.lost
    kept = F.pad(torch.arange(1.0, 41.0)[first : 40 - last], (found.front, found.back))
    assert torch.equal(kept, x)


def test_constants_of_two_kinds_are_no_delay() -> None:
    start = Shifted(fx.Graph().placeholder("x"))
    once = start.pad(1, 0, 0.0)
    assert once is not None
    assert once.pad(1, 0, 1.0) is None
    assert once.cut(1, 0).pad(1, 1, 1.0) is not None
