"""Hashing: fixed experts of ids and cells, and the learned grid of points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.choice import Choice
from gatecc.ir.gates.hashing import hashed
from gatecc.ir.gates.layout import Features
from gatecc.ir.gates.scorer import Scorer


def scores(text: str, x: torch.Tensor, features: int) -> torch.Tensor:
    return Scorer.parse(text)(Features(x, "bn"), {}, features).x


def test_a_token_id_has_one_expert_of_weight_one() -> None:
    ids = torch.randint(0, 50_000, (2, 4000, 1))
    z = scores("hash", ids, 8)
    weights, indices = Choice.parse("softmax_topk(1)")(z.flatten(0, 1), {}, True)
    assert (weights == 1).all()
    assert torch.equal(indices[:, 0], hashed(ids.view(-1, 1), 8, 0))
    assert torch.equal(scores("hash", ids, 8), z)
    share = torch.bincount(indices[:, 0], minlength=8) / 8000
    assert share.min() > 0.10
    assert share.max() < 0.15
    assert (scores("hash(seed=1)", ids, 8).argmax(-1) != z.argmax(-1)).float().mean() > 0.8


@given(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32), st.sampled_from([0.25, 1.0, 3.0]))
def test_values_of_one_cell_share_an_expert(a: float, b: float, cell: float) -> None:
    x = torch.tensor([[[a, b]]])
    inside = (torch.floor(x / cell) + torch.tensor([0.25, 0.75])) * cell
    assert torch.equal(scores(f"hash(cell={cell})", x, 5), scores(f"hash(cell={cell})", inside, 5))


def test_more_experts_are_the_next_in_the_circle() -> None:
    z = scores("hash", torch.tensor([[[7]]]), 4).view(-1)
    h = int(hashed(torch.tensor([7]), 4, 0))
    assert [-float(z[(h + i) % 4]) for i in range(4)] == [0, 1, 2, 3]


def test_a_grid_interpolates_between_its_corners() -> None:
    torch.manual_seed(0)
    scorer = Scorer.parse("hash_grid(levels=1, size=64, features=2, resolution=1.0)")
    shapes = scorer.shapes(2, 3, "bn")
    params = {name: torch.randn(size) for name, size in shapes.items()}

    def at(x: float, y: float) -> torch.Tensor:
        return scorer(Features(torch.tensor([[[x, y]]]), "bn"), params, 3).x

    corners = [params["table"][hashed(torch.tensor([x, y]), 64, 0)] for x in (3, 4) for y in (-1, 0)]
    weights = [0.75 * 0.5, 0.75 * 0.5, 0.25 * 0.5, 0.25 * 0.5]
    h = sum(w * c for w, c in zip(weights, corners, strict=True))
    torch.testing.assert_close(at(3.25, -0.5).view(-1), params["weight"] @ h + params["bias"])
    torch.testing.assert_close(at(4.0, 0.0), at(4.0 - 1e-6, -1e-6), rtol=1e-4, atol=1e-4)  # continuous


def test_a_grid_is_for_points() -> None:
    with pytest.raises(ArgumentError, match="5 channels"):
        Scorer.parse("hash_grid").shapes(5, 3, "bn")


def test_the_scorers_are_known_to_gates() -> None:
    assert GateSpec.parse("in, hash_grid, expert, linear, init=zero").scorer.tag == "hash_grid"
