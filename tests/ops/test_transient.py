"""A GRU that runs while a switch is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatecc.ops import transient as transient
from gatecc.ops.transient import masked

OP = torch.ops.gatecc.transient


def given(B: int = 3, N: int = 9, share: float = 0.5, dtype: torch.dtype = torch.float64) -> list[Any]:
    g = torch.Generator().manual_seed(B * N)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=dtype).requires_grad_()

    active = torch.rand(B, N, generator=g) < share
    return [noise(B, N, 5), active, noise(12, 5), noise(12, 4), noise(12), noise(12), noise(B, 4)]


def by_hand(x: Tensor, active: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor) -> Tensor:
    """torch's own cell, sample by sample and step by step."""
    cell = nn.GRUCell(5, 4, dtype=x.dtype)
    for name, value in zip(
        ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), (w_in, w_state, b_in, b_state), strict=True
    ):
        getattr(cell, name).data = value.data
    out = x.new_zeros(*x.shape[:2], 4)
    for b in range(x.size(0)):
        h = x.new_zeros(4)
        for t in range(x.size(1)):
            h = cell(x[b, t], h) if active[b, t] else torch.zeros_like(h)  # reset at the next activation
            out[b, t] = h
    return out


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_runs_are_sequences_of_their_own(share: float) -> None:
    args = given(share=share)
    out, last = OP(*args[:6])
    assert torch.allclose(out, by_hand(*args[:6]), atol=1e-12)
    assert torch.equal(last, out[:, -1])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(OP(*args), masked(*args), strict=True))


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_pieces_are_the_whole(cut: int) -> None:
    x, active, *weights, _ = given()
    whole, last = OP(x, active, *weights)
    one, state = OP(x[:, :cut], active[:, :cut], *weights)
    two, end = OP(x[:, cut:], active[:, cut:], *weights, state)
    assert torch.allclose(torch.cat([one, two], 1), whole, atol=1e-12)
    assert torch.allclose(end, last, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gradients(share: float) -> None:
    args = given(2, 5, share)
    inputs = [a for a in args if a.requires_grad]

    def gradients(function: Any) -> list[Tensor]:
        out, last = function(*args)
        loss = out.sin().sum() + last.square().sum()
        found = torch.autograd.grad(loss, inputs, materialize_grads=True)
        return list(found)

    pairs = zip(gradients(OP), gradients(masked), strict=True)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs)
    if share:
        assert torch.autograd.gradcheck(lambda *t: OP(t[0], args[1], *t[1:]), inputs)


def test_the_operator_is_as_torch_wants_it() -> None:
    args = given(2, 4, dtype=torch.float32)
    torch.library.opcheck(OP.default, tuple(args), test_utils=("test_schema", "test_faketensor"))
    empty = given(0, 4)
    assert OP(*empty)[0].shape == (0, 4, 4)
