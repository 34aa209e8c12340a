"""A model that exits early is an If: what is behind the exit does not run, and a side that nobody compared is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gatecc

pytest.importorskip("onnxruntime")


class Exits(nn.Module):
    """Two heads: the first answers if it is sure of each sample, else the second, behind a deep part.

    That has operators whose ONNX form is gatecc's: a logsigmoid, which no node outside of the branch is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start, self.first = nn.Linear(8, 8), nn.Linear(8, 4)
        self.deep, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, 8) -> (B, 4)"""
        h = torch.tanh(self.start(x))
        early = self.first(h.mean(1)) * x.square().mean()
        sure = early.softmax(-1).amax(-1).min() > 0.9
        return torch.cond(sure, lambda h, early: early.clone(), self.rest, (h, early))

    def rest(self, h: Tensor, early: Tensor) -> Tensor:
        """What the first head was not sure about."""
        return self.last(self.norm(nn.functional.logsigmoid(self.deep(h) * 20)).mean(1)) + early


def test_what_is_behind_an_early_exit_does_not_run(tmp_path: Path) -> None:
    from tests.export.profile import profile

    torch.manual_seed(0)
    model = Exits().eval()
    made = gatecc.export(model, tmp_path / "x", (torch.randn(2, 5, 8) * 100,))
    assert made.operators["If"] == 1
    (note,) = made.notes
    assert note.startswith("not compared: else_branch ")
    assert "only take its then_branch" in note
    ran = []
    for scale in (0.1, 100.0):
        x = torch.randn(3, 7, 8) * scale
        (y,), counts = profile(tmp_path / "x" / "model.onnx", {"x": x.numpy()}, tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=1e-5)
        ran.append(counts)
    assert ran[0]["LayerNormalization"] == 1
    assert ran[1]["LayerNormalization"] == ran[1]["Log"] == 0
    assert ran[0]["MatMul"] == ran[1]["MatMul"] + 1


class Spikes(nn.Module):
    """Neurons that leak, spike above 1 and are reset by it, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.leak = nn.Linear(4, 6), nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, 4) -> (B, N, 6)"""
        held, spikes = x.new_zeros(x.size(0), 6), list[Tensor]()
        for current in self.into(x).unbind(1):
            held = self.leak * held + current - (held > 1).to(held.dtype)
            spikes.append((held > 1).to(held.dtype))
        return torch.stack(spikes, 1)


def test_a_loop_that_was_unrolled_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = gatecc.export(Spikes().eval(), tmp_path / "x", (torch.randn(2, 5, 4) * 3,))
    assert made.inputs == {"x": ["batch", 5, 4]}
    (note,) = made.notes
    assert "the size 5 of x is fixed" in note


class Deep(nn.Module):
    """Attention and a norm of a sum in a branch, and a condition in it."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.register_buffer("shift", torch.randn(16))

    def attend(self, x: Tensor) -> Tensor:
        """(B, N, 16) -> (B, N, 16)"""
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.mT * 8**-0.5).softmax(-1)
        y = self.norm(x + self.out((scores @ v).transpose(1, 2).flatten(2)))
        return torch.cond(y.max() > 2.5, lambda y: torch.tanh(y) + self.shift, lambda y: y * 2, (y,))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, 16) -> (B, N, 16)"""
        return torch.cond(x.square().mean() > 1, self.attend, lambda x: x - 1, (x,)) * 0.5


def test_what_is_in_a_branch_is_lowered(tmp_path: Path) -> None:
    from tests.export.profile import profile

    torch.manual_seed(0)
    model = Deep().eval()
    made = gatecc.export(model, tmp_path / "x", (torch.randn(2, 5, 16) * 2,))
    assert made.operators["If"] == 2
    assert made.operators["com.microsoft::Attention"] == made.operators["com.microsoft::SkipLayerNormalization"] == 1
    ran = []
    for scale in (0.1, 1.2, 5.0):
        x = torch.randn(3, 7, 16) * scale
        (y,), counts = profile(tmp_path / "x" / "model.onnx", {"x": x.numpy()}, tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=1e-5)
        ran.append((counts["Attention"], counts["Tanh"], counts["If"]))
    assert ran[0] == (0, 0, 1)
    assert {(1, 0, 2), (1, 1, 2)} >= set(ran[1:])
