"""expert-modules: experts of a list, in every spelling, become one operator; each expert's own weights learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc import backend
from gatecc.backend.options import Options
from gatecc.passes.lower import Outcome
from tests.passes.lower.test_experts import assert_the_same, operators

D, H, E, K = 16, 24, 4, 2


class Gated(nn.Module):
    """One expert, whose gate is used last."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias) for sizes in ((D, H), (H, D), (D, H)))

    def forward(self, x: Tensor) -> Tensor:
        up = self.w3(x)
        return self.w2(F.silu(self.w1(x)) * up)


class Fused(nn.Module):
    """One expert, gate and up in one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.enter(x).chunk(2, -1)
        return self.leave(F.gelu(gate) * up)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


class Mixture(nn.Module):
    """x: (B, N, 16) through 2 of 4 experts of a list. Subclasses dispatch in one way each."""

    chosen = K

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D)
        weights, indices = self.gate(rows).softmax(-1).topk(self.chosen, -1)
        return self.dispatched(rows, weights / weights.sum(-1, keepdim=True), indices).view(x.shape)

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x: (T, 16), weights and indices: (T, k)."""
        raise NotImplementedError


class Masks(Mixture):
    """All experts see all tokens (one_hot)."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        share = torch.einsum("tke,tk->te", F.one_hot(indices, E).to(x.dtype), weights)
        return torch.stack([share[:, e, None] * expert(x) for e, expert in enumerate(self.experts)]).sum(0)


class Where(Mixture):
    """The tokens of each expert, added where they came from (Mixtral)."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        hit = F.one_hot(indices, E).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slots, rows = torch.where(hit[e])
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return y


class Returned(Where):
    """What was added to is the result itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[0]
        weights, indices = self.gate(x).topk(self.chosen, -1)
        return self.dispatched(x, weights.sigmoid(), indices)


class Picked(Mixture):
    """The results of all experts, of which each token picks its own."""

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return (y.gather(1, indices[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)


class Gates(Mixture):
    """A gate an expert, with zeros (nanoMoE, Shazeer's)."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        best, indices = logits.topk(K, -1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, indices, best)
        gates = logits.softmax(-1)
        return sum((gates[..., e, None] * expert(x) for e, expert in enumerate(self.experts)), torch.zeros_like(x))


class Threshold(Gates):
    """The same, but ties make it more than k."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        best, indices = logits.topk(K, -1)
        gates = logits.masked_fill(logits < best[..., -1:], -torch.inf).softmax(-1) + 0 * indices[..., :1]
        return sum((gates[..., e, None] * expert(x) for e, expert in enumerate(self.experts)), torch.zeros_like(x))


class Switch(Mixture):
    """One expert a token, the largest."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D)
        best, chosen = self.gate(rows).softmax(-1).max(-1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            y = torch.where((chosen == e)[:, None], expert(rows), y)
        return (y * best[:, None]).view(x.shape)


class Shared(Masks):
    """Beside an expert that everybody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


class Parameters(Masks):
    """Lists of parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.up = nn.ParameterList(torch.randn(D, H) * 0.3 for _ in range(E))
        self.down = nn.ParameterList(torch.randn(H, D) * 0.3 for _ in range(E))

    def dispatched(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        share = torch.zeros(x.size(0), E).scatter(-1, indices, weights)
        parts = enumerate(zip(self.up, self.down, strict=True))
        return sum((share[:, e, None] * ((x @ up).relu() @ down) for e, (up, down) in parts), torch.zeros_like(x))


class Layers(nn.Module):
    """Layers that follow each other are no experts, and neither are heads without a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.heads = (nn.ModuleList(plain() for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return sum((head(x) for head in self.heads), x)


def compiled(model: nn.Module, x: Tensor, *, freeze: bool = False) -> tuple[Any, list[Outcome], list[fx.GraphModule]]:
    outcomes: list[Outcome] = []
    graphs: list[fx.GraphModule] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        found = backend.lower(graph_module, example, Options(freeze=freeze))
        assert not found.faults
        outcomes.extend(o for o in found.outcomes if o.lowering == "expert-modules")
        graphs.append(found.graph)
        return found.graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=spy, fullgraph=True)(x), outcomes, graphs


def input_(tokens: int = 150) -> Tensor:
    return torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(tokens))


SPELLINGS: list[tuple[Callable[[], nn.Module], str]] = [
    (Masks, "silu, halves"),
    (Where, "silu, halves"),
    (Returned, "silu, halves"),
    (Picked, "silu, halves"),
    (Gates, "silu, halves"),
    (Switch, "silu, halves"),
    (Shared, "silu, halves"),
    (Parameters, "relu, plain"),
    (lambda: Masks(lambda: Gated(bias=True)), "silu, halves"),
    (lambda: Where(Fused), "gelu, halves"),
    (lambda: Gates(plain), "gelu, plain"),
]


@pytest.mark.parametrize(("spelling", "formula"), SPELLINGS)
def test_spellings(spelling: Callable[[], nn.Module], formula: str) -> None:
    torch.manual_seed(0)
    model, x = spelling(), input_()
    y, (outcome,), graphs = compiled(model, x)
    assert outcome.became == "gatecc::moe_ffn", outcome.reason
    assert outcome.reason.endswith(formula)
    names = str(operators(graphs))
    assert "moe_ffn" in names
    assert not any(name in names for name in ("where", "index_add", "one_hot", "assert", "sym_size"))
    assert_the_same(model, x, y)


@pytest.mark.parametrize(("model", "reason"), [(Threshold(), "it reads gate.weight"), (Layers(), "no whole numbers")])
def test_what_only_looks_like_it_stays(model: nn.Module, reason: str) -> None:
    x = input_()
    y, outcomes, graphs = compiled(model, x)
    assert all(reason in outcome.reason and not outcome.became for outcome in outcomes)
    assert [outcome.place for outcome in outcomes] == (["experts"] if isinstance(model, Threshold) else ["heads"])
    assert "moe_ffn" not in str(operators(graphs))
    assert torch.equal(y, model(x))


def test_few_rows_stay_unless_weights_are_frozen() -> None:
    model, x = Where(), input_(5)
    down = model.get_parameter("experts.2.w2.weight")
    with torch.no_grad():
        _, (outcome,), _ = compiled(model, x)
        assert outcome.reason.startswith("5 rows per expert: below 16")
        y, (outcome,), _ = compiled(model, x, freeze=True)
        assert outcome.became
        assert torch.allclose(y, model(x), atol=1e-5)
        options: dict[str, Any] = {"gatecc.freeze": True, "compile_threads": 1}
        frozen: Any = torch.compile(model, backend="gatecc", options=options, fullgraph=True)
        for _ in range(2):
            assert torch.allclose(frozen(x), model(x), atol=1e-5)
            down.mul_(3)


def test_experts_directly_behind_experts() -> None:
    """The tokens of the second are the sum of the first."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Masks(), Masks()), input_()
    y, outcomes, _ = compiled(model, x)
    assert [outcome.became for outcome in outcomes] == ["gatecc::moe_ffn"] * 2
    assert_the_same(model, x, y)
