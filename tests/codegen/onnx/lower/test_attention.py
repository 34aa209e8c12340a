"""Attention becomes one node with what the model does around it; export itself compares it with torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc

ort = pytest.importorskip("onnxruntime")
WIDTH, HEADS, D = 64, 2, 32


def angles(n: int, width: int) -> Tensor:
    """(N, width / 2)."""
    return torch.arange(n)[:, None] * (100.0 ** -(torch.arange(0, width, 2) / width))


def halves(x: Tensor) -> Tensor:
    """The rotary embedding as Llama spells it."""
    a = torch.cat([angles(x.size(-2), x.size(-1))] * 2, -1)
    one, two = x.chunk(2, -1)
    return x * a.cos() + torch.cat([-two, one], -1) * a.sin()


def pairs(x: Tensor) -> Tensor:
    """The same with neighbours as pairs, as complex numbers."""
    a = angles(x.size(-2), x.size(-1))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(a), a)
    return torch.view_as_real(turned).flatten(-2)


def first_half(x: Tensor) -> Tensor:
    """On the first channels alone."""
    return torch.cat([halves(x[..., :16]), x[..., 16:]], -1)


def few(x: Tensor) -> Tensor:
    """On so few that GroupQueryAttention does not turn them."""
    return torch.cat([halves(x[..., :8]), x[..., 8:]], -1)


def band(n: int, window: int) -> Tensor:
    at = torch.arange(n)
    return (at <= at[:, None]) & (at > at[:, None] - window)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores through 5 tanh(x / 5), a window, and softmax spelled out."""
    scores = torch.tanh(q @ k.mT * 0.2 / 5.0) * 5.0
    scores = scores.masked_fill(~band(q.size(-2), 5), torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor], str]] = {
    "halves": (halves, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "rotary"),
    "pairs": (pairs, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, band(q.size(-2), 4)), "window 4"),
    "first half": (first_half, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "rotary"),
    "few": (few, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "rotary"),
    "capped": (halves, capped, "window 5"),
    "everything is seen": (halves, F.scaled_dot_product_attention, "rotary"),
}


class One(nn.Module):
    """One attention over (B, N, 64), with its own projections."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.turn, self.attend, _ = KINDS[kind]
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * D, bias=i != 1) for i in range(3))
        self.o = nn.Linear(HEADS * D, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, D)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(self.attend(self.turn(q), self.turn(k), v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """All of them, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(One, KINDS))
        self.config = type("Config", (), {"max_position_embeddings": 40})()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    ("target", "nodes"),
    [
        ("ort", {"com.microsoft::GroupQueryAttention": 5, "Attention": 1, "RotaryEmbedding": 4}),
        ("portable", {"Attention": 5, "RotaryEmbedding": 8, "Softmax": 1}),
    ],
)
def test_rotary_embeddings_windows_and_caps(
    target: Literal["ort", "portable"], nodes: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    made = gatecc.export(Stack().eval(), tmp_path / "x", (torch.randn(2, 7, WIDTH),), target=target)
    assert {name: made.operators.get(name) for name in nodes} == nodes
    assert max(c.error for c in made.compared) < 2e-6
    if target == "ort":
        assert made.kept == {}
        assert made.operators["MatMul"] == 6 + 4 + 2 * 3  # o, packed q, k, v; and those of nodes that take none
    else:  # the windows stay tensors
        assert sum(made.kept.values()) == 2
        assert not any(op.startswith("com.microsoft") for op in made.operators)


def test_an_angle_that_depends_on_an_input_stays_outside(tmp_path: Path) -> None:
    class Shifted(One):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            assert shift is not None

            def turn(y: Tensor) -> Tensor:
                a = angles(y.size(-2), D) + shift[:, None, None, None]
                one, two = y.chunk(2, -1)
                return torch.cat([one * a.cos() - two * a.sin(), two * a.cos() + one * a.sin()], -1)

            self.turn = turn
            return super().forward(x)

    made = gatecc.export(Shifted("halves").eval(), tmp_path / "x", (torch.randn(2, 7, WIDTH), torch.randn(2)))
    assert "GroupQueryAttention" in str(made.lowered)
    assert "com.microsoft::GroupQueryAttention" in made.operators
    assert made.operators["Cos"] > 0


def test_a_mask_of_the_caller_is_never_dropped(tmp_path: Path) -> None:
    class Padded(One):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            seen: Any = band(x.size(1), x.size(1)) & mask[:, None, None].bool()
            self.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen)
            return super().forward(x)

    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    made = gatecc.export(Padded("halves").eval(), tmp_path / "x", (torch.randn(2, 5, WIDTH), mask))
    assert "com.microsoft::GroupQueryAttention" not in made.operators
    ((what, count),) = made.lowered.items()
    assert (what.split(" (")[0], count) == ("attention: Attention with a mask", 1)
    assert "hold no padding" in what
    assert set(made.inputs) == {"x", "mask"}


@pytest.mark.parametrize(
    ("kv_heads", "half", "turned", "node"),
    [
        (2, False, True, "com.microsoft::MultiHeadAttention"),
        (1, False, False, "Attention"),
        (1, False, True, "Attention"),
        (2, True, False, "Attention"),
    ],
)
def test_padding_of_an_encoder_reaches_whatever_node_it_becomes(
    kv_heads: int, half: bool, turned: bool, node: str, tmp_path: Path
) -> None:
    """The example holds none of it, and its name tells nobody that it is a mask."""
    torch.manual_seed(0)
    dtype = torch.float16 if half else torch.float32

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, n * D) for n in (HEADS, kv_heads, kv_heads))

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
            q, k = (halves(q), halves(k)) if turned else (q, k)
            seen = tokens[:, None, None].bool()
            return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2).flatten(2)

    model, x = Seen().eval().to(dtype), torch.randn(3, 7, WIDTH, dtype=dtype)
    made = gatecc.export(model, tmp_path / "x", (x, torch.ones(3, 7, dtype=torch.int64)))
    assert made.operators[node] == 1
    tokens = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1], [0] * 7])
    session = ort.InferenceSession(str(tmp_path / "x" / "model.onnx"))
    found = session.run(None, {"x": x.numpy(), "tokens": tokens.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x, tokens).detach(), rtol=0, atol=4e-3 if half else 1e-5)
