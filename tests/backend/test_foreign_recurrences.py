"""Recurrences of others whose gates are not decays: negative, growing, squashed in the loop. Left alone, or exact.

Each is written as a loop over tokens with a gate that may be any number, and compared in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc import backend
from gatecc.capture import capture
from gatecc.passes.causal.bounds import INF, Bounds
from gatecc.passes.causal.formula import NEAREST, NEGATIVE
from gatecc.passes.lower import Outcome
from gatecc.pipeline import canonical_form

H, D, N = 2, 4, 8
Gate = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    return x


class TokenLoop(nn.Module):
    """x: (B, 8, 8). S_t = late(early(gate)_t) S_(t-1) + k_t v_t, with one gate per head; with ``delta`` the gate is the
    strength of a delta rule on normalised keys."""

    def __init__(self, early: Gate = as_it_is, late: Gate = as_it_is, *, delta: bool = False) -> None:
        super().__init__()
        self.qkvg = nn.Linear(8, H * (3 * D + 1))
        self.early, self.late, self.delta = early, late, delta

    def forward(self, x: Tensor) -> Tensor:
        *heads, gate = self.qkvg(x).split([H * D] * 3 + [H], -1)
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in heads)
        k, gate = F.normalize(k, dim=-1) if self.delta else k, self.early(gate.transpose(1, 2))
        state = q.new_zeros(len(x), H, D, D)
        found: list[Tensor] = []
        for t in range(x.size(1)):
            key, value, g = k[:, :, t, :, None], v[:, :, t, None], self.late(gate[:, :, t, None, None])
            if self.delta:
                state = state + key * (g * (value - (key * state).sum(-2, keepdim=True)))
            else:
                state = state * g + key * value
            found.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(found, 2)


def outcome(model: nn.Module, *, training: bool = False) -> Outcome:
    """What is said of it; the lowered graph gives the same numbers, and gradients, for small gates and large ones."""
    said: list[Outcome] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        lowered = backend.lower(graph_module, example)
        assert not lowered.faults
        said.extend(o for o in lowered.outcomes if o.lowering == "linear-attention")
        return lowered.graph.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    for p in model.double().parameters():
        nn.init.normal_(p, std=0.4)
    compiled = torch.compile(model, backend=spy, fullgraph=True)
    with torch.set_grad_enabled(training):
        for size in (0.5, 3.0, 30.0):
            x = size * torch.randn(2, N, 8, dtype=torch.float64)
            x.requires_grad_(training)
            found, expected = compiled(x), model(x)
            scale = expected.detach().abs().max()
            torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-10)
            if training:
                found, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (found, expected))
                scale = expected.abs().max()
                torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-9)
    (one,) = said
    return one


LOWERED: dict[str, nn.Module] = {
    "one minus sigmoid": TokenLoop(lambda g: 1 - g.sigmoid(), lambda g: g.clamp(max=1)),
    "zero for negative numbers": TokenLoop(torch.relu),
    "any strength": TokenLoop(delta=True),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowered_exactly(name: str) -> None:
    """In training: where a gate is zero, too, the gradients are finite."""
    one = outcome(LOWERED[name], training=True)
    assert one.became == "gatecc::linear_attention", one


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TokenLoop(), NEGATIVE),
        (TokenLoop(as_it_is, torch.abs), NEGATIVE),
        (TokenLoop(F.softplus, lambda g: g.clamp(max=1)), NEAREST),
        (TokenLoop(as_it_is, lambda g: g.clamp(max=0).exp()), NEAREST),
        (TokenLoop(as_it_is, lambda g: g.clamp(max=1), delta=True), NEAREST),
    ],
)
def test_left_alone(model: nn.Module, reason: str) -> None:
    one = outcome(model)
    assert not one.became
    assert one.reason.startswith(reason), one.reason


class Bounded(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        s, written = x.sigmoid(), x.sigmoid()
        written[0].mul_(-1)
        kept = torch.exp(-torch.exp(x) * F.softplus(x)).to(torch.float32)[:, None]
        joined, least = torch.cat([s, x.clamp(0.5, 3)]), torch.minimum(x, torch.tensor(2.0)).clamp_min(-1)
        return (
            1 - s,
            2 * s - 1,
            kept.log(),
            kept,
            s.masked_fill(mask, -0.5),
            joined,
            least,
            s / 2 + 1,
            x * x,
            x + s,
            written,
        )


def test_bounds() -> None:
    program = canonical_form(capture(Bounded(), (torch.randn(3), torch.ones(3) > 0)))
    bounds = Bounds(program)
    results: Any = program.graph.output_node().args[0]
    assert [bounds.of(node) for node in results] == [
        (0, 1), (-1, 1), (-INF, 0), (0, 1), (-0.5, 1), (0, 3), (-1, 2), (1, 1.5), (0, INF), (-INF, INF), (-INF, INF),
    ]  # fmt: skip
