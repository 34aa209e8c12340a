"""Experts: the module that holds stacked feed-forward networks and runs those that a router chose."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gatecc import ops as ops  # registers the operator


class Experts(nn.Module):
    """E feed-forward networks with stacked weights, named and laid out as in transformers.

    ``gate_up_proj`` (E, 2F, d) holds the rows of the gate, then those of up; (E, F, d) with ``gated=False``.
    ``down_proj`` (E, o, F). With ``bias``, ``gate_up_proj_bias`` and ``down_proj_bias`` beside them; with
    ``bias_apart`` a ``bias`` (o,) that is added once, whatever is chosen. The values are those of ``torch.empty``:
    whoever makes experts fills them. ``combine``: "sum" over the slots, or "slots", which yield features of their own,
    one after another.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        out: int | None = None,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: tuple[bool, bool] = (False, False),
        bias_apart: bool = False,
        combine: Literal["sum", "slots"] = "sum",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.layout = "halves" if gated else "plain"
        self.combine = combine
        self.chosen = 0  # how many of them a token takes, at most; 0 where nobody said
        rows, out = hidden * (2 if gated else 1), width if out is None else out

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.gate_up_proj = parameter(experts, rows, width)
        self.down_proj = parameter(experts, out, hidden)
        self.gate_up_proj_bias = parameter(experts, rows) if bias[0] else None
        self.down_proj_bias = parameter(experts, out) if bias[1] else None
        self.bias = parameter(out) if bias_apart else None

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x: (..., d), weights and indices: (T, k) for the T positions of x -> (..., o), or (..., k o) by slots."""
        y: Tensor = torch.ops.gatecc.moe_ffn(
            x.reshape(-1, x.size(-1)),
            weights,
            indices,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_proj_bias,
            self.down_proj_bias,
            activation=self.activation,
            layout=self.layout,
            combine=self.combine,
        )
        y = y.flatten(1) if self.combine == "slots" else y
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], y.size(-1))

    def extra_repr(self) -> str:
        experts, rows, width = self.gate_up_proj.shape
        return f"{experts} experts, {width} -> {rows} -> {self.down_proj.size(1)}, {self.activation}, {self.layout}"
