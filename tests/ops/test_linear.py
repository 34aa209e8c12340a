"""gatecc::linear is the product and its activation, with every derivative, for any rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gatecc.ops.linear import ACTIVATIONS

BEHIND = {
    "identity": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def operands(rows: tuple[int, ...], turned: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(24, 40, dtype=dtype).t() if turned else torch.randn(40, 24, dtype=dtype)
    return [torch.randn(*rows, 24, dtype=dtype) * 2, weight, torch.randn(40, dtype=dtype)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(7,), (2, 0), (2, 3, 5), ()])
@pytest.mark.parametrize("turned", [False, True])
def test_the_product_and_its_activation(activation: str, rows: tuple[int, ...], turned: bool) -> None:
    x, weight, bias = operands(rows, turned)
    for b in (bias, None):
        found = torch.ops.gatecc.linear(x, weight, b, activation)
        exact = BEHIND[activation](F.linear(x.double(), weight.double(), None if b is None else b.double()))
        assert found.shape == exact.shape
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_learns_and_maps(activation: str) -> None:
    given = [x.requires_grad_() for x in operands((2, 3), turned=True, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: torch.ops.gatecc.linear(*a, activation), given)
    x, weight, bias = (g.detach().float() for g in given)
    mapped = torch.func.vmap(lambda row: torch.ops.gatecc.linear(row, weight, bias, activation))(x)
    assert torch.allclose(mapped, torch.ops.gatecc.linear(x, weight, bias, activation), atol=1e-5)


def test_the_operator_is_one_to_torch() -> None:
    x, weight, bias = operands((2, 3), turned=False)
    torch.library.opcheck(torch.ops.gatecc.linear.default, (x, weight, bias, "gelu"))
