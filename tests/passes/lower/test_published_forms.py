"""Forms in which linear attention is published, written from the papers' equations: found, right, and trained right.

Errors are held against float64: of outputs and of all gradients, no more than twice those of the form itself, and one
epsilon. Where one decay holds for all tokens, one epsilon for each second token that the state remembers: the operator
takes the logarithm, and how exp of it is rounded is the same error at each token, where the forms have numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.passes.causal import unlike
from tests.passes.lower.test_linear_attention import compiled

H, K, V, C = 2, 4, 6, 4  # heads, features of keys and values, tokens of a chunk


class Layer(nn.Module):
    """A form on projections of x: (B, N, 10). ``gamma``: buffer, decays of heads; ``rate``, ``w``: learned ones."""

    gamma: Tensor

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v = nn.Linear(10, H * K), nn.Linear(10, H * K), nn.Linear(10, H * V)
        self.per_channel, self.per_head, self.strength = nn.Linear(10, H * K), nn.Linear(10, H), nn.Linear(10, H)
        self.register_buffer("gamma", 1 - 2.0 ** (-2 - torch.arange(H)))
        sizes = ((H,), (H, K), (H, K), (H, K, V))
        self.rate, self.w, self.u, self.rates = (nn.Parameter(torch.randn(s) * 0.3 - 1) for s in sizes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.form(self, x, q, k, v).transpose(1, 2).flatten(2)

    def channels(self, x: Tensor) -> Tensor:
        """(B, H, N, K) log decays."""
        return F.logsigmoid(self.per_channel(x)).unflatten(-1, (H, -1)).transpose(1, 2)

    def beta(self, x: Tensor) -> Tensor:
        """(B, H, N, 1)."""
        return self.strength(x).sigmoid().mT.unsqueeze(-1)


def empty(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(*q.shape[:2], q.size(3), v.size(3))


def outer(k: Tensor, v: Tensor, t: int) -> Tensor:
    return k[:, :, t, :, None] * v[:, :, t, None]


def read(q: Tensor, state: Tensor, t: int) -> Tensor:
    return (q[:, :, t, :, None] * state).sum(-2)


def retention(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RetNet (Sun et al., 2023), parallel: a buffer (H,) spread to all pairs of tokens."""
    place = torch.arange(q.size(2))
    distance = place[:, None] - place
    decay = torch.where(distance >= 0, layer.gamma[:, None, None] ** distance.clamp_min(0), 0.0)
    return (q @ k.mT * K**-0.5 * decay) @ v


def retention_of_logarithms(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.size(2), dtype=q.dtype)
    return ((q @ k.mT) * (layer.gamma.log()[:, None, None] * (place[:, None] - place)).exp().tril()) @ v


def retention_by_token(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = empty(q, v), []
    for t in range(q.size(2)):
        state = layer.gamma[None, :, None, None] * state + outer(k, v, t)
        out.append((q[:, :, t, None] @ state).squeeze(-2))
    return torch.stack(out, 2)


def retention_in_chunks(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place, g = torch.arange(C), layer.gamma
    inner = torch.where(place[:, None] >= place, g[:, None, None] ** (place[:, None] - place).clamp_min(0), 0.0)
    cross, kept, whole = g[:, None] ** (place + 1), g[:, None] ** (C - 1 - place), g**C
    state, out = empty(q, v), []
    for q_, k_, v_ in zip(q.split(C, 2), k.split(C, 2), v.split(C, 2), strict=True):
        out.append((q_ @ k_.mT * inner) @ v_ + (q_ @ state) * cross[..., None])
        state = state * whole[:, None, None] + (k_ * kept[..., None]).mT @ v_
    return torch.cat(out, 2)


def learned_rates(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = empty(q, v), []
    for t in range(q.size(2)):
        state = state * (-layer.rate.exp()).exp()[:, None, None] + outer(k, v, t)
        out.append(read(q, state, t))
    return torch.stack(out, 2)


def learned_rates_of_channels(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = empty(q, v), []
    for t in range(q.size(2)):
        state = state * (-layer.w.exp()).exp()[..., None] + outer(k, v, t)
        out.append(read(q, state, t))
    return torch.stack(out, 2)


def gated_all_at_once(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GLA (Yang et al., 2023), parallel: exact while sums of gates do not overflow."""
    b = layer.channels(x).cumsum(2)
    return ((q * b.exp()) @ (k * (-b).exp()).mT).tril() @ v


def gated_with_tokens_first(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, H, D), as fla lays its tensors out."""
    q, k, v, g = (y.transpose(1, 2) for y in (q, k, v, layer.channels(x)))
    state, out = torch.zeros(x.size(0), H, K, V, dtype=x.dtype), []
    for q_, k_, v_, g_ in zip(q.unbind(1), k.unbind(1), v.unbind(1), g.unbind(1), strict=True):
        state = torch.einsum("bhk,bhv->bhkv", k_, v_) + state * g_.exp()[..., None]
        out.append(torch.einsum("bhk,bhkv->bhv", q_, state))
    return torch.stack(out, 1).transpose(1, 2)


def delta(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeltaNet (Schlag et al., 2021)."""
    k, b, state, out = F.normalize(k, dim=-1), layer.beta(x), empty(q, v), []
    for t in range(q.size(2)):
        change = (v[:, :, t] - read(k, state, t)) * b[:, :, t]
        state = state + k[:, :, t, :, None] * change.unsqueeze(-2)
        out.append(read(q, state, t))
    return torch.stack(out, 2)


def delta_in_chunks(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The WY form (Yang et al., 2024), its triangular system solved row by row."""
    k, b = F.normalize(k, dim=-1), layer.beta(x)
    q, k, v, b = (y.unflatten(2, (-1, C)) for y in (q, k, v, b))
    rows = -(k * b @ k.mT).tril(-1)
    for i in range(1, C):
        rows[..., i, :i] = rows[..., i, :i] + (rows[..., i, :, None].clone() * rows[..., :, :i].clone()).sum(-2)
    solved = rows + torch.eye(C, dtype=x.dtype)
    u, w = solved @ (v * b), solved @ (k * b)
    state, out = q.new_zeros(*q.shape[:2], K, V), []
    for c in range(q.size(2)):
        new = u[:, :, c] - w[:, :, c] @ state
        out.append(q[:, :, c] @ state + (q[:, :, c] @ k[:, :, c].mT).tril() @ new)
        state = state + k[:, :, c].mT @ new
    return torch.stack(out, 2).flatten(2, 3)


def delta_solved(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, b = F.normalize(k, dim=-1), layer.beta(x)
    system = torch.eye(q.size(2), dtype=x.dtype) + (k * b @ k.mT).tril(-1)
    return (q @ k.mT).tril() @ torch.linalg.solve_triangular(system, v * b, upper=False)


def gated_delta_of_channels(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kimi Delta Attention: a gate per channel."""
    k, b, g, state, out = F.normalize(k, dim=-1), layer.beta(x), layer.channels(x), empty(q, v), []
    for t in range(q.size(2)):
        state = state * g[:, :, t, :, None].exp()
        state = state + k[:, :, t, :, None] * ((v[:, :, t] - read(k, state, t)) * b[:, :, t]).unsqueeze(-2)
        out.append(read(q, state, t))
    return torch.stack(out, 2)


# --- what is another function: each says so -------------------------------------------------------------------------


def with_a_bonus(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RWKV-6 (Peng et al., 2024): a token reads the state before it, and itself with another weight."""
    w, state, out = layer.channels(x).exp(), empty(q, v), []
    for t in range(q.size(2)):
        out.append(read(q, state + layer.u[..., None] * outer(k, v, t), t))
        state = state * w[:, :, t, :, None] + outer(k, v, t)
    return torch.stack(out, 2)


def with_another_direction(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RWKV-7 (2025): what is removed is read along one vector and written along another."""
    w, a, away, state, out = layer.channels(x).exp(), layer.channels(x).exp(), F.normalize(k, dim=-1), empty(q, v), []
    for t in range(q.size(2)):
        gone = (a * away)[:, :, t, :, None] * read(away, state, t).unsqueeze(-2)
        state = state * w[:, :, t, :, None] - gone + outer(k, v, t)
        out.append(read(q, state, t))
    return torch.stack(out, 2)


def normalized_by_the_largest(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xLSTM (Beck et al., 2024), parallel."""
    f, i = F.logsigmoid(layer.per_head(x)).mT.cumsum(-1), layer.strength(x).mT
    unseen = ~torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
    logs = (f[..., :, None] - f[..., None, :] + i[..., None, :]).masked_fill(unseen, -torch.inf)
    largest = logs.amax(-1, keepdim=True)
    scores = (q @ k.mT) * (logs - largest).exp()
    return (scores / torch.maximum(scores.sum(-1, keepdim=True).abs(), (-largest).exp())) @ v


def of_second_order(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Based (Arora et al., 2024), parallel: the second-order Taylor series of exp."""
    scores = q @ k.mT * K**-0.5
    return (1 + scores + scores.square() / 2).tril() @ v


def decayed_by_pairs(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mamba (Gu & Dao, 2023): a step size per value channel, a rate for each pair of it with a key channel."""
    rates, steps, state, out = -layer.rates.exp(), F.softplus(v), empty(q, v), []
    for t in range(q.size(2)):
        state = state * (steps[:, :, t, None] * rates).exp() + outer(k, v, t)
        out.append(read(q, state, t))
    return torch.stack(out, 2)


def of_exponentials(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RWKV-4 (Peng et al., 2023): an average by exponentials, with a bonus for the token itself."""
    k, u, w = k[..., :1], layer.u[:, :1, None], (-layer.w[:, :1, None].exp()).exp()
    total, weight, out = torch.zeros_like(v[:, :, :1]), torch.zeros_like(k[:, :, :1]), []
    for t in range(q.size(2)):
        one, own = k[:, :, t, None].exp(), (k[:, :, t, None] + u).exp()
        out.append((total + own * v[:, :, t, None]) / (weight + own))
        total, weight = total * w + one * v[:, :, t, None], weight * w + one
    return torch.cat(out, 2) * q.mean(-1, keepdim=True).sigmoid()


FORMS = [
    retention, retention_of_logarithms, retention_by_token, retention_in_chunks, learned_rates,
    learned_rates_of_channels, gated_all_at_once, gated_with_tokens_first, delta, delta_in_chunks, delta_solved,
    gated_delta_of_channels,
]  # fmt: skip


CONSTANT = FORMS[:6]  # one decay for all tokens
REMEMBERED = 8  # tokens: 1 / (1 - the largest gamma)


def errors(layer: Layer, x: Tensor, y: Tensor, exact: list[Tensor]) -> list[float]:
    """The largest of the output's and of each gradient's, relative to the largest number."""
    weights = [p for p in layer.parameters() if p.requires_grad]
    found = [y, *torch.autograd.grad(y.square().sum(), weights, materialize_grads=True)]
    given = [(a, b) for a, b in zip(found, exact, strict=True) if bool(b.any())]
    return [float(((a.double() - b).abs().max() / b.abs().max()).detach()) for a, b in given]


@pytest.mark.parametrize("form", FORMS)
def test_published_forms(form: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    layer, x = Layer(form), torch.randn(2, 12, 10)
    twin = Layer(form).double()
    twin.load_state_dict(layer.state_dict())
    y = twin(x.double())
    exact = [y, *torch.autograd.grad(y.square().sum(), list(twin.parameters()), materialize_grads=True)]
    lowered, (outcome,), calls = compiled(layer, x)
    assert outcome.became, outcome.reason
    assert outcome.assumes == ()
    assert not any(sign in str([n.target for n in calls]) for sign in ("select", "cumsum", "tril", "where", "pow"))
    ours, theirs = errors(layer, x, lowered, exact), errors(layer, x, layer(x), exact)
    allowed = torch.finfo(torch.float32).eps * (REMEMBERED / 2 if form in CONSTANT else 1)
    assert all(one <= 2 * other + allowed for one, other in zip(ours, theirs, strict=True))


OTHERS = {
    with_a_bonus: unlike.BONUS,
    with_another_direction: unlike.TRANSITION,
    normalized_by_the_largest: unlike.NORMALIZED,
    of_second_order: unlike.SECOND_ORDER,
    decayed_by_pairs: unlike.PAIRS,
    of_exponentials: unlike.AVERAGE,
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_functions_stay_and_say_why(form: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    layer, x = Layer(form), torch.randn(2, 12, 10)
    y, outcomes, calls = compiled(layer, x)
    assert len(outcomes) == 1
    assert not outcomes[0].became
    assert outcomes[0].reason.endswith(OTHERS[form])
    assert "linear_attention" not in str([n.target for n in calls])
    assert torch.equal(y, layer(x))


def rwkv() -> nn.Module:
    import transformers as hf

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    return hf.RwkvModel(hf.RwkvConfig(**sizes, intermediate_size=24, context_length=64))


def mamba() -> nn.Module:
    import transformers as hf

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return hf.MambaModel(hf.MambaConfig(**sizes, time_step_rank=4, use_associative_scan=False))


def xlstm() -> nn.Module:
    import transformers as hf

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_blocks": 1, "num_heads": 2, "chunk_size": 16}
    kernels: dict[str, Any] = {
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
    }
    return hf.xLSTMModel(hf.xLSTMConfig(**sizes, **kernels, step_kernel="native"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(rwkv, unlike.NONLINEAR), (mamba, unlike.PAIRS), (xlstm, unlike.NORMALIZED)],
    ids=["rwkv", "mamba", "xlstm"],
)
def test_recurrences_of_transformers_that_stay_say_why(make: Callable[[], nn.Module], reason: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    with torch.no_grad():
        report = gatecc.explain(make().eval(), {"input_ids": torch.randint(0, 32, (1, 10)), "use_cache": False})
    found = [row for row in report.lowered if row.lowering == "linear-attention"]
    assert found
    assert all(not row.became and row.reason.endswith(reason) for row in found)


def lightning_attention() -> nn.Module:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    kinds: dict[str, Any] = {"layer_types": ["linear_attention"] * 4, "block_size": 16}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return MiniMaxLightningAttention(MiniMaxConfig(hidden_size=32, num_hidden_layers=4, **heads, **kinds), 0)


def test_decays_that_are_buffers_are_read_and_watched() -> None:
    """MiniMax's lightning attention: four buffers of decays, none of which can be told from the others' names."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, x = lightning_attention().eval(), torch.randn(1, 40, 32)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, None, None)[0]

    def checked(y: Tensor) -> None:
        exact = copy.deepcopy(alone).double()(x.double())
        one, other = ((found - exact).abs().max() / exact.abs().max() for found in (y, alone(x)))
        assert one <= 2 * other + torch.finfo(torch.float32).eps * x.size(1) / 2

    alone = Alone()
    with torch.no_grad():
        y, (outcome,), _ = compiled(alone, x)
        assert outcome.became, outcome.reason
        assert len(outcome.assumes) == 4
        checked(y)
        torch._dynamo.reset()
        run = torch.compile(alone, backend="gatecc", mode="aot_eager")
        assert torch.equal(run(x), y)
        model.slope_rate.mul_(3)  # pyright: ignore[reportCallIssue]  a buffer
        checked(run(x))
