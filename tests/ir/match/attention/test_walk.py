"""match_attention on handwritten attention: every combination of spellings is found and its fields are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from gatecc.capture import capture
from gatecc.ir.match.attention.walk import match_attention
from gatecc.ir.program import Program
from gatecc.ir.site import Attention, Refusal
from gatecc.pipeline import canonical_form
from tests.graphs import record
from tests.ir.match.attention.spellings import HEADS, SPELLINGS, WIDTH, D, Spelled, Spelling
from tests.ir.match.attention_math import check, ordered, projected

B, N = 2, 5


def found(module: nn.Module, *inputs: Tensor) -> tuple[Program, list[Attention], list[Refusal]]:
    program = capture(module, inputs)
    canonical_form(program)
    sites, refusals = match_attention(program)
    return program, sites, refusals


def only(module: nn.Module, *inputs: Tensor) -> Attention:
    program, sites, refusals = found(module, *inputs)
    assert len(sites) == 1
    assert not refusals
    check(sites[0], record(program))
    return sites[0]


# --- the product of spellings -----------------------------------------------------------------------------------------


@settings(max_examples=24, phases=(Phase.explicit, Phase.generate))  # shrinking would capture hundreds of times
@given(SPELLINGS)
def test_every_spelling_is_found(how: Spelling) -> None:
    module = Spelled(how)
    program, sites, refusals = found(module, torch.randn(B, N, D))
    assert len(sites) == 1, refusals
    assert not refusals
    site, tensors = sites[0], record(program)
    assert site.key == "#0"
    assert (site.heads, site.kv_heads) == (HEADS, module.kv_heads)
    assert site.scale == pytest.approx(1.0 if how.scale == "none" else 0.5)
    assert str(site.mask) == (how.kind if how.kind != "sliding_window" else "sliding_window(3)")
    assert site.spelling == ("softmax" if how.softmax in ("method", "cast") else "manual")
    masks = {name for name, value in site.values.items() if value in site.maskings}
    assert masks <= {"mask"}
    linear = {"q_linear", "k_linear"} & set(site.values)
    expected = {"hidden", "q_raw", "k_raw", "q", "k", "v", "scores", "weights", "heads", "out"}
    assert set(site.values) - masks - linear == expected
    for name in linear:  # (b, n, c) before the split
        made = projected(site, program, tensors, name[0])
        assert made is not None
        torch.testing.assert_close(tensors[site.values[name].node], made)
    assert check(site, tensors)
    weights, v = (ordered(site.values[name], tensors, axes) for name, axes in (("weights", "bhnm"), ("v", "bhmd")))
    torch.testing.assert_close(
        weights @ v.repeat_interleave(HEADS // v.shape[1], 1), ordered(site.values["heads"], tensors, "bhnd")
    )
    for role in "qkv":
        made = projected(site, program, tensors, role)
        assert made is not None
        axes = "bnhd" if role == "q" else "bmhd"
        torch.testing.assert_close(made, ordered(site.values[role], tensors, axes).flatten(2))
    assert site.weights["o"].fqn == "out.weight"


# --- the fused node ---------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.proj(heads.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(
    ("options", "kind", "scale"), [({}, "bidirectional", 3**-0.5), ({"is_causal": True, "scale": 0.25}, "causal", 0.25)]
)
def test_fused(options: dict[str, Any], kind: str, scale: float) -> None:
    site = only(Fused(**options), torch.randn(B, N, D))
    assert (site.spelling, site.mask.kind, site.heads) == ("sdpa", kind, HEADS)
    assert site.scale == pytest.approx(scale)
    assert [site.weights[r].rows for r in "qkv"] == [(0, 12), (12, 24), (24, 36)]
    assert "scores" not in site.values


def test_dropout_is_that_of_training() -> None:
    model = Fused(dropout_p=0.25)
    assert found(model, torch.randn(B, N, D))[1][0].dropout == 0.25
    assert found(nn.MultiheadAttention(D, HEADS, dropout=0.5).eval(), *[torch.randn(N, B, D)] * 3)[1][0].dropout == 0.0


class Interleaved(Fused):
    """Bloom and GPT-NeoX: q, k and v of one head stand together."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3 * WIDTH)).transpose(1, 2).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_interleaved_rows_have_no_range() -> None:
    site = only(Interleaved(), torch.randn(B, N, D))
    assert set(site.weights) == {"qkv", "o"}
    assert site.weights["qkv"].rows is None


class Parameters(nn.Module):
    """Weights as bare parameters: one used with matmul, one with F.linear, one sliced out of another."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(D, D))
        self.wkv = nn.Parameter(torch.randn(2 * D, D))
        self.wo = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x @ self.wq, F.linear(x, self.wkv[:D]), F.linear(x, self.wkv[D:])
        q, k, v = (t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for t in (q, k, v))
        return (q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2) @ self.wo.T


def test_weights_that_are_parameters() -> None:
    site = only(Parameters(), torch.randn(B, N, D))
    assert [(w.fqn, w.orientation, w.rows) for w in (site.weights[r] for r in "qkvo")] == [
        ("wq", "in_out", None),
        ("wkv", "out_in", (0, 12)),
        ("wkv", "out_in", (12, 24)),
        ("wo", "out_in", None),
    ]


class Pixels(nn.Module):
    """The attention of a convolutional net: 1x1 convolutions, pixels as tokens, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv2d(D, D, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).flatten(2).mT, self.k(x).flatten(2), self.v(x).flatten(2).mT
        heads = torch.bmm(torch.softmax(torch.bmm(q, k) * D**-0.5, dim=2), v)
        return x + self.out(heads.mT.reshape(x.shape))


def test_convolutions_as_projections() -> None:
    site = only(Pixels(), torch.randn(B, D, 4, 4))
    assert site.heads == 1
    assert {w.orientation for w in site.weights.values()} == {"conv"}
    assert site.values["hidden"].axes == "bcyx"
    assert site.values["q"].axes == "bnd"


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_kv = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        kv = self.norm_kv(context)
        return x + self.attention(self.norm(x), kv, kv, need_weights=False)[0]


def test_cross_attention() -> None:
    site = only(Cross(), torch.randn(B, N, D), torch.randn(B, 7, D))
    assert site.cross
    assert site.owner == "attention"
    assert set(site.values) >= {"hidden", "hidden_kv", "out"}
    assert not only(
        Spelled(Spelling("matmul", "none", "none", "method", "matmul", "none", fused=False)), torch.randn(B, N, D)
    ).cross


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        angle = (torch.arange(x.shape[1])[:, None] * 100.0 ** -torch.arange(0, 1, 0.125)).repeat(1, 2)

        def turn(t: Tensor) -> Tensor:
            one, two = t.chunk(2, -1)
            return t * angle.cos() + torch.cat([-two, one], -1) * angle.sin()

        return F.scaled_dot_product_attention(turn(self.q(x)), turn(self.k(x)), x)


def test_rotary() -> None:
    site = only(Rotary(), torch.randn(B, N, 16))
    assert site.rotary
    assert site.weights["q"].fqn == "q.weight"
    assert not only(Fused(), torch.randn(B, N, D)).rotary


class Capped(nn.Module):
    """Gemma 2's soft cap and gpt-oss's sinks."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.mT * 0.5 / 30.0) * 30.0
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def test_soft_cap_and_sinks() -> None:
    program, (site,), _ = found(Capped(), *(torch.randn(B, HEADS, N, WIDTH) for _ in range(3)))
    assert site.soft_cap == pytest.approx(30.0)
    assert site.scale == pytest.approx(0.5)
    assert site.sinks
    assert site.mask.kind == "bidirectional"
    tensors = record(program)
    assert ordered(site.values["scores"], tensors, "bhnm").shape[-1] == N
    torch.testing.assert_close(
        ordered(site.values["weights"], tensors, "bhnm") @ ordered(site.values["v"], tensors, "bhmd"),
        tensors[site.core],
    )


class Changed(nn.Module):
    """Scores that are changed in some way on their way to the softmax."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.change(q @ k.mT * 0.5).softmax(-1) @ v


HIDDEN = torch.zeros(N, N).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)


@pytest.mark.parametrize(
    ("change", "scale", "cap"),
    [
        (lambda s: 3 * torch.tanh(s / 3), 0.5, 3),
        (lambda s: torch.tanh(s).float() * 3 / 2 + HIDDEN, 0.75, 1.5),
        (lambda s: torch.tanh(s), 0.5, 1),
        (lambda s: (s + HIDDEN).clamp(min=torch.finfo(torch.float32).min), 0.5, None),
        (lambda s: HIDDEN - s, -0.5, None),
        (lambda s: s.clamp(-2, 2), None, None),
        (lambda s: s.clamp(max=2), None, None),
        (lambda s: s.clamp(min=-2) + HIDDEN, None, None),
        (lambda s: torch.minimum(s, torch.tensor(2.0)), None, None),
        (lambda s: 3 * torch.tanh((s + HIDDEN) / 3), None, 3),
        (lambda s: torch.tanh(3 * torch.tanh(s)), None, 1),
    ],
)
def test_what_is_done_to_scores(change: Callable[[Tensor], Tensor], scale: float | None, cap: float | None) -> None:
    """A scale is told only where scores are cap * tanh(scale * q k / cap), or scale * q k, and masked behind it."""
    _, (site,), _ = found(Changed(change), *(torch.randn(B, HEADS, N, WIDTH) for _ in range(3)))
    assert site.scale == (None if scale is None else pytest.approx(scale))
    assert site.soft_cap == (None if cap is None else pytest.approx(cap))


class Twice(nn.Module):
    """One module called twice, and two attentions in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Fused()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.inner(x))
        y = (x @ x.mT).softmax(-1) @ x
        return (y @ x.mT).softmax(-1) @ x


def test_keys_are_unique_and_in_order() -> None:
    _, sites, _ = found(Twice(), torch.randn(B, N, D))
    assert [site.key for site in sites] == ["inner#0", "inner#0@1", "#0", "#1"]


# --- what is none -----------------------------------------------------------------------------------------------------


def _talking(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnm,gh->bgnm", (q @ k.mT).softmax(-1), torch.eye(HEADS)) @ v


def _differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) - 0.5 * (k @ q.mT).softmax(-1)) @ v


def _slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def _pointer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) + 0 * v.sum()


def _pooling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.sum(-1, keepdim=True).softmax(-2).mT @ v


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


@pytest.mark.parametrize(
    ("function", "codes"),
    [
        (_talking, ["GCC101"]),
        (_differential, ["GCC101", "GCC101"]),
        (_pooling, ["GCC102"]),
        (_pointer, ["GCC103"]),
        (_slots, ["GCC104"]),
    ],
)
def test_what_is_refused(function: Callable[[Tensor, Tensor, Tensor], Tensor], codes: list[str]) -> None:
    _, sites, refusals = found(Calls(function), *(torch.randn(B, HEADS, N, WIDTH) for _ in range(3)))
    assert not sites
    assert [r.code for r in refusals] == codes
    for refusal in refusals:
        assert refusal.kind == "attention"
        assert refusal.line.startswith("test_walk.py:")
        assert refusal.reason
        assert refusal.remedy


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.classifier = nn.Linear(D, 4), nn.Linear(D, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, index = self.gate(x).softmax(-1).topk(2, -1)
        return top / top.sum(-1, keepdim=True) + index, self.classifier(x).softmax(-1)


def test_routers_and_classifiers_are_not_mentioned() -> None:
    _, sites, refusals = found(Router(), torch.randn(B, N, D))
    assert not sites
    assert not refusals
