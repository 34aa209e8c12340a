"""Tasks: recall of pairs, capacity of a state, bytes of source."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.train import tasks


@given(pairs=st.integers(1, 6), more=st.integers(0, 20), a=st.sampled_from([0.01, 0.5, 1.0]), fill=st.booleans())
def test_mqar_asks_each_key_once(pairs: int, more: int, a: float, fill: bool) -> None:
    length = 4 * pairs + 2 * more
    ids, labels = tasks.mqar(32, length, pairs, a, seed=pairs, batch=3, fill=fill)
    assert ids.shape == labels.shape == (3, length)
    for row, asked in zip(ids, labels, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys.tolist())) == pairs == len(set(values.tolist()))
        assert keys.min() >= 1
        assert keys.max() < 16 <= values.min()
        where = (asked != -100).nonzero().flatten()
        assert len(where) == pairs
        assert where.min() >= 2 * pairs
        memory = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert sorted(row[where].tolist()) == sorted(keys.tolist())
        assert all(memory[int(row[i])] == int(asked[i]) for i in where)
        assert fill or int((row == 0).sum()) == length - 3 * pairs
    again = tasks.mqar(32, length, pairs, a, seed=pairs, batch=3, fill=fill)
    assert torch.equal(ids, again[0])
    assert torch.equal(labels, again[1])


def test_mqar_asks_soon_for_small_a() -> None:
    def gap(a: float) -> float:
        _, labels = tasks.mqar(64, 256, 2, a, seed=1, batch=200)
        return float((labels != -100).nonzero()[:, 1].double().mean())

    assert gap(0.01) < gap(0.5) < gap(1.0)


def test_mqar_refuses_what_does_not_fit() -> None:
    for options in ((32, 14, 4), (32, 17, 4), (8, 64, 4), (32, 8, 0)):
        with pytest.raises(ArgumentError):
            tasks.mqar(*options)


class Layer(nn.Module):
    """Attention over all earlier tokens, or over ``window`` of them. x: (B, N, C)"""

    def __init__(self, width: int, window: int | None) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        back = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        mask = (back >= 0) & (back < (self.window or x.shape[1]))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def solved(window: int | None) -> float:
    """Recall of a two-layer model after a short training on three pairs."""
    torch.manual_seed(0)
    width, length, vocabulary, pairs = 32, 16, 12, 3
    embed, head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
    position = nn.Parameter(0.3 * torch.randn(length, width))
    model = nn.Sequential(Layer(width, window), Layer(width, window))
    parameters = [*embed.parameters(), *head.parameters(), *model.parameters(), position]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)

    def logits(ids: Tensor) -> Tensor:
        return head(model(embed(ids) + position))

    for step in range(300):
        ids, labels = tasks.mqar(vocabulary, length, pairs, seed=step, batch=32)
        loss = F.cross_entropy(logits(ids).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, labels = tasks.mqar(vocabulary, length, pairs, seed=-1, batch=256)
    return tasks.recall(logits(ids), labels)


def test_attention_solves_mqar_and_a_local_mixer_does_not() -> None:
    assert solved(None) > 0.95
    assert solved(3) < 0.6  # one of six values by chance; a query soon after its pair is seen by a window too


def test_orthonormal_keys_are_exact_up_to_the_dimension() -> None:
    assert tasks.capacity(dim=16, orthonormal=True) == {4: 1.0, 8: 1.0, 16: 1.0}
    with pytest.raises(ArgumentError):
        tasks.capacity(dim=16, pairs=(17,), orthonormal=True)


@pytest.mark.parametrize("dim", [16, 64])
def test_capacity_has_its_knee_near_the_dimension(dim: int) -> None:
    linear = tasks.capacity(dim=dim)
    assert linear[dim // 4] > 0.9
    assert 0.3 < linear[dim] < 0.7
    assert linear[2 * dim] < 0.3
    assert linear[4 * dim] < 0.1
    assert tasks.capacity(lambda q, k, v: 0.01 * (q @ k.mT).tril() @ v, dim) == linear  # at any scale

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=64.0)

    assert tasks.capacity(softmax, dim)[4 * dim] == 1.0  # a cache has no knee


def test_bytes_are_split_by_the_hash_of_the_path() -> None:
    train, held = tasks.stdlib_bytes()
    assert train.dtype is held.dtype is torch.uint8
    assert 0.01 < held.numel() / (train.numel() + held.numel()) < 0.15
    text, other = (bytes(t.tolist()) for t in (train[:3_000_000], held))
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("abc.py", "argparse.py", "ast.py", "bisect.py", "calendar.py"):
        own = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        assert ((root / name).read_bytes() in other) is own
        assert own or (root / name).read_bytes() in text or train.numel() > 3_000_000
    short, _ = tasks.stdlib_bytes(limit=1000)
    assert torch.equal(short, train[:1000])


def test_bits_per_token_and_windows() -> None:
    stream = torch.arange(10_000) % 7
    uniform: Callable[[Tensor], Tensor] = lambda ids: torch.zeros(*ids.shape, 8)  # noqa: E731
    assert tasks.bits_per_token(uniform, stream, 64, 10) == pytest.approx(3.0)
    sure: Callable[[Tensor], Tensor] = lambda ids: 50.0 * F.one_hot((ids + 1) % 7, 8)  # noqa: E731
    assert tasks.bits_per_token(sure, stream, 64, 7, batch=3) == pytest.approx(0.0, abs=1e-6)
    assert not math.isclose(tasks.bits_per_token(lambda ids: sure(ids + 1), stream, 64, 7), 0, abs_tol=1)
    with pytest.raises(ArgumentError):
        tasks.bits_per_token(uniform, stream[:640], 64, 10)
    windows = tasks.windows_of(stream, 20, 50)
    assert windows.shape == (50, 20)
    assert torch.equal((windows[:, 1:] - windows[:, :-1]) % 7, torch.ones(50, 19).long())
