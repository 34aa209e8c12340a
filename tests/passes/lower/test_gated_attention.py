"""gated-attention: fused attention and the gate behind it become the operator, with the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gatecc import backend
from gatecc.backend.options import Options
from gatecc.passes.lower import Outcome, attention_operator, gated_attention

B, N, H, D = 2, 9, 4, 8
GATED = ("gated-attention", "attention-operator")


class Gated(nn.Module):
    """One attention of x: (B, N, 32) by ``attend``, a function of q, k, v, (B, H, N, D), and of a gate (B, N, 32)."""

    def __init__(self, attend: Callable[..., Tensor], groups: int = H) -> None:
        super().__init__()
        self.q, self.kv, self.gate = nn.Linear(H * D, H * D), nn.Linear(H * D, 2 * groups * D), nn.Linear(H * D, H * D)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, 32)."""
        q = self.q(x).unflatten(-1, (-1, D)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, D)).transpose(1, 2).chunk(2, 1)
        return self.attend(q, k, v, self.gate(x))


def near(q: Tensor) -> Tensor:
    ahead = torch.arange(N, device=q.device) - torch.arange(N, device=q.device)[:, None]
    return (ahead <= 0) & (ahead > -4)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def split(gate: Tensor) -> Tensor:
    return gate.unflatten(-1, (H, D))


FORMS: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "flat, by channel": (
        lambda q, k, v, g: causal(q, k, v).transpose(1, 2).reshape(B, -1, H * D) * g.sigmoid(),
        H,
        "causal, a gate through sigmoid",
    ),
    "by head": (
        lambda q, k, v, g: (F.silu(split(g)[..., :1]) * causal(q, k, v).transpose(1, 2).contiguous()).flatten(2),
        2,
        "causal, a gate through silu",
    ),
    "as the heads lie": (
        lambda q, k, v, g: causal(q, k, v) * split(g).transpose(1, 2).tanh(),
        1,
        "causal, a gate",
    ),
    "behind a window": (
        lambda q, k, v, g: F.scaled_dot_product_attention(q, k, v, near(q)).permute(0, 2, 1, 3) * split(g),
        H,
        "causal, window=4, a gate",
    ),
}
LEFT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "no gate": (lambda q, k, v, g: causal(q, k, v).transpose(1, 2).flatten(2) + g, "no gate multiplies"),
    "a number": (lambda q, k, v, g: causal(q, k, v) * 2.0, "with a number"),
    "two readers": (lambda q, k, v, g: (y := causal(q, k, v)) * y.amax(), "read by several"),
    "a gate of channels": (lambda q, k, v, g: causal(q, k, v) * g[:1, :1, None, :D], "broadcast"),
    "other axes": (lambda q, k, v, g: causal(q, k, v).reshape(B, N, -1) * g.sigmoid(), "no gate multiplies"),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU pass for some on a GPU."""
    for module in (attention_operator, gated_attention):
        monkeypatch.setattr(module, "on_gpu", lambda _: True)


def lowered(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> tuple[fx.GraphModule, list[Outcome], Tensor]:
    found: list[Any] = []

    def spy(graph: fx.GraphModule, example: Any) -> Callable[..., Any]:
        found.append(backend.lower(graph, example, Options(lowerings=names or None)))
        assert not found[0].faults
        return found[0].graph.forward

    torch.compiler.reset()
    y = torch.compile(model, backend=spy, fullgraph=True)(x)
    return found[0].graph, [o for o in found[0].outcomes if o.lowering == "gated-attention"], y


def calls(graph: fx.GraphModule, target: Any) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=target)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", FORMS)
def test_what_it_becomes(name: str) -> None:
    attend, groups, became = FORMS[name]
    torch.manual_seed(0)
    model, x = Gated(attend, groups).double(), torch.randn(B, N, H * D, dtype=torch.float64)
    graph, outcomes, y = lowered(model, x, GATED)
    assert [o.became for o in outcomes] == [f"gatecc::attention, {became}"]
    assert len(calls(graph, torch.ops.gatecc.attention.default)) == 1
    assert not calls(graph, torch.ops.aten.scaled_dot_product_attention.default)
    torch.testing.assert_close(y, model(x))
    weights = list(model.parameters())
    grads = [torch.autograd.grad(found.square().sum(), weights) for found in (y, model(x))]
    torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", LEFT)
def test_what_stays(name: str) -> None:
    attend, reason = LEFT[name]
    torch.manual_seed(0)
    model, x = Gated(attend).double(), torch.randn(B, N, H * D, dtype=torch.float64)
    graph, outcomes, y = lowered(model, x, GATED)
    assert [(o.became, reason in o.reason) for o in outcomes] == [("", True)]
    assert not calls(graph, torch.ops.gatecc.attention.default)
    torch.testing.assert_close(y, model(x))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("form", "number"), [("behind a window", 1), ("flat, by channel", 0)])
def test_without_a_request(form: str, number: int) -> None:
    """A window makes the call, and takes the gate along; a gate alone says how to ask for it."""
    torch.manual_seed(0)
    model, x = Gated(FORMS[form][0]).double(), torch.randn(B, N, H * D, dtype=torch.float64)
    graph, outcomes, y = lowered(model, x, ())
    assert len(calls(graph, torch.ops.gatecc.attention.default)) == number
    assert [bool(o.became) or "by request" in o.reason for o in outcomes] == [True]
    torch.testing.assert_close(y, model(x))


@pytest.mark.usefixtures("gpu")
def test_a_window_without_a_gate() -> None:
    torch.manual_seed(0)
    model = Gated(lambda q, k, v, g: F.scaled_dot_product_attention(q, k, v, near(q)) + split(g).transpose(1, 2))
    x = torch.randn(B, N, H * D)
    graph, _, y = lowered(model, x, ())
    assert len(calls(graph, torch.ops.gatecc.attention.default)) == 1
    torch.testing.assert_close(y, model(x))


@pytest.mark.usefixtures("gpu")
def test_capped_scores() -> None:
    """Spelled out with a cap: no CPU's gains are asked."""

    def capped(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        scores = 2.0 * torch.tanh(q @ k.mT / 2.0) + torch.full((N, N), -torch.inf, dtype=q.dtype).triu(1)
        return scores.softmax(-1) @ v + split(g).transpose(1, 2)

    torch.manual_seed(0)
    model, x = Gated(capped).double(), torch.randn(B, N, H * D, dtype=torch.float64)
    graph, _, y = lowered(model, x, ())
    (made,) = calls(graph, torch.ops.gatecc.attention.default)
    assert (made.kwargs["softcap"], made.kwargs["causal"]) == (2.0, True)
    torch.testing.assert_close(y, model(x))


FOLLOWED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a norm of each token's heads, and a gate": (
        lambda q, k, v, g: (F.rms_norm(causal(q, k, v).transpose(1, 2), (D,)) * split(g).sigmoid()).flatten(2),
        "rms_norm sigmoid mul",
    ),
    "a spelled-out norm, a gate of another form where they lie flat": (
        lambda q, k, v, g: spelled(causal(q, k, v)).transpose(1, 2).reshape(*g.shape) * (F.softplus(g) + 0.5),
        "pow mean add rsqrt mul softplus add mul",
    ),
    "a row, a tensor that is added, a number": (
        lambda q, k, v, g: 2.0 * (causal(q, k, v) * g[0, 0, :D] + split(g).transpose(1, 2)),
        "mul add mul",
    ),
}


def spelled(heads: Tensor) -> Tensor:
    return heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("GATECC_CACHE", str(tmp_path))


@pytest.mark.usefixtures("gpu", "files")
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_is_printed_behind_it(name: str) -> None:
    attend, words = FOLLOWED[name]
    torch.manual_seed(0)
    model, x = Gated(attend), torch.randn(B, 24, H * D)
    graph, outcomes, y = lowered(model, x, GATED)
    assert [o.became for o in outcomes] == [f"gatecc::attention, causal, followed by {words} in one kernel"]
    assert len([n for n in graph.graph.nodes if "gatecc_regions.attention_" in str(n.target)]) == 1
    assert not calls(graph, torch.ops.aten.scaled_dot_product_attention.default)
    torch.testing.assert_close(y, model(x))
    weights = list(model.parameters())
    grads = [torch.autograd.grad(found.square().sum(), weights) for found in (y, model(x))]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("N", "learns", "why"), [(2048, False, ""), (2048, True, "computes the heads again"), (16, False, "a step")]
)
def test_the_estimate_decides_what_is_printed(N: int, learns: bool, why: str) -> None:
    """What is not, is fused attention with what the operator's own gate takes, as before."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(learns):
        with torch.device("cuda"):
            model, x = (
                Gated(lambda q, k, v, g: causal(q, k, v).transpose(1, 2) * split(g).tanh()),
                torch.randn(B, N, H * D),
            )
        graph, (outcome,), _ = lowered(model, x, GATED)
    assert ("followed by tanh mul" in outcome.became) is (why == "")
    assert why in outcome.reason
    assert len(calls(graph, torch.ops.gatecc.attention.default)) == (why != "")


def test_on_a_pretended_gpu() -> None:
    """Values on a CUDA device that is not there: by request the operator runs, on fakes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, x = Gated(FORMS["flat, by channel"][0]), torch.randn(B, N, H * D)
        graph, outcomes, y = lowered(model, x, GATED)
    assert [bool(o.became) for o in outcomes] == [True]
    (made,) = calls(graph, torch.ops.gatecc.attention.default)
    assert {t.device.type for t in (*made.meta["val"], y)} == {"cuda"}
    assert lowered(Gated(FORMS["flat, by channel"][0]), torch.randn(B, N, H * D), GATED)[1] == []  # on a CPU
