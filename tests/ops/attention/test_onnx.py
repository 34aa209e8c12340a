"""Attention in ONNX: every option, any number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.ops.attention import attention

pytest.importorskip("onnxruntime")
H, D = 4, 8
FORMS: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"causal": True, "window": 3, "gate_activation": "sigmoid"},
    {"causal": True, "softcap": 2.0, "sinks": True},
    {"window": 2, "bias": True},
)


class Forms(nn.Module):
    """Each form of attention in turn, over x: (B, N, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(H * D, 2 * H * D) for _ in FORMS)
        self.sinks, self.slopes = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(1, H, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, 32)."""
        for qkv, form in zip(self.qkv, FORMS, strict=True):
            heads = qkv(x).unflatten(-1, (-1, D)).transpose(1, 2)
            q, k, v = heads.split((H, H // 2, H // 2), 1)
            options = {n: value for n, value in form.items() if n not in ("sinks", "bias")}
            bias = self.slopes * torch.arange(x.size(1))[None, None, None] if "bias" in form else None
            gate = q if "gate_activation" in form else None
            sinks = self.sinks if "sinks" in form else None
            x = x + attention(q, k, v, gate, bias, sinks, **options)[0].transpose(1, 2).flatten(2)
        return x


def test_every_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = gatecc.export(Forms().eval(), tmp_path / "out", (torch.randn(2, 7, H * D),))
    assert made.inputs == {"x": ["batch", "sequence", H * D]}
    assert not [name for name in made.operators if "::" in name]
