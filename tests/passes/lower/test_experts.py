"""experts: every spelling of a dispatch to stacked experts becomes one operator, and what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported, UserError

from gatecc import backend
from gatecc.passes import expert_formula
from gatecc.passes.causal import remembered
from gatecc.passes.lower import Outcome

D, H, E, K = 16, 24, 4, 2


class Mixture(nn.Module):
    """x: (B, N, 16) through 2 of 4 gated experts in stacks. Subclasses dispatch in one way each."""

    def __init__(self, experts: int = E, chosen: int = K, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.experts, self.chosen, self.activation = experts, chosen, activation
        self.gate = nn.Linear(D, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * H, D) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, D, H) * 0.3)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = self.gate(x).softmax(-1).topk(self.chosen, -1)
        return weights / weights.sum(-1, keepdim=True), indices

    def expert(self, x: Tensor, e: int) -> Tensor:
        gate, up = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(self.activation(gate) * up, self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D)
        return self.dispatched(rows, *self.routed(rows)).view(x.shape)

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x: (T, 16), weights and indices: (T, k)."""
        raise NotImplementedError


class Masks(Mixture):
    """All experts see all tokens."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        share = torch.einsum("tke,tk->te", F.one_hot(indices, self.experts).to(x.dtype), weights)
        y = torch.zeros_like(x)
        for e in range(self.experts):
            y = y + share[:, e : e + 1] * self.expert(x, e)
        return y


class Scattered(Mixture):
    """All at once, in einsums."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        share = torch.zeros(x.size(0), self.experts, device=x.device).scatter(-1, indices, weights)
        gate, up = torch.einsum("td,efd->tef", x, self.up).chunk(2, -1)
        y = torch.einsum("tef,edf->ted", self.activation(gate) * up, self.down)
        return (y * share.unsqueeze(-1)).sum(1)


class Gathered(Mixture):
    """The matrices that each token needs."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        gate, up = torch.einsum("td,tkfd->tkf", x, self.up[indices]).chunk(2, -1)
        y = torch.einsum("tkf,tkdf->tkd", self.activation(gate) * up, self.down[indices])
        return (y * weights.unsqueeze(-1)).sum(1)


class Loop(Mixture):
    """The tokens of each expert, added where they came from."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(self.experts):
            rows, slots = torch.where(indices == e)
            y.index_add_(0, rows, self.expert(x[rows], e) * weights[rows, slots, None])
        return y


class Dropping(Masks):
    """Experts that take no more than their share and a bit; what a token loses shows in its weights."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        hit = F.one_hot(indices.reshape(-1), self.experts)
        kept = (hit.cumsum(0) <= int(1.2 * indices.numel() / self.experts)) * hit
        kept = kept.view(*indices.shape, -1).gather(-1, indices.unsqueeze(-1)).squeeze(-1)
        return super().dispatched(x, weights * kept, indices)


class Room(Mixture):
    """The same, said per expert, with so much room that random choices fill no expert. What is dropped shows in the
    shares of all experts."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        hit = F.one_hot(indices, self.experts).sum(1)
        share = torch.einsum("tke,tk->te", F.one_hot(indices, self.experts).to(x.dtype), weights)
        share = share * (hit.cumsum(0) <= indices.size(0) - 1)
        return sum((share[:, e : e + 1] * self.expert(x, e) for e in range(self.experts)), torch.zeros_like(x))


class Capacity(Mixture):
    """The same, but it shows nowhere: what is dropped is so expert by expert."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        share = torch.einsum("tke,tk->te", F.one_hot(indices, self.experts).to(x.dtype), weights)
        y = torch.zeros_like(x)
        for e in range(self.experts):
            room = (indices == e).sum(-1).cumsum(0) <= indices.size(0) - 1
            y = y + (share[:, e] * room)[:, None] * self.expert(x, e)
        return y


class Different(Masks):
    """One expert has another activation."""

    def expert(self, x: Tensor, e: int) -> Tensor:
        gate, up = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear((gate.relu() if e == 2 else self.activation(gate)) * up, self.down[e])


def compiled(
    model: nn.Module, x: Tensor, *, dynamic: bool | None = None
) -> tuple[Any, list[Outcome], list[fx.GraphModule]]:
    """What the compiled model yields, what was said of it, and its graphs, which run operator by operator."""
    outcomes: list[Outcome] = []
    graphs: list[fx.GraphModule] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        found = backend.lower(graph_module, example)
        assert not found.faults
        outcomes.extend(o for o in found.outcomes if o.lowering == "experts")
        graphs.append(found.graph)
        return found.graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=spy, dynamic=dynamic)(x), outcomes, graphs


def operators(graphs: list[fx.GraphModule]) -> list[str]:
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def assert_the_same(model: nn.Module, x: Tensor, found: Any) -> None:
    """Result and all gradients."""
    expected = model(x)
    expected, found = (y[0] if isinstance(y, tuple) else y for y in (expected, found))
    assert (expected - found).abs().max() <= 3e-6 * expected.abs().max()
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def input_(tokens: int = 9) -> Tensor:
    return torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("spelling", [Masks, Scattered, Gathered, Loop, Dropping, Room])
def test_spellings_by_hand(spelling: type[Mixture]) -> None:
    torch.manual_seed(0)
    model, x = spelling(), input_()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        y, (outcome,), graphs = compiled(model, x)
    assert outcome.became == "gatecc::moe_ffn"
    assert "silu, halves" in outcome.reason
    names = str(operators(graphs))
    assert "moe_ffn" in names
    assert not any(name in names for name in ("chunk", "where", "index", "scatter", "assert", "sym_size"))
    assert_the_same(model, x, y)


def test_what_is_dropped_stays_dropped() -> None:
    """All tokens take the same experts, which have room for all but one."""
    torch.manual_seed(0)
    model, x = Room(), input_()[:, :1].expand(2, 9, D).contiguous()
    y, (outcome,), _ = compiled(model, x)
    assert outcome.became
    assert not y[-1, -1].any()
    assert_the_same(model, x, y)


class Repeated(nn.Module):
    """Llama 4: every expert is handed its share of every token, so that weights stand inside of the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.bank = nn.Linear(D, E, bias=False), Bank()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D)
        weights, indices = self.gate(rows).topk(1, -1)
        share = torch.zeros(rows.size(0), E).scatter(-1, indices, weights.sigmoid()).t().reshape(-1, 1)
        return self.bank(rows.repeat(E, 1) * share).view(E, *x.shape).sum(0)


class Bank(nn.Module):
    """x: (E T, 16), T rows per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, D, 2 * H) * 0.3), nn.Parameter(torch.randn(E, H, D) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.bmm(x.view(E, -1, D), self.up).chunk(2, -1)
        return torch.bmm(F.silu(gate) * up, self.down).view(-1, D)


def test_repeated_tokens_stay() -> None:
    model, x = Repeated(), input_()
    y, outcomes, _ = compiled(model, x)
    assert all(outcome.reason and not outcome.became for outcome in outcomes)
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("spelling", [Capacity, Different])
def test_what_only_looks_like_it_stays(spelling: type[Mixture]) -> None:
    torch.manual_seed(0)
    model, x = spelling(), input_()
    y, (outcome,), graphs = compiled(model, x)
    assert outcome.became == ""
    assert "differs" in outcome.reason
    assert "moe_ffn" not in str(operators(graphs))
    assert torch.equal(y, model(x))


@settings(max_examples=4)
@given(st.integers(1, 12), st.integers(2, 6), st.data(), st.sampled_from([F.silu, F.gelu, torch.tanh, F.relu]))
def test_any_sizes(tokens: int, experts: int, data: st.DataObject, activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(tokens)
    model, x = Scattered(experts, data.draw(st.integers(1, experts)), activation), input_(tokens)
    y, (outcome,), _ = compiled(model, x)
    assert outcome.became, outcome.reason
    assert (y - model(x)).abs().max() <= 3e-6 * y.abs().max()


def test_wide_experts_are_tried_as_narrow_ones() -> None:
    """Else the proof takes longer than the model runs."""
    sizes: list[dict[int, int]] = []
    narrow = expert_formula.narrow
    model = Masks()
    model.gate = nn.Linear(640, E, bias=False)
    model.up, model.down = nn.Parameter(torch.randn(E, 400, 640) * 0.1), nn.Parameter(torch.randn(E, 640, 200) * 0.1)
    x = torch.randn(5, 640)
    model.forward = lambda x: model.dispatched(x, *model.routed(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_formula, "narrow", lambda *args: sizes.append(narrow(*args)) or sizes[-1])
        y, (outcome,), _ = compiled(model, x)
    assert outcome.became, outcome.reason
    assert sizes[-1] == {640: 24, 200: 40, 400: 80}
    assert_the_same(model, x, y)


class Wide(Gathered):
    """Tokens as wide as gate and up together: (T, 64)."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__(activation=activation)
        self.gate = nn.Linear(64, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, 64, 64) * 0.1), nn.Parameter(torch.randn(E, 64, 32) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dispatched(x, *self.routed(x))


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows with each proof that holds by its activation."""
    made: list[str] = []
    prove = expert_formula._proved

    def counted(*args: Any, **options: Any) -> Any:
        found = prove(*args, **options)
        made.append(found[0])
        return found

    remembered.forget()
    monkeypatch.setattr(expert_formula, "_proved", counted)
    yield made
    remembered.forget()


def test_equal_widths_are_tried_as_equal_ones_and_layers_that_are_alike_once(proofs: list[str]) -> None:
    torch.manual_seed(0)
    sizes: list[dict[int, int]] = []
    model, x, narrow = nn.Sequential(Wide(), Wide(), Wide(F.gelu)), torch.randn(32, 64), expert_formula.narrow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_formula, "narrow", lambda *args: sizes.append(narrow(*args)) or sizes[-1])
        y, outcomes, _ = compiled(model, x, dynamic=True)
    assert all(outcome.became for outcome in outcomes)
    assert [outcome.reason.split(": ")[1] for outcome in outcomes] == ["silu, halves", "silu, halves", "gelu, halves"]
    assert proofs == ["silu", "gelu"]
    assert all(given == {64: 80, 32: 40} for given in sizes)
    assert_the_same(model, x, y)
    compiled(model[:1], x, dynamic=True)
    assert len(proofs) == 2


def test_layers_that_differ_by_a_number_are_not_taken_for_another(proofs: list[str]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Wide(), Wide(lambda x: F.silu(x) * 1.5), Wide()), torch.randn(20, 64)
    y, outcomes, _ = compiled(model, x)
    assert [bool(outcome.became) for outcome in outcomes] == [True, False, True]
    assert proofs == ["silu"]
    assert_the_same(model, x, y)


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [("mixtral", "grouped_mm"), ("gpt_oss", "batched_mm"), ("deepseek_v3", "grouped_mm"), ("gpt_oss", "eager")],
)
def test_transformers(architecture: str, implementation: str) -> None:
    pytest.importorskip("transformers")
    from tests.ir.match.test_routing import X, block

    mixture, found = block(architecture, implementation), []
    lower = backend.lower

    def spy(*args: Any) -> Any:
        found.append(lower(*args))
        return found[-1]

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatecc.backend.compile.lower", spy)
        y = torch.compile(mixture, backend="gatecc", mode="aot_eager", fullgraph=True)(X)
    (outcome,) = [o for o in found[0].outcomes if o.lowering == "experts"]
    assert outcome.became == "gatecc::moe_ffn"
    assert_the_same(mixture, X, y)


def test_other_backends_run_the_loop_of_transformers() -> None:
    pytest.importorskip("transformers")
    from tests.ir.match.test_routing import X, block

    mixture = block("mixtral", "eager")
    torch._dynamo.reset()
    with pytest.raises((Unsupported, UserError)):
        torch.compile(mixture, backend="aot_eager", fullgraph=True)(X)


def test_explain_sees_what_is_compiled() -> None:
    pytest.importorskip("transformers")
    from tests.ir.match.test_routing import X, block

    report = backend.explain(block("mixtral", "eager"), (X,))
    assert not report.breaks
    assert [row.became for row in report.lowered if row.lowering == "experts"] == ["gatecc::moe_ffn"]
