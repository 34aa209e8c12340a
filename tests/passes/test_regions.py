"""Regions: code inside autocast computes in the graph what it computes in the model, whatever the call is under."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.capture import capture
from gatecc.passes.canonicalize import canonicalize
from gatecc.scope.variant import Variant

X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "island":  # as much as must be exact, in float32
            q, k, v = self.heads(x)
            with torch.autocast("cpu", enabled=False):
                y = (q.float() @ k.float().mT / 2).softmax(-1) @ v.float()
        elif self.kind == "nested":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                q, k, v = self.heads(x)
                with torch.autocast("cpu", enabled=False):
                    weights = (q.float() @ k.float().mT / 2).softmax(-1)
                y = weights @ v
        else:  # "cuda" has no effect on a CPU
            device, dtype = self.kind.split()
            with torch.autocast(device, dtype=getattr(torch, dtype)):
                q, k, v = self.heads(x)
                y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.float().transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v)]


KINDS = ["cpu bfloat16", "cpu float16", "cuda float16", "island", "nested"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", [None, torch.bfloat16, torch.float16])
def test_the_graph_is_bitwise_the_model(kind: str, around: torch.dtype | None) -> None:
    model: Any = nn.Sequential(Attention(kind)).eval()
    with torch.autocast("cpu", around or torch.bfloat16, enabled=around is not None):
        program = capture(model, (X,))
        canonicalize(program)
        assert not [n for n in program.calls() if "wrap_with" in str(n.target)]
        expected, got = model(X), Variant(program, ())(model, [X])
    assert torch.equal(expected, got)
    assert expected.dtype == got.dtype
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(y.float().sum(), parameters) for y in (expected, got)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["cpu bfloat16", "nested"])
def test_attention_inside_autocast_is_a_site(kind: str) -> None:
    model: Any = nn.Sequential(Attention(kind), nn.LayerNorm(16)).eval()
    gated: Any = gatecc.transform(model, "gated-attention", (X,), verify=False)
    assert torch.allclose(gated(X), model(X), atol=1e-6)
    with torch.no_grad():
        gated.get_submodule("0").gate.weight.normal_()
    assert not torch.allclose(gated(X), model(X), atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.allclose(gated(X), model(X), atol=1e-2)


class Around(nn.Module):
    """Two layers that the model calls inside a region of its own."""

    def __init__(self, region: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention("island"), Attention("island")])
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            for layer in self.layers:
                x = x + layer(x)
        return x


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("region", [autocast, torch.no_grad])
def test_what_runs_inside_a_region_keeps_its_owner(region: Any) -> None:
    model = Around(region).eval()
    gated = gatecc.transform(model, "gated-attention", (X,), verify=False)
    assert [(r.scope, r.site) for r in gatecc.last_report(gated).rewrites] == [
        ("layers.0", "layers.0#0"),
        ("layers.1", "layers.1#0"),
    ]
    with torch.no_grad():
        for i in range(2):
            gated.get_parameter(f"layers.{i}.gate.bias")[:2] = -200.0
            model.get_parameter(f"layers.{i}.o.weight")[:, :8] = 0
    assert torch.allclose(gated(X), model(X), atol=1e-5)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention("cpu bfloat16")

    def forward(self, x: Tensor) -> Tensor:
        def one(x: Tensor) -> Tensor:
            return torch.softmax(x @ x.mT, -1) @ x

        return torch.cond(x.sum() > 0, one, torch.neg, (x,))


def test_attention_inside_another_operator_is_refused_by_name() -> None:
    report = gatecc.inspect(Conditional().eval(), (X,))
    (refusal,) = [r for r in report.refusals if r.code == "GCC185"]
    assert "cond" in refusal.reason
