"""Experts and recurrences of others that random numbers of usual size do not tell from what the operators compute.

Capacities that drop tokens at other lengths, thresholds far out, dropout, gradients that are stopped: left alone with a
reason. Each is compared in float64, at the example's size and at another one, with free sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc import backend
from gatecc.passes.lower import Outcome

D, H, E, K = 8, 10, 3, 2
Hidden = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    return x


class Mixture(nn.Module):
    """x: (B, N, 8) through 2 of 3 gated experts in stacks, all of which see all tokens. ``room``: what an expert takes
    of so many tokens; ``hidden``: what happens between its products; ``result``: to the sum."""

    def __init__(
        self, hidden: Hidden = as_it_is, room: Callable[[int], float] | None = None, result: Hidden = as_it_is
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * H, D))
        self.down = nn.Parameter(torch.randn(E, D, H))
        self.hidden, self.room, self.result = hidden, room, result

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, indices = self.gate(rows).softmax(-1).topk(K, -1)
        share = torch.einsum("tke,tk->te", F.one_hot(indices, E).to(x.dtype), weights)
        y = torch.zeros_like(rows)
        for e in range(E):
            taken = share[:, e]
            if self.room is not None:
                taken = taken * ((indices == e).sum(-1).cumsum(0) <= self.room(rows.size(0)))
            gate, up = F.linear(rows, self.up[e]).chunk(2, -1)
            y = y + taken[:, None] * F.linear(self.hidden(F.silu(gate) * up), self.down[e])
        return self.result(y).view(x.shape)


class Listed(nn.Module):
    """The same with experts that are modules of a list, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.5), nn.Linear(H, D)) for _ in range(E)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, indices = self.gate(rows).softmax(-1).topk(K, -1)
        share = torch.einsum("tke,tk->te", F.one_hot(indices, E).to(x.dtype), weights)
        return torch.stack([share[:, e, None] * expert(rows) for e, expert in enumerate(self.experts)]).sum(0)


class LinearAttention(nn.Module):
    """x: (B, N, 8) as queries, keys and values of linear attention, all at once."""

    def __init__(self, mixed: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.mixed = nn.Linear(D, 3 * D), mixed

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(*self.qkv(x).chunk(3, -1))


class Each(nn.Module):
    def __init__(self, cases: Sequence[nn.Module]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(cases)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [case(x) for case in self.cases]


def outcomes(cases: Sequence[nn.Module], *, training: bool) -> list[Outcome]:
    """All in one graph with free sizes. In inference, compared at two sizes; what was said, in their order."""
    said: list[Outcome] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        lowered = backend.lower(graph_module, example)
        assert not lowered.faults
        said.extend(o for o in lowered.outcomes if o.lowering in ("experts", "expert-modules", "linear-attention"))
        return lowered.graph.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Each(cases).double().train(training)
    compiled = torch.compile(model, backend=spy, dynamic=True)
    with torch.set_grad_enabled(training):
        for batch, length in ((3, 43),) if training else ((2, 9), (3, 43)):
            x = 40 * torch.randn(batch, length, D, dtype=torch.float64)
            found = compiled(x)
            if not training:
                for one, other in zip(found, model(x), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    assert len(said) == len(cases), said
    return sorted(said, key=lambda o: int(re.findall(r"cases\.(\d+)", o.place)[0]))


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v.clamp(-100, 100) * 0.5


def scores_clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril().clamp(-1e3, 1e3) @ v


def scores_clamped_near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(-6, 6).tril() @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).tril(), 0.5, True) @ v


def test_what_only_other_numbers_and_sizes_tell() -> None:
    cases = {
        Mixture(): "",
        Mixture(room=lambda tokens: tokens): "",
        Mixture(room=lambda _: 20): "the sizes are free, and at",
        Mixture(room=lambda tokens: 0.5 * tokens + 9): "the sizes are free, and at",
        Mixture(result=lambda y: y * (y.size(0) / 18)): "the sizes are free, and at",
        Mixture(lambda h: h.clamp(-1e5, 1e5)): "with numbers of 2e+06 it differs",
        Mixture(lambda h: 1e6 * (h / 1e6).tanh()): "with numbers of 2e+07 it differs",
        Mixture(lambda h: F.hardshrink(h, 1e-9)): "with numbers of 6e-11 it differs",
        Mixture(lambda h: torch.minimum(h, torch.tensor(1e6, dtype=h.dtype))): "with numbers of 2e+07 it differs",
        Mixture(lambda h: h.nan_to_num(0.0)): "numbers that are not finite are treated inside of it (nan_to_num)",
        LinearAttention(clamped): "",
        LinearAttention(scores_clamped): "the nearest recurrence",
        LinearAttention(scores_clamped_near): "the nearest recurrence",
    }
    for expected, outcome in zip(cases.values(), outcomes(list(cases), training=False), strict=True):
        assert bool(outcome.became) == (not expected), (expected, outcome)
        assert expected in outcome.reason, (expected, outcome)


def test_what_a_trial_leaves_out() -> None:
    cases = {
        Mixture(): "",
        Mixture(lambda h: F.dropout(h, 0.1)): "numbers are dropped inside of it (dropout)",
        Mixture(lambda h: h.detach()): "gradients are stopped inside of it (detach)",
        Listed(): "numbers are dropped inside of it (dropout)",
        LinearAttention(dropped): "numbers are dropped inside of it (dropout)",
    }
    for expected, outcome in zip(cases.values(), outcomes(list(cases), training=True), strict=True):
        assert bool(outcome.became) == (not expected), (expected, outcome)
        assert expected in outcome.reason, (expected, outcome)
