"""Codebook: the nearest of a few learned vectors in the place of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc import ops as ops  # registers add_loss
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body, operand
from gatecc.passes.operands import beside


@dataclass(frozen=True)
class Codebook(Body, tag="codebook"):
    """The nearest of ``entries`` learned vectors, by Euclidean distance, in the place of each (VQ-VAE, 2017).

    The gradient of the entry goes straight to the vector. In training ``weight * (|sg(x) - e|² + beta |x - sg(e)|²)``,
    a mean over all places, enters in the backward pass: entries move to the vectors, and vectors to their entries.
    Entries start with the length of a standard normal vector.
    """

    entries: int
    beta: float = 0.25
    weight: float = 1.0

    def check(self) -> None:
        self.require(self.entries > 0, "entries", "a positive number")
        self.require(self.beta >= 0, "beta", "a number >= 0")
        self.require(self.weight > 0, "weight", "a positive number: entries learn from nothing else")

    @property
    def ops(self) -> tuple[str, ...]:
        return ("lerp",)

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        _, channels, _ = operand(site, value, "self")
        path = edit.module("codebook", lambda: beside(Entries(self, channels), edit))
        return edit.call(path, value.node, name="entry")


class Entries(nn.Module):
    """The module of `Codebook`. x: (..., C) -> (..., C), rows of ``codes`` (E, C)."""

    loss_scale: Tensor

    def __init__(self, spec: Codebook, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.codes = nn.Parameter(torch.randn(spec.entries, channels))
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        nearest = self.nearest(x)
        entry = F.embedding(nearest, self.codes)
        if self.training:
            moved = F.mse_loss(entry, x.detach()) + self.spec.beta * F.mse_loss(x, entry.detach())
            x = torch.ops.gatecc.add_loss(x, self.spec.weight * moved.float(), self.loss_scale)
        return x + (entry - x).detach()

    def nearest(self, x: Tensor) -> Tensor:
        """The number of the nearest entry, (...,); of two as near the first."""
        codes = self.codes.to(x.dtype)
        return ((codes * codes).sum(-1) - 2 * F.linear(x, codes)).argmin(-1)
