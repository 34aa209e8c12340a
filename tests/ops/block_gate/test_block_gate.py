"""Gates of blocks, against loops over blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import DecoderError
from gatecc.ops.attention.arguments import arguments
from gatecc.ops.attention.cost import served, taken
from gatecc.ops.attention.reference import visible
from gatecc.ops.block_gate import block_choice, block_logits, block_peaks
from gatecc.ops.block_gate.reference import divergence


def pool(x: Tensor, keep: Tensor | None, b: int, h: int, block: range) -> Tensor:
    """Mean, maximum, minimum of the tokens of a block that are kept; zeros without any."""
    rows = [x[b, h, t] for t in block if t < x.size(2) and (keep is None or bool(keep[b, t]))]
    if not rows:
        return x.new_zeros(3 * x.size(3))
    stacked = torch.stack(rows)
    return torch.cat([stacked.mean(0), stacked.amax(0), stacked.amin(0)])


def turned(x: Tensor, at: int, base: float) -> Tensor:
    half = x.numel() // 2
    angle = torch.tensor([at * base ** (-i / half) for i in range(half)])
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


@given(
    st.integers(1, 11),
    st.integers(1, 4),
    st.sampled_from([0.0, 100.0]),
    st.booleans(),
    st.sampled_from([1.0, 0.5, 0.3]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_logits_and_choice(tokens: int, block: int, base: float, pads: bool, share: float, causal: bool) -> None:
    torch.manual_seed(tokens + 16 * block)
    q, k = torch.randn(2, 4, tokens, 6), torch.randn(2, 2, tokens, 6)
    query, key = torch.randn(4, 18, 4), torch.randn(2, 18, 4)
    keep = torch.rand(2, tokens) < 0.6 if pads else None
    logits = block_logits(q, k, query, key, keep, block, base)
    chosen = block_choice(logits, torch.tensor(share), keep, block, True, causal)
    n = math.ceil(tokens / block)
    assert logits.shape == chosen.shape == (2, 4, n, n)
    blocks = [range(i * block, (i + 1) * block) for i in range(n)]
    filled = [[any(t < tokens and (keep is None or bool(keep[b, t])) for t in r) for r in blocks] for b in range(2)]
    for b in range(2):
        for h in range(4):
            for i in range(n):
                left = turned(pool(q, keep, b, h, blocks[i]) @ query[h], i * block, base or 1e30)
                row: list[float] = []
                for j in range(n):
                    right = turned(pool(k, keep, b, h // 2, blocks[j]) @ key[h // 2], j * block, base or 1e30)
                    if base:
                        row.append(float(left @ right) / 2)
                    else:
                        plain = (
                            pool(q, keep, b, h, blocks[i]) @ query[h],
                            pool(k, keep, b, h // 2, blocks[j]) @ key[h // 2],
                        )
                        row.append(float(plain[0] @ plain[1]) / 2)
                assert torch.allclose(logits[b, h, i], torch.tensor(row), atol=1e-3, rtol=1e-3)
                shown = [j for j in range(n) if filled[b][j] and (j <= i or not causal)]
                always = {j for j in (i, next((j for j in range(n) if filled[b][j]), -1)) if j in shown}
                order = sorted(shown, key=lambda j: (j not in always, -float(logits[b, h, i, j])))
                wanted = set(order[: math.ceil(share * len(shown) - 1e-4)]) | always
                if share == 1 and keep is not None and not all(bool(keep[b, t]) for t in blocks[i] if t < tokens):
                    wanted = set(range(n))
                assert {j for j in range(n) if bool(chosen[b, h, i, j])} == wanted


def test_a_threshold_and_a_window() -> None:
    logits = torch.tensor([[[[0.0, 9, 9, 9], [0, 0, 9, 9], [0, 3, 0, 9], [2, 0, 1, 0]]]])
    chosen = block_choice(logits, torch.tensor(0.2), None, 4, False, True)
    assert chosen[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    within = block_choice(
        logits, torch.tensor(1.0), None, 4, True, True, 2
    )  # a query sees itself and the one before it
    assert within[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("causal", [True, False])
def test_peaks_are_the_largest_weights_and_the_loss_their_divergence(causal: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6)
    bias = torch.randn(2, 1, 7, 7)
    got = block_peaks(q, k, bias, 3, None, causal)
    scores = q @ k.repeat_interleave(2, 1).mT / 6**0.5 + bias
    scores = scores + torch.full((7, 7), -torch.inf).triu(1) if causal else scores
    weights = torch.nn.functional.pad(scores.softmax(-1), (0, 2, 0, 2)).unflatten(3, (3, 3)).unflatten(2, (3, 3))
    most = weights.amax((3, 5))
    expected = most / most.sum(-1, keepdim=True)
    assert torch.allclose(got, expected, atol=1e-6)
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = divergence(logits, got, None, causal, None, 3)
    total = 0.0
    for b in range(2):
        for h in range(4):
            for i in range(3):
                seen = range(i + 1 if causal else 3)
                p = torch.softmax(logits[b, h, i, list(seen)], -1)
                total += sum(float(expected[b, h, i, j] * torch.log(expected[b, h, i, j] / p[j])) for j in seen)
    assert float(loss) == pytest.approx(total / 24, rel=1e-4)
    assert float(divergence(torch.log(expected.clamp_min(1e-30)), got, None, causal, None, 3)) == pytest.approx(
        0, abs=1e-5
    )


def test_only_the_gate_learns() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, h, 5, 4, dtype=torch.double, requires_grad=True) for h in (2, 1))
    query, key = (torch.randn(h, 12, 2, dtype=torch.double, requires_grad=True) for h in (2, 1))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return block_logits(q, k, query, key, None, 2, 10.0).square().sum()

    loss(query, key).backward()
    assert q.grad is None
    assert k.grad is None
    for p, other in ((query, 0), (key, 1)):
        step = torch.zeros_like(p)
        step.view(-1)[3] = 1e-2
        near = [loss(*((query + s * step, key) if other == 0 else (query, key + s * step))) for s in (1, -1)]
        assert float((near[0] - near[1]) / 2e-2) == pytest.approx(float(p.grad.view(-1)[3]), rel=1e-2, abs=1e-3)  # pyright: ignore[reportOptionalMemberAccess]


@given(st.integers(1, 9), st.integers(0, 4), st.booleans(), st.sampled_from([None, 1, 3]), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_pairs_that_a_map_leaves_are_counted(N: int, more: int, causal: bool, window: int | None, block: int) -> None:
    S, sizes = N + more, [block, 3]
    q, k = torch.randn(2, 4, N, 2), torch.randn(2, 2, S, 2)
    blocks = torch.rand(2, 1, -(-N // block), -(-S // 3)) < 0.5
    options: dict[str, Any] = {"causal": causal, "window": window, "block_sizes": sizes}
    seen = visible(arguments(q, k, k, blocks=blocks, **options))
    all_seen = visible(arguments(q, k, k, blocks=torch.ones_like(blocks), **options))
    assert seen is not None
    assert all_seen is not None
    found = served(q, k, k, blocks=blocks, **options)
    assert found is not None
    assert found[1:] == (int(seen.expand(2, 4, N, S).sum()), int(all_seen.expand(2, 4, N, S).sum()))
    took = taken(q, k, k, out=None, blocks=blocks, **options)
    assert took is not None
    kept = torch.nn.functional.pad(seen, (0, -S % 3, 0, -N % block)).unflatten(3, (-1, 3)).unflatten(2, (-1, block))
    assert took.counts == [int(kept.any(5).any(3).sum())] * 4


def test_no_decoder_steps_through_pooled_queries() -> None:
    import gatecc
    from gatecc.recipes import samples

    plain, inputs = samples.language()
    model: Any = gatecc.transform(plain, gatecc.recipe("seer-attention", block=2, width=4), inputs)
    with pytest.raises(DecoderError, match="pools the queries of a block"):
        gatecc.decoder(model, inputs)
