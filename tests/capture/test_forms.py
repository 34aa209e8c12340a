"""Forms that torch.export does not trace: the graph means what the code means, gradients and random numbers too."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gatecc
from gatecc.capture import capture
from gatecc.errors import CallNotCapturedError, CaptureError

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """An adapter that reads its base's weight as data, and may be left out as a whole, as peft writes them."""

    def __init__(self, left_out: float) -> None:
        super().__init__()
        self.base, self.delta = nn.Linear(8, 8), nn.Parameter(torch.eye(8) * 0.5)
        self.left_out = left_out

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.rand(1) > self.left_out:
            return F.linear(x, self.base.weight.data @ self.delta, self.base.bias)
        return self.base(x)


class Net(nn.Module):
    def __init__(self, left_out: float = 0.0) -> None:
        super().__init__()
        self.norm, self.adapted, self.down = nn.LayerNorm(8), Adapted(left_out), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.adapted(self.norm(x))))


def trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    out = model(X)
    out.square().sum().backward()
    return out, {n: p.grad for n, p in model.named_parameters()}, torch.rand(4)


def test_a_gated_model_trains_as_before() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    gated = gatecc.transform(model, "residual-gates", (X,))
    (out, grads, after), (its_out, its, its_after) = trained(model.train()), trained(gated.train())
    assert torch.equal(out, its_out)
    assert torch.equal(after, its_after)
    assert grads["adapted.base.weight"] is None
    for name, grad in grads.items():
        found = its[name]
        assert found is None if grad is None else found is not None and torch.equal(found, grad), name


class Hooked(nn.Module):
    """What explainers do with attention maps: a hook on a tensor that needs a gradient."""

    def __init__(self, draw: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.seen: list[Tensor] = []
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(self.norm(x)))
        if self.draw:
            return x + self.down(y) * (random.random() < 0.5 if self.training else 1)
        if y.requires_grad:
            y.register_hook(self.seen.append)
        return x + self.down(y)


def test_a_hook_on_a_tensor_is_not_lost() -> None:
    """Such a model cannot be trained as a graph; where no gradient is taken, there is no hook."""
    model = Hooked().eval()
    with pytest.raises(CaptureError, match=r"(?s)hook on a tensor.*Tensor\.register_hook"):
        gatecc.transform(model, "residual-gates", (X,))
    assert gatecc.inspect(model, (X,)).sites


def test_python_s_random_numbers_are_not_frozen() -> None:
    gated = gatecc.transform(Hooked(draw=True).eval(), "residual-gates", (X,), verify=False)
    gated(X)
    with pytest.raises(CallNotCapturedError, match=r"(?s)numpy\.random"):
        gated.train()(X)


def test_what_depends_on_a_random_number_stays_refused() -> None:
    with pytest.raises(CaptureError):
        capture(Adapted(0.5).train(), (X,))
