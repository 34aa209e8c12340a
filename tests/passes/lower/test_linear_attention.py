"""linear-attention: the spellings that people write become one operator, and what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from gatecc import backend
from gatecc.backend.options import Options
from gatecc.ir.ops import opname
from gatecc.passes.lower import Outcome

C = 8  # tokens of a chunk


# --- the spellings; q, k: (B, H, N, D), v: (B, H, N, E), g: (B, H, N, D) or (B, H, N), b: (B, H, N) ----------------


def token_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = q.new_zeros(*q.shape[:2], q.size(-1), v.size(-1)), []
    for t in range(q.size(2)):
        state = state * g[:, :, t].exp().unsqueeze(-1) + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((q[:, :, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(out, 2) * q.size(-1) ** -0.5


def written_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The state is multiplied by sigmoids, and each token is written into its place."""
    o, state = torch.zeros_like(v), torch.zeros(*q.shape[:2], q.size(-1), v.size(-1))
    for t in range(q.size(2)):
        state = state * g[:, :, t, None, None].sigmoid() + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        o[:, :, t] = torch.einsum("bhk,bhkv->bhv", q[:, :, t], state)
    return o


def delta_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> Tensor:
    k, b = F.normalize(k, dim=-1), b.sigmoid()
    state, out = q.new_zeros(*q.shape[:2], q.size(-1), v.size(-1)), []
    for t in range(q.size(2)):
        state = state * g[:, :, t].exp()[..., None, None]
        read = (state * k[:, :, t].unsqueeze(-1)).sum(-2)
        state = state + k[:, :, t].unsqueeze(-1) * (b[:, :, t, None] * (v[:, :, t] - read)).unsqueeze(-2)
        out.append((state * q[:, :, t].unsqueeze(-1)).sum(-2))
    return torch.stack(out, 2)


def sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    norm = 1 / (torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2)) + 1e-3)
    return torch.einsum("bhnd,bhnde,bhn->bhne", q, states, norm)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).tril() @ v


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = torch.log(1 - 2.0 ** (-2 - torch.arange(q.size(1))))
    place = torch.arange(q.size(2))
    distance = place[:, None] - place
    weights = torch.where(distance >= 0, (decay[:, None, None] * distance.clamp_min(0)).exp(), 0.0)
    return ((q @ k.transpose(-1, -2)) * weights * q.size(-1) ** -0.5) @ v


def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    B, H, N, D = q.shape
    q, k, v, g = (x.reshape(B, H, N // C, C, -1) for x in (q * D**-0.5, k, v, g))
    b = g.cumsum(-2)
    q, state, out = q * b.exp(), torch.zeros(B, H, D, v.size(-1)), []
    inner = (q @ (k * (-b).exp()).transpose(-1, -2)).tril() @ v
    kept = k * (b[..., -1:, :] - b).exp()
    for c in range(N // C):
        out.append(q[:, :, c] @ state + inner[:, :, c])
        state = state * b[:, :, c, -1].exp().unsqueeze(-1) + kept[:, :, c].transpose(-1, -2) @ v[:, :, c]
    return torch.stack(out, 2).view(B, H, N, -1)


def chunks_by_head(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One gate a head, padded to whole chunks, all chunks at once: a decay for each pair of chunks."""
    N = q.size(2)
    q, k, v = (F.pad(x, (0, 0, 0, -N % C)).unflatten(2, (-1, C)) for x in (q, k, v))
    b = F.pad(g, (0, -N % C)).unflatten(2, (-1, C)).cumsum(-1)
    pairs = (b.unsqueeze(-1) - b.unsqueeze(-2)).tril().exp().tril()
    inner = (q @ k.transpose(-1, -2) * pairs) @ v
    states = torch.einsum("bhncd,bhnc,bhnce->bhnde", k, (b[..., -1:] - b).exp(), v)
    total = F.pad(b[..., -1], (1, 0)).cumsum(-1)
    gap = total[..., :-1].unsqueeze(-1) - total[..., 1:].unsqueeze(-2)
    before = torch.ones(gap.size(-1), gap.size(-1), dtype=torch.bool).tril(-1)
    start = torch.einsum("bhnm,bhmde->bhnde", torch.where(before, gap, -torch.inf).exp(), states)
    return (inner + b.unsqueeze(-1).exp() * (q @ start)).flatten(2, 3)[:, :, :N]


# --- what looks like it -----------------------------------------------------------------------------------------------


def everyone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)[:, :, -1]


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    states = states - F.pad(states, (0, 0, 0, 0, 9, 0))[:, :, :-9]
    return torch.einsum("bhnd,bhnde->bhne", q, states)


def state_dependent(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, out = q.new_zeros(*q.shape[:2], q.size(-1), v.size(-1)), []
    for t in range(q.size(2)):
        decay = (g[:, :, t].exp() * state.mean((-1, -2), keepdim=False).unsqueeze(-1).sigmoid()).unsqueeze(-1)
        state = state * decay + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((q[:, :, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(out, 2)


def bounded_gates(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Sums of gates are bounded: what is forgotten most is not forgotten more."""
    b = g.cumsum(2).clamp_min(-5.0)
    weights = torch.einsum("bhnd,bhmd,bhnmd->bhnm", q, k, (b.unsqueeze(3) - b.unsqueeze(2)).exp())
    return weights.tril() @ v


def stopped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).tril().detach() @ v


class Mixer(nn.Module):
    """A spelling on projections of x: (B, N, width); ``gate``: how many numbers a token and head it takes."""

    def __init__(
        self, core: Callable[..., Tensor], gate: str = "", heads: int = 2, key: int = 4, value: int = 6, width: int = 10
    ) -> None:
        super().__init__()
        self.core, self.gate, self.heads, self.kind = core, gate, heads, gate
        self.q, self.k = nn.Linear(width, heads * key), nn.Linear(width, heads * key)
        self.v, self.out = nn.Linear(width, heads * value), nn.Linear(heads * value, width)
        if gate:
            self.g = nn.Linear(width, heads * key if gate == "channel" else heads)
        if gate == "delta":
            self.b = nn.Linear(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        gates: list[Tensor] = []
        if self.gate:
            g = F.logsigmoid(self.g(x))
            gates.append(g.unflatten(-1, (self.heads, -1)).transpose(1, 2) if self.gate == "channel" else g.mT)
        if self.gate == "delta":
            gates.append(self.b(x).mT)
        return self.out(self.core(q, k, v, *gates).transpose(1, 2).flatten(2))


def compiled(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, list[Outcome], list[fx.Node]]:
    """What the compiled model yields, what was said of it, and the calls of its graphs."""
    outcomes: list[Outcome] = []
    calls: list[fx.Node] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        found = backend.lower(graph_module, example, Options(lowerings=("linear-attention",)))
        assert not found.faults
        outcomes.extend(o for o in found.outcomes if o.lowering == "linear-attention")
        calls.extend(n for n in found.graph.graph.nodes if n.op == "call_function")
        return found.graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=spy, **options)(x), outcomes, calls


def input_(tokens: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 10, generator=torch.Generator().manual_seed(tokens))


SPELLINGS = {
    token_loop: "channel",
    written_loop: "head",
    delta_loop: "delta",
    sums: "",
    masked: "",
    retention: "",
    chunks: "channel",
    chunks_by_head: "head",
}


@pytest.mark.parametrize("core", SPELLINGS)
def test_spellings(core: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Mixer(core, SPELLINGS[core]), input_(8 if "loop" in core.__name__ else 16)
    y, outcomes, calls = compiled(model, x)
    assert [o.became for o in outcomes] == ["gatecc::linear_attention"] * (2 if core is sums else 1)
    names = str([n.target for n in calls])
    assert "linear_attention" in names
    assert not any(name in names for name in ("select", "cumsum", "tril", "where", "copy_", "stack"))
    expected = model(x)
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()
    parameters = dict(model.named_parameters())
    ours, theirs = (torch.autograd.grad(out.square().sum(), list(parameters.values())) for out in (y, expected))
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        assert (one - other).abs().max() <= 2e-5 * max(float(other.abs().max()), 1e-2), name


@pytest.mark.parametrize(
    ("core", "gate", "reason"),
    [
        (window, "", "differs"),
        (state_dependent, "channel", "differs"),
        (bounded_gates, "channel", "differs"),
        (stopped, "", "gradients are stopped"),
        (everyone, "", None),
    ],
)
def test_what_only_looks_like_it_stays(core: Callable[..., Tensor], gate: str, reason: str | None) -> None:
    torch.manual_seed(0)
    model, x = Mixer(core, gate), input_(8 if core is state_dependent else 16)
    y, outcomes, calls = compiled(model, x)
    assert not any(o.became for o in outcomes)
    assert reason is None or reason in outcomes[0].reason
    assert "linear_attention" not in str([n.target for n in calls])
    assert torch.equal(y, model(x))


@settings(max_examples=3)
@given(st.sampled_from([chunks, chunks_by_head, retention]), st.integers(1, 3), st.integers(2, 5), st.integers(1, 5))
def test_any_sizes(core: Callable[..., Tensor], heads: int, key: int, value: int) -> None:
    torch.manual_seed(heads)
    model, x = Mixer(core, SPELLINGS[core], heads, key, value), input_(24, heads)
    y, (outcome, *_), _ = compiled(model, x)
    assert outcome.became, outcome.reason
    assert (y - model(x)).abs().max() <= 3e-6 * y.abs().max()


def test_one_graph_for_all_lengths() -> None:
    model = Mixer(sums)
    y, outcomes, calls = compiled(model, input_(), dynamic=True)
    assert [o.became for o in outcomes] == ["gatecc::linear_attention"] * 2
    assert torch.allclose(y, model(input_()), atol=1e-6)
    assert any(isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].shape[1:2] != (16,) for n in calls)


def test_scales_gate_activations_and_padding_are_the_operators() -> None:
    """q * D**-0.5 is its scale, logsigmoid(x) / 16 its gate activation, and padding to whole chunks needs nobody."""

    def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return chunks_by_head(q * q.size(-1) ** -0.5, k / 3, v, F.logsigmoid(-g) / 16)

    model, x = Mixer(gated, "head"), input_(19)
    y, (outcome,), calls = compiled(model, x)
    assert outcome.found == "gated linear attention, scale 1"
    (call,) = (n for n in calls if "linear_attention" in str(n.target))
    assert call.kwargs["scale"] == pytest.approx(4**-0.5 / 3)
    assert call.kwargs["gate_normalizer"] == 16
    names = [opname(n) for n in calls]
    assert not {"mul", "div", "pad", "slice"}.intersection(names)
    assert names.count("log_sigmoid") == 1  # that of the mixer
    expected = model(x)
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()


def long_window(q: Tensor, k: Tensor, v: Tensor, reach: int = 100) -> Tensor:
    """On 16 tokens it is all that came before."""
    place = torch.arange(q.size(2))
    distance = place[:, None] - place
    return (q @ k.transpose(-1, -2)).masked_fill((distance < 0) | (distance > reach), 0.0) @ v


def longer_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return long_window(q, k, v, 100_000)


def mean_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scale is that of one length."""
    return (q @ k.transpose(-1, -2) / q.size(2)).tril() @ v


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (long_window, "the length is free, and at 403 tokens it differs"),
        (longer_window, "may count more tokens"),
        (mean_of_all, "the length is free, and at 67 tokens it differs"),
    ],
)
def test_what_holds_at_one_length_alone_is_not_accepted_where_the_length_is_free(
    core: Callable[..., Tensor], reason: str
) -> None:
    x = input_()
    y, (outcome,), _ = compiled(model := Mixer(core), x, dynamic=True)
    assert reason in outcome.reason
    assert torch.equal(y, model(x))
    _, (outcome,), _ = compiled(model, x)
    assert outcome.became  # of this length, it is


@pytest.mark.parametrize("core", [retention, chunks_by_head])
def test_a_free_length(core: Callable[..., Tensor]) -> None:
    model = Mixer(core, SPELLINGS[core])
    y, outcomes, calls = compiled(model, x := input_(19), dynamic=True)
    assert [o.became for o in outcomes] == ["gatecc::linear_attention"], outcomes
    assert not any(name in str([n.target for n in calls]) for name in ("tril", "where"))
    expected = model(x)
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()


def gated_delta_net() -> nn.Module:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    heads: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    sizes: dict[str, Any] = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_attention_heads": 4}
    return Qwen3NextGatedDeltaNet(Qwen3NextConfig(hidden_size=32, num_hidden_layers=2, **heads, **sizes), 0)


def mamba2() -> nn.Module:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(hidden_size=32, num_heads=8, head_dim=8, state_size=16, n_groups=2, chunk_size=16, expand=2)
    return Mamba2Mixer(config, 0)


@pytest.mark.parametrize("layer", [gated_delta_net, mamba2])
def test_transformers(layer: Callable[[], nn.Module]) -> None:
    """Behind their short convolutions, which mix tokens as well."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, x = layer().eval(), torch.randn(1, 72, 32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        y, (outcome,), calls = compiled(model, x)
        eager = model(x)
        exact = model.double()(x.double())
    assert outcome.became, outcome.reason
    names = str([n.target for n in calls])
    assert not any(name in names for name in ("cumsum", "triangular", "masked_fill", "copy_"))
    assert (y - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6 * exact.abs().max()
