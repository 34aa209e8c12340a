"""dense-products: large products and what activates them are one operator, with the same numbers; small ones stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from gatecc import backend
from gatecc.passes.lower import Outcome, dense_products

ROWS = 48


class Network(nn.Module):
    """x: (B, N, 16) -> (B, N, 16), by a product of torch or of GPT-2, an activation, and a product."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], conv: bool) -> None:
        super().__init__()
        self.up = Conv1D(64, 16) if conv else nn.Linear(16, 64)
        self.down = nn.Linear(64, 16, bias=False)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def in_place(y: torch.Tensor) -> torch.Tensor:
    return F.silu(y.mul_(2.0))


def read_twice(y: torch.Tensor) -> torch.Tensor:
    return F.silu(y) + y


FUSED: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": NewGELUActivation(),
}
APART: dict[str, Any] = {"relu": F.relu, "in place": in_place, "read twice": read_twice}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which products gain from few multiply-adds on."""
    monkeypatch.setattr(dense_products, "smallest", lambda: ROWS * 16 * 64)


def lowered(function: Any, *args: Any) -> tuple[list[Outcome], list[tuple[Any, ...]]]:
    """The outcomes, and the activations of the operators, of a graph that computes the same as the function."""
    outcomes: list[Outcome] = []
    calls: list[Any] = []

    def spy(graph_module: Any, example: Any) -> Any:
        found = backend.lower(graph_module, example)
        outcomes.extend(o for o in found.outcomes if o.lowering == "dense-products")
        calls.extend(n.args[3:] for n in found.graph.graph.nodes if n.target is torch.ops.gatecc.linear.default)
        return found.graph.forward

    torch._dynamo.reset()
    found, expected = torch.compile(function, backend=spy, fullgraph=True)(*args), function(*args)
    assert torch.allclose(found, expected, atol=1e-5)
    return outcomes, calls


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("name", [*FUSED, *APART])
def test_products_and_their_activations(name: str, conv: bool) -> None:
    network = Network((FUSED | APART)[name], conv)
    with torch.no_grad():
        outcomes, calls = lowered(network, torch.randn(2, ROWS // 2, 16))
    assert [o.became for o in outcomes] == ["gatecc::linear"] * 2
    assert calls[0] == ((name,) if name in FUSED else ())
    assert not calls[1]


def test_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Network(F.silu, conv=False), torch.randn(2, ROWS // 2, 16)
    assert not lowered(network, x)[0]  # it learns
    with torch.no_grad():
        assert not lowered(network, x[:, :-1])[0]  # fewer multiply-adds
        assert not lowered(network.double(), x.double())[0]
        network.float()
        assert not lowered(torch.addmm, torch.randn(ROWS, 64), torch.randn(ROWS, 16), torch.randn(16, 64))[0]
        with torch.autocast("cpu"):
            assert not dense_of(network, x)
        monkeypatch.setattr(dense_products, "smallest", lambda: None)
        assert not lowered(network, x)[0]  # nothing was measured on this CPU


def dense_of(function: Any, *args: Any) -> list[Outcome]:
    """The outcomes alone: autocast computes in half precision on both sides."""
    outcomes: list[Outcome] = []

    def spy(graph_module: Any, example: Any) -> Any:
        outcomes.extend(o for o in backend.lower(graph_module, example).outcomes if o.lowering == "dense-products")
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=spy)(*args)
    return outcomes


class Block(nn.Module):
    """Attention and a gated FFN over x: (B, N, 16); k is written to, v is returned, q lies apart as it is viewed."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32, bias), nn.Linear(16, 16, bias), nn.Linear(16, 16, bias)
        self.gate, self.up, self.down = nn.Linear(16, 64, bias), nn.Linear(16, 64, bias), nn.Linear(64, 16)
        self.out = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        k *= 0.5
        heads = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        x = x + self.out(F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2).flatten(2))
        return self.down(F.silu(self.gate(x)) * self.up(x)) + q.view(-1).cumsum(0).view_as(q)[..., :16], v


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_one_value_are_one_when_frozen(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of q, k and v alone is too small; a weight that changes is packed anew."""
    monkeypatch.setattr(dense_products, "smallest", lambda: ROWS * 16 * 49)
    said: list[Outcome] = []

    def compiler(graph_module: Any, example: Any, *, freeze: bool = True) -> Any:
        found = backend.lower(graph_module, example, backend.Options(freeze=freeze))
        said.extend(o for o in found.outcomes if o.lowering == "dense-products" and o.became)
        return backend.gatecc(graph_module, example, mode="aot_eager", options={"gatecc.freeze": freeze})

    model, x = Block(bias=bias), torch.randn(2, ROWS // 2, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        frozen, plain = torch.compile(model, backend=compiler), model(x)
        torch.testing.assert_close(frozen(x), plain, atol=1e-5, rtol=1e-5)
        assert [o.became for o in said] == [f"one gatecc::linear with {n} outputs" for n in (64, 128)] + [
            "gatecc::linear"
        ]
        for layer in (model.k, model.up):
            layer.weight.mul_(-2)
            torch.testing.assert_close(frozen(x), model(x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(x)[0], plain[0], atol=1e-2)
    said.clear()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=compiler)(x), model(x), atol=1e-5, rtol=1e-5)
    assert not said  # it learns


def test_what_is_packed_may_be_viewed() -> None:
    """No copies where readers do with views: heads of q, k and v."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.ModuleList(nn.Linear(16, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for f in self.each)
            return F.scaled_dot_product_attention(q, k, v)

    names: list[str] = []

    def spy(graph_module: Any, example: Any) -> Any:
        found = backend.lower(graph_module, example, backend.Options(freeze=True)).graph
        names.extend(str(n.target) for n in found.graph.nodes if n.op == "call_function")
        return found.forward

    model, x = Heads(), torch.randn(2, ROWS // 2, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=spy)(x), model(x))
    assert not [name for name in names if "clone" in name]
    assert names.count("gatecc.linear.default") == 1
