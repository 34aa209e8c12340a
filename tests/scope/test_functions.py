"""Custom autograd functions inside a scope: their own backward gives the gradients, as in the model without gates.

A graph of their operators would give others, in silence. The gates are at identity, so the plain model is the right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call, grad

import gatecc
from gatecc import MLP, Gate, GateSpec
from gatecc.errors import CaptureError
from tests.scope.test_adapters import Attention, Net, X

LONGER = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1))


class Reversed(Function):
    """Gradient reversal: the input itself comes out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -ctx.size * grads[0], None


class Rounded(Function):
    """A straight-through estimator that is derived from another function, and inherits its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Tripled(Rounded):
    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 3 * grads[0]


class Both(Function):
    """Two outputs, an input that the forward does not read, and a context of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, unread: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return x * factor, x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 5 * grads[0] + grads[1], ctx.factor * grads[1], None


apply = Tripled.apply  # how most code has it


class Trained(Attention):
    """Custom functions on each side of the gates, and on the stream that they read."""

    def forward(self, x: Tensor) -> Tensor:
        x, more = Both.apply(apply(x), x, 0.5)
        y = super().forward(x + more)
        return Reversed.apply(Rounded.apply(y), y.shape[1])


class Net2(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Trained()


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Net2(), Net2()).eval()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["gated-attention", "residual-gates"])
def test_their_own_backward_runs(plain: nn.Module, recipe: str) -> None:
    gated = gatecc.transform(plain, recipe, (X,), verify=False)
    for x in (X, LONGER):
        expected, found = gradients(plain, x), gradients(gated, x)
        assert torch.equal(gated(x), plain(x))
        assert all(torch.equal(found[n], g) for n, g in expected.items())
        assert len(found) == len(list(gated.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = gradients(plain, X), gradients(gated, X)
    assert all(torch.equal(found[n], g) for n, g in expected.items())


def test_they_run_under_transforms_and_compiled(plain: nn.Module) -> None:
    gated = gatecc.transform(plain[:1], "gated-attention", (X,), verify=False)  # pyright: ignore[reportIndexIssue]
    expected = gradients(gated, X)
    compiled = torch.compile(gated, backend="eager")
    assert isinstance(compiled, nn.Module)
    found = {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, X).items()}
    assert all(torch.allclose(found[n], g, atol=1e-5) for n, g in expected.items())
    both = nn.Sequential(_Doubled()).eval()
    gated = gatecc.transform(
        both, [Gate(MLP[...].out, GateSpec("in", "linear", "token", "sigmoid"))], (X,), verify=False
    )
    weights = {n: p.detach() for n, p in gated.named_parameters()}
    found = grad(lambda w: functional_call(gated, w, (X,)).square().sum())(weights)
    assert all(torch.allclose(found[n], g, atol=1e-4) for n, g in gradients(gated, X).items())


class _Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        one, other = Both.apply(x, x, 0.5)
        return self.down(torch.relu(self.up(one + other)))


class Hidden(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.relu(x @ up.T) @ down.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 3 * grads[0], None, None


class Closed(_Doubled):
    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(x, self.up.weight, self.down.weight)


def test_an_edit_inside_of_one_is_refused() -> None:
    """Its backward knows nothing of the gate; what comes out of it can be gated."""
    model, spec = nn.Sequential(Closed()).eval(), GateSpec("in", "linear", "channel", "sigmoid", init="identity")
    with pytest.raises(CaptureError, match=r"(?s)custom autograd function is in the way.*Hidden"):
        gatecc.transform(model, [Gate(MLP[...].hidden, spec)], (X,))


def test_fake_quantisation_of_torchao_trains_through_a_scope() -> None:
    quantization: Any = pytest.importorskip("torchao.quantization", reason="fake quantisation is torchao's")
    qat: Any = pytest.importorskip("torchao.quantization.qat", reason="fake quantisation is torchao's")
    torch.manual_seed(0)
    model = Net().eval()
    weights = qat.IntxFakeQuantizeConfig(torch.int8, group_size=8)
    quantization.quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"), lambda m, n: "_proj" in n)
    gated = gatecc.transform(model, "gated-attention", (X,), verify=False)
    expected, found = gradients(model, X), gradients(gated, X)
    assert float(expected["attention.q_proj.weight"].abs().max()) > 0
    assert all(torch.equal(found[n], g) for n, g in expected.items())
