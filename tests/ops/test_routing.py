"""Operators of routers: a loss in the backward pass, and figures that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gatecc.ops as ops
from gatecc.errors import ArgumentError

assert ops
SCALE = torch.tensor(3.0)


def inject(x: Tensor, scale: Tensor = SCALE) -> Tensor:
    return torch.ops.gatecc.add_loss(x * 2, (x**2).mean(), scale)


def test_the_gradient_is_that_of_the_sum() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = inject(x)
    assert torch.equal(y, x * 2)
    (grad,) = torch.autograd.grad(y.sin().sum(), x)
    (expected,) = torch.autograd.grad((x * 2).sin().sum() + 3 * (x**2).mean(), x)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(ArgumentError, match="one derivative"):
        torch.autograd.grad(inject(x).sum(), x, create_graph=True)


def test_under_torch_func() -> None:
    x = torch.randn(5, 3)
    grads = torch.func.vmap(torch.func.grad(lambda row: inject(row).sum()))(x)
    torch.testing.assert_close(grads, 2 + 3 * 2 * x / 3)
    with pytest.raises(ArgumentError, match="reverse mode"):
        torch.func.jvp(inject, (x,), (x,))


def test_schema_and_compilation() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.gatecc.add_loss.default, (x, x.mean().detach().requires_grad_(), SCALE))
    state, step = torch.zeros(3), torch.zeros(())
    torch.library.opcheck(torch.ops.gatecc.record.default, (state, torch.ones(2), step))


def test_a_new_step_starts_anew() -> None:
    state, step = torch.zeros(3), torch.zeros(())
    for values in ([1.0, 2.0], [10.0, 20.0]):
        torch.ops.gatecc.record(state, torch.tensor(values), step)
    assert state.tolist() == [0, 11, 22]
    step += 1
    assert state.tolist() == [0, 11, 22]  # still readable
    torch.ops.gatecc.record(state, torch.tensor([5.0, 5.0]), step)
    assert state.tolist() == [1, 5, 5]


def test_a_nan_goes_with_its_step() -> None:
    state, step = torch.zeros(2), torch.zeros(())
    torch.ops.gatecc.record(state, torch.tensor([torch.nan]), step)
    torch.ops.gatecc.record(state, torch.tensor([1.0]), step + 1)
    assert state.tolist() == [1, 1]
