"""gatecc::evicted_attention: the rule, token by token in Python, against the formula, the forward and the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.evicted_attention import cache, kernels, masked, operator, presence

SCALE = 0.3
evicted_attention: Any = operator.evicted_attention
formula: Any = masked.masked
one_token: Any = kernels.one_token
no_cache = masked.no_cache


def by_hand(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, valid: Tensor, rule: presence.Rule, cap: float) -> Tensor:
    """Each head has a list of what it holds. A query sees it and itself; then its own token comes in, and of those that
    are not the newest something leaves: what is flagged; with a budget the oldest that is, else the oldest of all."""
    out = q.new_zeros((*q.shape[:3], v.size(3)))
    group = q.size(1) // k.size(1)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            held: list[tuple[int, bool]] = []
            for i in range(q.size(2)):
                if not valid[b, i]:
                    continue
                seen = [j for j, _ in held] + [i]
                scores = SCALE * k[b, h // group, seen] @ q[b, h, i]
                scores = cap * torch.tanh(scores / cap) if cap else scores
                out[b, h, i] = scores.softmax(0) @ v[b, h // group, seen]
                held.append((i, bool(keep[b, h // group, i])))
                tokens = valid[b, : i + 1].nonzero().flatten().tolist()
                older = [x for x in held if x[0] not in tokens[max(len(tokens) - rule.recent, 0) :]]
                if not rule.budget:
                    held = [x for x in held if x not in older or x[1]]
                elif len(held) > rule.budget:
                    held.remove(next((x for x in older if not x[1]), older[0]))
    return out


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_form_is_the_rule(data: st.DataObject) -> None:
    draw = data.draw
    B, K, G, N = (draw(st.integers(low, high)) for low, high in ((0, 2), (1, 2), (1, 3), (1, 40)))
    D, E = draw(st.sampled_from([(4, 4), (20, 12), (9, 70)]))
    rule = presence.Rule(*draw(st.sampled_from([(0, 0), (1, 0), (5, 0), (0, 1), (0, 7), (5, 2), (4, 4), (20, 3)])))
    budget, cap = rule.budget, draw(st.sampled_from([0.0, 4.0]))
    torch.manual_seed(draw(st.integers(0, 99)))
    q, k, v = torch.randn(B, K * G, N, D), torch.randn(B, K, N, D), torch.randn(B, K, N, E)
    keep = (torch.rand(B, K, N) < draw(st.sampled_from([0.0, 0.5, 1.0]))).float()
    valid = torch.arange(N) >= torch.randint(0, N, (B, 1))
    if draw(st.booleans()):
        valid = torch.rand(B, N) < 0.7  # tokens and padding in any order
    options: dict[str, Any] = {"scale": SCALE, "budget": budget, "recent": rule.recent, "softcap": cap}
    expected = by_hand(q, k, v, keep, valid, rule, cap)
    with torch.no_grad():
        found = [formula(q, k, v, keep, valid, **options)[0], evicted_attention(q, k, v, keep, valid, **options)[0]]
    state, parts, at = no_cache(q, k, v, rule.recent), list[Tensor](), 0
    while at < N:
        size = draw(st.integers(1, N - at)) if draw(st.booleans()) else 1
        some = slice(at, at + size)
        run = one_token if size == 1 else evicted_attention
        operands = *(x[:, :, some] for x in (q, k, v, keep)), valid[:, some]
        out, *state = run(*operands, *state, **options)
        parts.append(torch.where(valid[:, None, some, None], out, 0.0))
        at += size
    for result in (*(torch.where(valid[:, None, :, None], x, 0.0) for x in found), torch.cat(parts, 2)):
        assert torch.allclose(result, expected, atol=1e-5)
    held = state[2][:, :, :2, cache.COUNT]
    kept = (keep * valid[:, None]).sum(-1)
    assert rule.recent or torch.equal(held[..., 0].float(), kept.clamp(max=budget) if budget else kept)
    tokens = valid.sum(1)[:, None].expand(B, K)
    assert not budget or torch.equal(held.sum(-1), tokens.clamp(max=budget))  # the budget is used, and never exceeded
    assert budget or bool((held.sum(-1) <= kept + rule.recent).all())


def test_long_prompts_and_other_masks() -> None:
    """More queries than a piece, where few keys are read of many; in both directions; under a window."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 700, 8), torch.randn(1, 2, 700, 8), torch.randn(1, 2, 700, 8)
    keep = (torch.rand(1, 2, 700) < 0.3).float()
    cases: list[dict[str, Any]] = [{}, {"budget": 90}, {"budget": 90, "recent": 40}, {"recent": 300}, {"causal": False}]
    cases += [{"window": 300}, {"window": 300, "recent": 20}]
    for options in [*cases, {"causal": False, "window": 100, "softcap": 3.0}]:
        with torch.no_grad():
            skipped = evicted_attention(q, k, v, keep, scale=SCALE, **options)[0]
        assert torch.allclose(skipped, formula(q, k, v, keep, scale=SCALE, **options)[0], atol=1e-5), options


def test_a_flag_learns_what_its_key_changes() -> None:
    """The gradient of a hidden key is the change that it would make, of a key that is there the first order of it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 6, 4, dtype=torch.float64).unbind()
    keep = torch.tensor([[[1.0, 0.0, 1.0, 0.0, 1.0, 1.0]]], dtype=torch.float64)
    weight = torch.randn(1, 1, 6, 4, dtype=torch.float64)

    def value(keep: Tensor) -> Tensor:
        return (evicted_attention(q, k, v, keep, scale=SCALE)[0] * weight).sum()

    learned = keep.clone().requires_grad_()
    value(learned).backward()
    assert learned.grad is not None
    for j in (1, 3):
        other = keep.clone()
        other[..., j] = 1.0
        assert torch.allclose(learned.grad[..., j], value(other) - value(keep))
    scores = (SCALE * q @ k.mT).requires_grad_()  # softmax(s + log m): the derivative at m = 1 is that of the score
    seen = (torch.ones(6, 6).tril(-1) * keep + torch.eye(6)) > 0
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    (out * weight).sum().backward()
    assert scores.grad is not None
    for j in (0, 2, 4):
        others = torch.arange(6) != j  # its own query sees it whatever its flag
        assert torch.allclose(learned.grad[0, 0, j], scores.grad[0, 0, others, j].sum())
    assert learned.grad[..., 5] == 0


def test_memory_is_that_of_what_is_kept_and_other_dtypes() -> None:
    torch.manual_seed(0)
    N, keep = 1500, torch.rand(2, 3, 1500)
    keep = (keep < torch.tensor([0.9, 0.1, 0.2])[:, None]).float()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-9)):
        q, k, v = torch.randn(3, 2, 3, N, 16).to(dtype).unbind()
        _, *state = evicted_attention(*(x[:, :, :-1] for x in (q, k, v, keep)), None, *no_cache(q, k, v), scale=SCALE)
        assert state[0].numel() < 1.1 * float(keep.mean()) * k.numel()  # 0.4, though one head keeps 0.9
        last = tuple(x[:, :, -1:] for x in (q, k, v, keep))
        out, *_ = one_token(*last, None, *state, scale=SCALE)
        expected = formula(*(x.double() for x in (q, k, v, keep)), scale=SCALE)[0][:, :, -1:]
        assert torch.allclose(out.double(), expected, atol=tolerance)


@pytest.mark.parametrize("recent", [0, 2])
def test_samples_of_another_order(recent: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 9, 4).unbind()
    keep = (torch.rand(3, 2, 9) < 0.5).float()
    options: dict[str, Any] = {"scale": SCALE, "budget": 4, "recent": recent}
    _, *state = evicted_attention(*(x[:, :, :8] for x in (q, k, v, keep)), None, *no_cache(q, k, v, recent), **options)
    index = torch.tensor([2, 0, 0, 1])
    keys, values, places = state
    state = cache.reordered(keys, values, places, index, presence.Rule(4, recent))
    last = tuple(x[index][:, :, 8:] for x in (q, k, v, keep))
    out, *_ = one_token(*last, None, *state, **options)
    expected = formula(q, k, v, keep, **options)[0][index][:, :, 8:]
    assert torch.allclose(out, expected, atol=1e-5)


def test_what_does_not_fit() -> None:
    q = torch.randn(1, 2, 4, 4)
    with pytest.raises(ArgumentError, match="operands of evicted attention do not fit"):
        evicted_attention(q, q, q, torch.ones(1, 3, 4), scale=1.0)
    for options in (
        {"causal": False, "budget": 2},
        {"causal": False, "recent": 2},
        {"window": 2, "budget": 2},
        {"recent": -1},
    ):
        with pytest.raises(ArgumentError, match="count the tokens before a query"):
            evicted_attention(q, q, q, torch.ones(1, 2, 4), scale=1.0, **options)
    with pytest.raises(ArgumentError, match=r"(?s)newest tokens alone are more than the budget.*recent 3, budget 2"):
        evicted_attention(q, q, q, torch.ones(1, 2, 4), scale=1.0, budget=2, recent=3)
    with pytest.raises(ArgumentError, match=r"(?s)without a window.*causal False, window 0.*without a cache"):
        evicted_attention(q, q, q, torch.ones(1, 2, 4), None, *no_cache(q, q, q), scale=1.0, causal=False)
    with pytest.raises(ArgumentError, match="no gradient goes through a cache"):
        evicted_attention(q.requires_grad_(), q, q, torch.ones(1, 2, 4), None, *no_cache(q, q, q), scale=1.0)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_right_flags_miss_nothing_and_wrong_ones_no_more_than_a_window(data: st.DataObject) -> None:
    """A trace of reads (of an earlier token by a query), a token being a page that comes once. Flags that say which
    tokens are read once they are not among the newest: no read fails, as long as the budget holds these tokens. Any
    flags: what fails is no more than with the newest tokens alone, and of tokens that are flagged where these fit."""
    draw = data.draw
    N, recent = draw(st.integers(2, 24)), draw(st.integers(0, 6))
    budget = recent + draw(st.integers(1, 6))
    reads = {(i, draw(st.integers(0, i - 1))) for i in range(1, N) for _ in range(draw(st.integers(0, 2)))}
    far = {(i, j) for i, j in reads if i - j > recent}

    def missed(keep: list[bool]) -> set[tuple[int, int]]:
        rule = presence.Rule(budget, recent)
        there = presence.Presence.of(torch.tensor(keep).float()[None, None], None, rule)
        seen, _ = presence.visibility(there, True, 0, rule)
        return {(i, j) for i, j in reads if not bool(seen[0, 0, i, j])}

    needed = sorted({j for _, j in far})
    right = [j in needed[: budget - recent] for j in range(N)]
    assert not {j for _, j in missed(right)} & set(needed[: budget - recent])
    if len(needed) <= budget - recent:
        assert not missed(right)
    flags = draw(st.lists(st.booleans(), min_size=N, max_size=N))
    assert missed(flags) <= far
    if sum(flags) <= budget - recent:
        assert not {j for _, j in missed(flags)} & {j for j in range(N) if flags[j]}
    useless = missed([flags[0]] * N)  # flags that say nothing: the newest tokens, as many as the budget
    assert useless == {(i, j) for i, j in reads if i - j > budget}
