"""Shared: the dense layer stays, for every token, and experts that start at zero are added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatecc.ir.router import RouterSpec
from gatecc.ops.moe_ffn.activations import activation
from gatecc.passes.route.exactness import Coverage
from gatecc.passes.route.ffn import FFN, Stacked
from gatecc.passes.route.spec import ExpertsSpec


@dataclass(frozen=True)
class Shared(ExpertsSpec, tag="shared"):
    """``y = layer(x) + experts(x)``: ``experts`` are filled as their spec says, with ``down_proj`` 0.

    So it starts as the dense layer with any router. ``gated``: ``y = sigma(g x) layer(x) + experts(x)`` as in
    Qwen2-MoE; g starts at 0, and the layer's last product doubled. The layer is the module ``shared``, its gate
    ``shared_gate``.
    """

    experts: ExpertsSpec
    gated: bool = False

    def check(self) -> None:
        self.require(not isinstance(self.experts, Shared), "experts", "experts without a shared one")

    @property
    def count(self) -> int:
        return self.experts.count

    @property
    def parts(self) -> tuple[int, ...]:
        return self.experts.parts

    @property
    def bias_apart(self) -> bool:
        return False

    @property
    def reads_names(self) -> bool:
        return self.experts.reads_names

    def coverage(self, router: RouterSpec, options: int) -> Coverage:
        return Coverage(0.0, 0.0, False)

    def hidden(self, features: int) -> int:
        return self.experts.hidden(features)

    def neurons(self, dense: Stacked, name: str) -> Tensor:
        return self.experts.neurons(dense, name)

    def finish(self, experts: Stacked, dense: Stacked) -> None:
        self.experts.finish(experts, dense)
        for last in (experts.down, experts.down_bias):
            if last is not None:
                last.zero_()


class SharedExpert(nn.Module):
    """A dense layer as a module: ``gate_proj`` (where there is a gate), ``up_proj`` and ``down_proj``. x: (..., d)."""

    def __init__(self, ffn: FFN, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.activation = ffn.activation
        first, last = ffn.bias

        def linear(width: int, out: int, bias: bool) -> nn.Linear:
            return nn.Linear(width, out, bias, device=device, dtype=dtype)

        self.gate_proj = linear(ffn.width, ffn.hidden, first) if ffn.gated else None
        self.up_proj = linear(ffn.width, ffn.hidden, first)
        self.down_proj = linear(ffn.hidden, ffn.out, last)

    def forward(self, x: Tensor) -> Tensor:
        act, up = activation(self.activation), self.up_proj(x)
        return self.down_proj(act.pointwise(up) if self.gate_proj is None else act.gated(self.gate_proj(x), up))

    def fill(self, dense: Stacked, scale: float) -> None:
        """Write the dense layer's weights, the last ones multiplied."""
        linears = [m for m in (self.gate_proj, self.up_proj) if m is not None]
        biases = [None] * len(linears) if dense.gate_up_bias is None else dense.gate_up_bias.chunk(len(linears))
        for linear, rows, bias in zip(linears, dense.gate_up.chunk(len(linears)), biases, strict=True):
            linear.weight.copy_(rows)
            if bias is not None:
                linear.bias.copy_(bias)
        self.down_proj.weight.copy_(dense.down * scale)
        if dense.down_bias is not None:
            cast("Any", self.down_proj.bias).copy_(dense.down_bias * scale)
