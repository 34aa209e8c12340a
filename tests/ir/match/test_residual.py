"""Residual sites: which of the two summands is the skip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ir.match.found import Found, Lambda, find

NORM, F1, F2 = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
SCALE = nn.Parameter(torch.randn(6))


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.f(x)
    h += x
    return h


JOINS = {
    "pre-norm": lambda m, x: x + m.f(m.norm(x)),
    "post-norm": lambda m, x: m.norm(m.f(x) + x),
    "layer scale": lambda m, x: x + m.scale * m.f(x),
    "dropped": lambda m, x: x + nn.functional.dropout(m.f(x), 0.1, m.training),
    "in place": in_place,
    "scaled skip": lambda m, x: 0.5 * x + m.f(x),
    "subtracted norm": lambda m, x: x + m.f(m.norm(x) - x),
    "pooled": lambda m, x: x + nn.functional.avg_pool1d(m.norm(x).mT, 3, 1, 1).mT,
}


def check(found: Found) -> None:
    for site in found.sites("residual"):
        torch.testing.assert_close(found.value(site, "skip") + found.value(site, "branch"), found.value(site, "out"))


@pytest.mark.parametrize("name", [name for name in JOINS if name != "scaled skip"])
def test_one_join(name: str) -> None:
    x = torch.randn(2, 5, 6)
    found = find(Lambda(JOINS[name], f=F1, norm=NORM, scale=SCALE), x)
    (site,) = found.sites("residual")
    torch.testing.assert_close(found.value(site, "skip"), x)
    assert found.axes(site) == {"skip": "bnc", "branch": "bnc", "out": "bnc"}
    assert not found.sites("merge")
    check(found)


def test_the_longer_skip_holds_the_shorter() -> None:
    def nested(m: Any, x: Tensor) -> Tensor:
        h = x + m.f(x)
        return x + m.g(h)

    found = find(Lambda(nested, f=F1, g=F2), torch.randn(2, 5, 6))
    assert len(found.sites("residual")) == 2
    check(found)


def test_parallel_branches_are_one_merge_and_one_residual() -> None:
    found = find(Lambda(lambda m, x: x + (m.f(x) + m.g(x).relu()), f=F1, g=F2), torch.randn(2, 5, 6))
    (residual,), (merge,) = found.sites("residual"), found.sites("merge")
    assert residual.values["branch"].node is merge.values["out"].node
    check(found)


class Bottleneck(nn.Module):
    """A ResNet block whose skip is projected."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1))
        self.down = nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.down(x)


def test_a_projection_shortcut_is_the_skip() -> None:
    found = find(nn.Sequential(nn.Conv2d(3, 4, 1), Bottleneck()), torch.randn(2, 3, 8, 8))
    (site,) = found.sites("residual")
    torch.testing.assert_close(found.value(site, "skip"), found.tensors[site.values["skip"].node])
    assert "down" in str(site.values["skip"].node.meta["gatecc"].owner)
    assert (site.owner, site.values["branch"].axes) == ("1", "bcyx")
    check(found)


def test_two_linears_side_by_side_are_no_shortcut() -> None:
    found = find(Lambda(lambda m, x: m.f(x) + m.g(x), f=F1, g=F2), torch.randn(2, 5, 6))
    assert not found.sites("residual")
    assert len(found.sites("merge")) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.f(x) + m.scale,  # a bias
        lambda m, x: x + 0.044715 * x.pow(3),  # half a GELU
        lambda m, x: x + 1.0,
        lambda m, x: x + x.mean(-1, keepdim=True),
    ],
)
def test_adds_that_join_nothing(function: Any) -> None:
    found = find(Lambda(function, f=F1, scale=SCALE), torch.randn(2, 5, 6))
    assert not found.sites("residual")
    assert not found.sites("merge")


def test_rotary_is_neither_residual_nor_merge() -> None:
    def rotary(m: Any, x: Tensor) -> Tensor:
        q = m.f(x)
        half = torch.cat((-q[..., 3:], q[..., :3]), -1)
        at = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return q * at.cos() + half * at.sin()

    found = find(Lambda(rotary, f=F1), torch.randn(2, 5, 6))
    assert not found.sites("residual")
    assert not found.sites("merge")
    assert not found.refusals("merge")


def test_the_skip_that_is_an_input_is_named_like_its_branch() -> None:
    """An input says nothing of its layout: images with the channels last, and signals with the channels second."""
    norm, f = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    images = torch.randn(2, 4, 5, 6)
    for join in (lambda m, x: x + m.f(m.norm(x)), lambda m, x: x + m.norm(m.f(x))):
        found = find(Lambda(join, f=f, norm=norm), images)
        assert set(found.axes(found.sites("residual")[0]).values()) == {"byxc"}
        assert set(found.axes(found.sites("mlp")[0]).values()) == {"byxc"}
    conv = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3, padding=1))
    found = find(Lambda(lambda m, x: x + m.f(x), f=conv), torch.randn(2, 6, 7))
    assert set(found.axes(found.sites("residual")[0]).values()) == {"bcn"}
    assert {axes for site in found.sites("conv") for axes in found.axes(site).values()} == {"bcn"}
