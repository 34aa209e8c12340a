"""Muon in float32 against torch's own in bfloat16, and the choice between them."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from gatecc.train import muon
from gatecc.train.muon import Muon, orthogonal

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def after(kind: type[torch.optim.Muon], shape: tuple[int, int], steps: int = 3) -> tuple[Tensor, Tensor]:
    """A matrix and its momentum after some steps on fixed gradients."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(shape, generator=draw))
    optimizer = kind([matrix], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(steps):
        matrix.grad = torch.randn(shape, generator=draw)
        optimizer.step()
    return matrix.detach(), optimizer.state[matrix]["momentum_buffer"]


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
def test_float32_is_the_same_up_to_the_rounding_of_bfloat16(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "bfloat16_is_slow", lambda: True)
    (found, own), (wanted, momentum) = after(Muon, shape), after(torch.optim.Muon, shape)
    torch.testing.assert_close(own, momentum)
    update = (wanted - after(torch.optim.Muon, shape, steps=2)[0]).abs().max()
    assert 0 < float((found - wanted).abs().max()) < 0.1 * update


def test_where_bfloat16_is_fast_it_is_torchs_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "bfloat16_is_slow", lambda: False)
    for found, wanted in zip(after(Muon, (12, 30)), after(torch.optim.Muon, (12, 30)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
def test_the_iteration_is_the_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.double)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonal(x, COEFFICIENTS, 5, 1e-7), u @ torch.diag(s) @ v)


def test_the_choice_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch decides, once: as if products of bfloat16 took ten times as long, and as if they did not."""
    for slow in (True, False):
        clock = [0.0]

        def product(x: Tensor, *_: Tensor, clock: list[float] = clock, slow: bool = slow) -> Tensor:
            clock[0] += 1.0 if slow and x.dtype == torch.bfloat16 else 0.1
            return x

        muon.bfloat16_is_slow.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda clock=clock: clock[0])
            patch.setattr(torch, "addmm", product)
            assert muon.bfloat16_is_slow() is slow
        assert muon.bfloat16_is_slow() is slow
    muon.bfloat16_is_slow.cache_clear()
