"""Reconcile: forecasts that are corrected by those of the other series around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gates.activation import Softmax
from gatecc.ir.program import attribute, shape
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body
from gatecc.passes.operands import beside, place


@dataclass(frozen=True)
class Reconcile(Body, tag="reconcile"):
    """y_t <- y_t + W (a_t ⊙ h_t), h_t = [y_(t-k); ...; y_(t+k)] of all series, a_t = n softmax(V h_t + b), n its size.

    ``context`` is k; forecasts before the first and after the last are 0. The value is (B, time, series). W starts at
    0, so that the forecasts start as they were (the cross-channel reconciliation head of TSMixer, 2023).
    """

    context: int = 2

    def check(self) -> None:
        self.require(self.context >= 0, "context", "a number of steps")

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True, loses_cache=True)

    @property
    def starts_at_zero(self) -> bool:
        return True

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        if len(value.axes) != 3 or value.axes[0] != "b":
            raise SiteRefusedError(
                "forecasts are reconciled over time and series",
                where=place(site),
                found=f"axes {value.axes}",
                expected="(B, time, series)",
                do="select the forecasts: model[...].prediction_outputs",
            )
        series = int(shape(value.node)[-1])  # the graph holds for this number
        path = edit.module("reconcile", lambda: beside(Reconciled(series, self.context), edit))
        made = cast("Reconciled", attribute(edit.program.module, path)).out.out_features
        if made != series:
            raise SiteRefusedError(
                "the forecasts are of another number of series",
                where=place(site),
                found=str(series),
                expected=str(made),
                do="call the model with as many series as it was transformed with",
            )
        return edit.call(path, value.node, name="reconciled")


class Reconciled(nn.Module):
    """The module of `Reconcile`. y: (B, T, S) -> (B, T, S)."""

    def __init__(self, series: int, context: int) -> None:
        super().__init__()
        self.context, size = context, series * (2 * context + 1)
        self.gate, self.out = nn.Linear(size, size), nn.Linear(size, series)
        for layer in (self.gate, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, y: Tensor) -> Tensor:
        around = F.pad(y, (0, 0, self.context, self.context))
        h = torch.cat([around[:, at : at + y.size(1)] for at in range(2 * self.context + 1)], -1)
        return self.out(Softmax(scale="size")(self.gate(h)) * h)
