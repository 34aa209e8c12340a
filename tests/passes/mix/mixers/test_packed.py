"""Packed rows: each mixer that knows them gives what it gives each sequence in a row of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gatecc.passes.mix.mixers import GAM, Hopfield, Liger, Linear, LoLCATs, Mixer, Place
from gatecc.passes.mix.mixers.decay import FromKeys, LowRank, Retention, Scalar
from gatecc.passes.mix.mixers.features import Hedgehog, UnitMap
from gatecc.passes.mix.mixers.packed import causal_convolution, delayed, first_tokens, forgetting, together

ROW = torch.tensor([0, 1, 1, 1, 2, 2, 2, 0, 3, 4, 4, 4, 4, 0])
HOLE = torch.tensor([0, 1, 1, 1, 2, 2, 0, 2, 3, 4, 4, 4, 4, 0])  # padding inside of a sequence
PLACE = Place(dim=8, heads=2, kv_heads=1, key=4, value=4, scale=0.5, causal=True)

CAUSAL: list[Mixer] = [
    Linear(),
    Linear(decay=LowRank(rank=2), norm="rms"),
    Linear(decay=Retention(), rope=True, normalize=False),
    Linear(Hedgehog(), LowRank(rank=2), normalize=True, conv=3),
    Linear(UnitMap(), Scalar(), rule="delta", conv=2),
    Linear(UnitMap(), rule="delta"),
    Linear(decay=FromKeys()),
    Liger(window=2),
    LoLCATs(window=2),
    GAM(slots=3, taps=3),
    Hopfield(steps=2),
]
EITHER: list[Mixer] = [Linear(), Linear(Hedgehog(), normalize=True), Linear(decay=LowRank(rank=2)), Hopfield(steps=2)]


def _values(mixer: Mixer, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (2, tokens, 8), "q": (2, 2, tokens, 4), "q_raw": (2, 2, tokens, 4)}
    return [torch.randn(shapes.get(name, (2, 1, tokens, 4)), generator=generator) for name in mixer.reads]


def _cut(x: Tensor, at: Tensor) -> Tensor:
    return x[:, :, at] if x.dim() == 4 else x[:, at]


def _module(mixer: Mixer, causal: bool) -> nn.Module:
    torch.manual_seed(0)
    module = mixer.module(replace(PLACE, causal=causal))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize(("mixer", "causal"), [(m, True) for m in CAUSAL] + [(m, False) for m in EITHER], ids=str)
def test_packed_rows_are_separate_runs(mixer: Mixer, causal: bool) -> None:
    assert mixer.packs
    module, values = _module(mixer, causal), _values(mixer, len(ROW))
    mask = torch.stack([ROW, torch.ones_like(ROW)])
    got = module(*values, mask)
    for number in range(1, 5):
        at = torch.eq(ROW, number).nonzero().flatten()
        alone = module(*(_cut(x, at) for x in values))
        assert torch.allclose(_cut(got, at)[0], alone[0], atol=2e-5), number
    whole = module(*values)
    assert torch.allclose(got[1], whole[1], atol=2e-5), "a row of one sequence"


@pytest.mark.parametrize("mixer", [m for m in CAUSAL if not isinstance(m, Hopfield)][:8], ids=str)
def test_no_gradient_crosses_a_boundary(mixer: Mixer) -> None:
    module, values = _module(mixer, True), [x.requires_grad_() for x in _values(mixer, len(ROW))]
    out = module(*values, torch.stack([ROW, ROW]))
    grads = torch.autograd.grad(_cut(out, ROW == 4).square().sum(), values, allow_unused=True)
    for grad in grads:
        assert grad is not None
        assert bool(grad.isfinite().all())
        assert not bool(_cut(grad, ROW != 4).any())


def test_where_sequences_begin() -> None:
    first = first_tokens(HOLE[None])[0]
    assert first.nonzero().flatten().tolist() == [1, 4, 8, 9]
    last = first_tokens(HOLE[None].flip(-1)).flip(-1)[0]
    assert last.nonzero().flatten().tolist() == [3, 7, 8, 12]


def test_all_is_forgotten_where_a_sequence_begins() -> None:
    decay = forgetting(None, HOLE[None])
    assert decay is not None
    assert decay.shape == (1, 1, len(HOLE), 1)
    assert (decay == -torch.inf).flatten().nonzero().flatten().tolist() == [1, 4, 8, 9]
    assert forgetting(None, HOLE[None] > 0) is None, "booleans say that a row holds one sequence"
    constant = forgetting(torch.full((1, 2, 1, 1), -0.1), HOLE[None])
    assert constant is not None
    assert constant.shape == (1, 2, len(HOLE), 1)


def test_who_belongs_together() -> None:
    expected = (ROW[:, None] == ROW) & (ROW > 0)
    assert torch.equal(together(ROW[None])[0, 0], expected)
    assert torch.equal(together(ROW[None] > 0)[0, 0, 0], ROW > 0)
    for back in (0, 1, 3):
        moved = delayed(ROW[None], back)[0]
        tokens = [t for t in range(len(ROW)) if ROW[t] > 0]
        assert [bool(moved[t]) for t in tokens] == [t >= back and bool(ROW[t - back] == ROW[t]) for t in tokens]


def test_a_convolution_sees_no_other_sequence() -> None:
    x = torch.randn(1, 3, len(ROW)) * (ROW > 0)
    weight, bias = torch.randn(3, 1, 4), torch.randn(3)
    got = causal_convolution(x, weight, bias, ROW[None])
    for number in range(1, 5):
        at = torch.eq(ROW, number).nonzero().flatten()
        assert torch.allclose(got[:, :, at], causal_convolution(x[:, :, at], weight, bias), atol=1e-6)
