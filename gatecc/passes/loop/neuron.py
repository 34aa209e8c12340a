"""Neuron: integrate and fire, one step at a time. Its membrane is given and returned, never kept in the module.

snntorch's neurons keep theirs in a buffer and fire through a custom autograd function, so that no graph holds both the
state and the gradient; the equations are the same (tests/passes/loop).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Reset = Literal["subtract", "zero"]


class Neuron(nn.Module):
    """u <- decay * u + x; s = 1[u >= threshold]; u <- u - threshold * s, or 0 where it fires; y = amplitude * s.

    ``threshold`` () and ``amplitude`` () are buffers, which may be changed at any time (threshold guidance).
    """

    threshold: Tensor
    amplitude: Tensor

    def __init__(self, threshold: float, amplitude: float, decay: float, reset: Reset, alpha: float) -> None:
        super().__init__()
        self.decay, self.reset, self.alpha = decay, reset, alpha
        self.register_buffer("threshold", torch.tensor(threshold))
        self.register_buffer("amplitude", torch.tensor(amplitude))

    def forward(self, x: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:
        """x, membrane: any shape -> spikes and the membrane after them, of that shape."""
        threshold = self.threshold.to(x.dtype)
        u = membrane + x if self.decay == 1 else self.decay * membrane + x
        fired = torch.ops.gatecc.spike(u - threshold, self.alpha)
        left = u - threshold * fired if self.reset == "subtract" else u * (1 - fired)
        return self.amplitude.to(x.dtype) * fired, left
