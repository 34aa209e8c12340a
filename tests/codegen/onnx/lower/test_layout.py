"""Chains that move values are one Gather; attention takes what is added to its scores. Export compares with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc

pytest.importorskip("onnxruntime")
SIDE, WINDOW, WIDTH, HEADS = 8, 4, 16, 2


class Windows(nn.Module):
    """Shifted windows over (B, 64, 16), as Swin cuts them, with attention in each. ``fused``: by torch's operator."""

    index: Tensor
    mask: Tensor

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.out = fused, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.places = nn.Parameter(torch.randn(SIDE**2, WIDTH))
        self.table = nn.Parameter(torch.randn(11, HEADS))
        at = torch.arange(WINDOW**2)
        self.register_buffer("index", (at[:, None] * 3 + at) % 11)
        regions = torch.arange(SIDE**2).reshape(4, 1, -1) // 5 % 3
        self.register_buffer("mask", (regions != regions.mT) * -100.0)

    def forward(self, x: Tensor) -> Tensor:
        B = x.size(0)
        x = (x + self.places).view(B, SIDE, SIDE, WIDTH)
        y = F.pad(x.roll((-2, -2), (1, 2)), (0, 0, 0, 0, 0, 0))
        y = y.view(B, 2, WINDOW, 2, WINDOW, WIDTH).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW**2, WIDTH)
        y = self.out(self.attend(y))
        y = y.view(B, 2, 2, WINDOW, WINDOW, WIDTH).permute(0, 1, 3, 2, 4, 5).contiguous().view(B, SIDE, SIDE, WIDTH)
        x = x + y[:, :SIDE, :SIDE].roll((2, 2), (1, 2))
        return torch.cat([x[:, i::2, j::2] for i in range(2) for j in range(2)], -1)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.flatten()].view(WINDOW**2, WINDOW**2, -1).permute(2, 0, 1).unsqueeze(0)
        if self.fused:
            mask = self.mask[None, :, None].expand(x.size(0) // 4, -1, HEADS, -1, -1)
            y = F.scaled_dot_product_attention(q, k, v, bias + mask.reshape(-1, *mask.shape[2:]))
        else:
            scores = (q * 0.3 @ k.mT + bias).view(-1, 4, HEADS, WINDOW**2, WINDOW**2) + self.mask[None, :, None]
            y = scores.view(-1, *scores.shape[2:]).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("target", "fused"), [("ort", False), ("portable", True)])
def test_windows_are_gathered_and_their_bias_is_in_the_node(
    target: Literal["ort", "portable"], fused: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, SIDE * SIDE, WIDTH)
    made = gatecc.export(Windows(fused=fused).eval(), tmp_path / "x", (x,), target=target)
    assert made.kept == {}
    assert [c.sizes["batch"] for c in made.compared] == [1, 3]
    assert not {"Slice", "Pad", "Softmax"} & made.operators.keys(), made.operators
    assert made.operators["Gather"] == 3
    if target == "ort":
        assert made.operators["com.microsoft::Attention"] == 1
        assert "Transpose" not in made.operators
        assert made.operators["Tile"] == 1
        assert sum(made.operators.values()) == 14 + 3
    else:
        assert made.operators["Attention"] == 1


def test_a_mask_of_the_caller_and_scores_that_are_more_than_a_sum_stay(tmp_path: Path) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 2, 5, 5))

        def forward(self, q: Tensor, seen: Tensor) -> Tensor:
            given = F.scaled_dot_product_attention(q, q, q, seen)
            return given + ((q @ q.mT + self.bias).clamp(max=1.0)).softmax(-1) @ q

    inputs: Any = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 5)
    made = gatecc.export(Scores().eval(), tmp_path / "x", inputs)
    assert not any("bias" in became for became in made.lowered)
    assert made.operators["Softmax"] == 2


def test_rows_too_short_and_samples_that_mix_are_left(tmp_path: Path) -> None:
    class Moves(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.roll((1, 1), (2, 3)), x.roll((1, 1), (0, 1))

    made = gatecc.export(Moves().eval(), tmp_path / "x", (torch.randn(2, 6, 4, 4),))
    assert "layout: Gather" not in made.lowered
