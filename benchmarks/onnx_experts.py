"""Experts in ONNX Runtime: an exported ``gatecc::moe_ffn`` against the dense layer of as many active FLOPs.

``python benchmarks/onnx_experts.py [--check]``. Both are exported and run on one thread, side by side. The dense layer
has k experts' hidden width, so at one token it reads as many bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
import torch.nn.functional as F
from _table import Row, best_of, main
from torch import Tensor, nn

import gatecc

WIDTH, HIDDEN = 256, 704
CASES = ((8, 2, {1: 1.8, 256: 1.25, 1024: 1.25}), (64, 8, {1: 1.8, 256: None, 1024: 1.25}))  # E, k, bars by tokens
BAR = 5e-6  # of the results' error


class Experts(nn.Module):
    """k of E gated experts, chosen by given logits."""

    def __init__(self, experts: int, k: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * HIDDEN, WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN) * HIDDEN**-0.5)
        self.k = k

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """x: (T, 256), logits: (T, E)"""
        weights, indices = logits.softmax(-1).topk(self.k)
        return torch.ops.gatecc.moe_ffn(x, weights, indices, self.gate_up, self.down)


class Dense(nn.Module):
    """One gated layer of k experts' width."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * k * HIDDEN, False), nn.Linear(k * HIDDEN, WIDTH, False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, 256)"""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def session(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The model in ONNX Runtime, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        gatecc.export(model.eval(), Path(folder) / "out", inputs, verify=False)
        return ort.InferenceSession(Path(folder) / "out" / "model.onnx", options, providers=["CPUExecutionProvider"])


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    torch.manual_seed(0)
    for experts, k, bars in CASES:
        model = Experts(experts, k)
        x, logits = torch.randn(32, WIDTH), torch.randn(32, experts)
        ours, floor = session(model, (x, logits)), session(Dense(k), (x,))
        for tokens, bar in bars.items():
            x, logits = torch.randn(tokens, WIDTH), torch.randn(tokens, experts)
            given = {"x": x.numpy(), "logits": logits.numpy()}
            with torch.no_grad():
                error = (torch.from_numpy(ours.run(None, given)[0]) - model(x, logits)).abs().max()
            assert error < BAR, error
            works = (partial(ours.run, None, given), partial(floor.run, None, {"x": given["x"]}))
            ours_s, floor_s = best_of(*works, repeats=30 if tokens == 1 else 5)
            yield Row(f"{k} of {experts} experts, {tokens} tokens, of the dense layer", ours_s / floor_s, bar, unit="x")


if __name__ == "__main__":
    main("onnx_experts", lambda: list(measure()))
