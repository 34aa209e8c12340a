"""Graphs of others that look like attention: left alone with a reason, or lowered with the same numbers and gradients.

Each is compared in float64, at the example's size and at another one, with free sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import gatecc
from gatecc import backend
from gatecc.passes.lower import Outcome, attention_operator, spelled_attention

H, E = 4, 8
INF = math.inf
Mix = Callable[..., Any]


@pytest.fixture(autouse=True)
def all_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be lowered is, so that small graphs show it."""
    monkeypatch.setattr(attention_operator, "gain", lambda *_, **__: 2.0)
    monkeypatch.setattr(spelled_attention, "SHORT", 0)
    torch._dynamo.reset()


def drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)


HEADS = drawn(H, H)
HIDDEN = torch.zeros(3, 96, dtype=torch.bool)
HIDDEN[1, 3:] = True
HIDDEN[2] = True  # this sample sees nothing


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * E**-0.5


def ahead(q: Tensor) -> Tensor:
    """(N, N): how much later a key is than the query."""
    places = torch.arange(q.size(2))
    return places - places[:, None]


def hidden(q: Tensor) -> Tensor:
    return HIDDEN[: q.size(0), None, None, : q.size(2)]


def unseen(q: Tensor, k: Tensor, mask: Tensor, fill: float = -INF) -> Tensor:
    return scores(q, k).masked_fill(mask, fill)


def outcomes(cases: dict[str, Mix], *, training: bool) -> dict[str, list[Outcome]]:
    """Run all in one graph with free sizes, at two sizes, and compare; what was said of each, found by its lines."""
    said: list[Outcome] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        lowered = backend.lower(graph_module, example)
        assert not lowered.faults
        said.extend(o for o in lowered.outcomes if o.lowering in ("spelled-attention", "attention-operator"))
        return lowered.graph.forward

    def each(*given: Tensor) -> list[Tensor]:
        return [torch.cat([y.flatten() for y in leaves(mix(*given))]) for mix in cases.values()]

    compiled = torch.compile(each, backend=spy, dynamic=True)
    for batch, length in ((2, 7), (3, 29)):
        given = [drawn(batch, H, length, E).add(i).requires_grad_(training) for i in range(3)]
        with torch.set_grad_enabled(training):
            pairs = zip(cases, compiled(*given), each(*given), strict=True)
        for name, *both in pairs:
            torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m, name=name: name + m)
            if training:
                weights = torch.linspace(-1, 1, both[0].numel(), dtype=torch.float64)
                grads = [torch.autograd.grad((x * weights).sum(), given, retain_graph=True) for x in both]
                torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: name + m)
    assert all(o.line.startswith("test_foreign.py:") for o in said)
    return {name: [o for o in said if _line(o) in lines(mix)] for name, mix in cases.items()}


def leaves(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def _line(outcome: Outcome) -> int:
    return int(outcome.line.partition(":")[2])


def lines(mix: Mix) -> set[int | None]:
    return {line for *_, line in mix.__code__.co_lines()}


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights


def mixed_both_times(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhnm,hg->bgnm", scores(q, k), HEADS).softmax(-1)
    return torch.einsum("bhnm,hg->bgnm", weights, HEADS) @ v


def hidden_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """After the softmax only a part of the mask hides keys."""
    gone = hidden(q)
    return unseen(q, k, ahead(q) > 0, -1e9).masked_fill(gone, -1e9).softmax(-1).masked_fill(gone, 0.0) @ v


def with_a_logit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    moved = scores(q, k) + 1.5
    return torch.cat((moved, moved.new_ones(*moved.shape[:3], 1)), -1).softmax(-1)[..., :-1] @ v


def used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights.mT @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    kept = weights * (weights >= weights.topk(3, -1)[0][..., -1:])
    return kept / kept.sum(-1, keepdim=True) @ v


def best_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = scores(q, k)
    return found.masked_fill(found < found.topk(3, -1)[0][..., -1:], -INF).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1).clone()
    weights[:, 1:2] *= 0.5
    return weights @ v


LEFT: dict[str, tuple[Mix, str]] = {
    "logits mixed by a Linear": (
        lambda q, k, v: (scores(q, k).permute(0, 2, 3, 1) @ HEADS).permute(0, 3, 1, 2).softmax(-1) @ v,
        "mixed between heads before the softmax: by matmul (GCC107)",
    ),
    "logits mixed by a mean": (
        lambda q, k, v: scores(q, k).mean(1, keepdim=True).softmax(-1) @ v,
        "mixed between heads before the softmax: by mean (GCC107)",
    ),
    "weights mixed": (
        lambda q, k, v: torch.einsum("bhnm,hg->bgnm", scores(q, k).softmax(-1), HEADS) @ v,
        "changed between the softmax and the values: by einsum (GCC101)",
    ),
    "weights mixed by a sum": (
        lambda q, k, v: (scores(q, k).softmax(-1)[:, :, None] * HEADS[:, :, None, None]).sum(1) @ v,
        "changed between the softmax and the values: by mul (GCC101)",
    ),
    "both mixed": (mixed_both_times, "(GCC10"),
    "heads of the weights in another order": (lambda q, k, v: scores(q, k).softmax(-1).flip(1) @ v, "by flip (GCC101)"),
    "heads of the logits in another order": (lambda q, k, v: scores(q, k).roll(1, 1).softmax(-1) @ v, "by roll"),
    "weights returned": (returned, "the weights are also read by"),
    "weights used twice": (used_twice, "the weights are also read by"),
    "weights dropped": (dropped, "changed between the softmax and the values"),
    "weights of a head halved in place": (in_place, "written to in place"),
    "scaled after": (lambda q, k, v: (scores(q, k).softmax(-1) * 0.5) @ v, "by mul (GCC101)"),
    "another axis": (lambda q, k, v: scores(q, k).softmax(-2) @ v, "another axis than the sum over values"),
    "the best three keys": (best_three, "is made of the scores"),
    "a temperature per key": (lambda q, k, v: (q @ k.mT * k.norm(dim=-1)[:, :, None]).softmax(-1) @ v, "for all keys"),
    "a mask that is scaled away": (
        lambda q, k, v: (unseen(q, k, ahead(q) > 0, -1e5) * 1e-5).softmax(-1) @ v,
        "leaves them some weight",
    ),
    "two masks": (
        lambda q, k, v: unseen(q, k, ahead(q) > 0).masked_fill(hidden(q), -1e9).softmax(-1) @ v,
        "hidden by several numbers",
    ),
    "hidden again in part": (hidden_again, "after the softmax but a part of the mask"),
    "raised before it is masked": (
        lambda q, k, v: scores(q, k).clamp_min(-1e300).masked_fill(hidden(q), -INF).softmax(-1) @ v,
        "raised to a least number before",
    ),
    "moved before it is capped": (
        lambda q, k, v: ((scores(q, k) + 0.7).tanh() * 3).softmax(-1) @ v,
        "before they are capped",
    ),
    "moved beside a logit": (with_a_logit, "a number is added to all scores but one"),
}


def test_left_alone_with_a_reason() -> None:
    said = outcomes({name: mix for name, (mix, _) in LEFT.items()}, training=False)
    for name, (_, reason) in LEFT.items():
        assert not any(o.became for o in said[name]), name
        assert any(reason in o.reason for o in said[name]), (name, said[name])


EXACT: dict[str, tuple[Mix, str, bool]] = {
    "a temperature per query": (lambda q, k, v: (q @ k.mT * q.norm(dim=-1, keepdim=True)).softmax(-1) @ v, "", True),
    "a sine of the distance": (lambda q, k, v: unseen(q, k, (ahead(q) * 0.2).sin() > 0).softmax(-1) @ v, "mask", True),
    "a causal mask but for a power": (
        lambda q, k, v: unseen(q, k, (ahead(q) > 0) & (ahead(q).clamp(1).log2() != 4)).softmax(-1) @ v,
        "mask",
        True,
    ),
    "a window by a tensor": (
        lambda q, k, v: unseen(q, k, (ahead(q) > 0) | (ahead(q) < torch.tensor(-19))).softmax(-1) @ v,
        "mask",
        False,
    ),
    "a row without keys becomes their mean": (
        lambda q, k, v: unseen(q, k, hidden(q), -1e9).softmax(-1).nan_to_num(0.0) @ v,
        "mask",
        False,
    ),
    "and so does one that is raised": (
        lambda q, k, v: unseen(q, k, hidden(q)).clamp_min(torch.finfo(q.dtype).min).softmax(-1) @ v,
        "mask",
        False,
    ),
    "heads repeated in another order": (
        lambda q, k, v: scores(q, k[:, :2].repeat(1, 2, 1, 1)).softmax(-1) @ v[:, 2:].repeat_interleave(2, 1),
        "gatecc::attention",
        True,
    ),
}


@pytest.mark.parametrize("training", [False, True])
def test_lowered_exactly(training: bool) -> None:
    cases = {name: mix for name, (mix, _, trains) in EXACT.items() if trains or not training}
    said = outcomes(cases, training=training)
    for name in cases:
        assert any(EXACT[name][1] in o.became for o in said[name] if o.became), (name, said[name])


def test_explain_says_why_heads_that_talk_were_left_alone() -> None:
    class Talking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.talk = nn.Linear(H * E, 3 * H * E), nn.Linear(H, H)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, H, E)).permute(2, 0, 3, 1, 4)
            weights = self.talk(scores(q, k).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return (weights @ v).transpose(1, 2).flatten(2)

    model = nn.Sequential(Talking())
    report = gatecc.explain(model, (torch.randn(2, 5, H * E),))
    (row,) = [row for row in report.lowered if row.lowering == "spelled-attention"]
    assert row.owner == "0"
    assert row.line == f"test_foreign.py:{Talking.forward.__code__.co_firstlineno + 2}"
    assert row.reason == "the weights are changed between the softmax and the values: by linear (GCC101)"
    assert not row.became
